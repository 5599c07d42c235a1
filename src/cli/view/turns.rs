//! Turns: work of which one is done at a time, so that memory suffices.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

use super::asked::{Asked, Problem};
use ovchat_query::Room;

/// Work of which one is done at a time.
#[derive(Default)]
pub struct Turns {
    is_taken: Mutex<bool>,
    freed: Condvar,
}

impl Turns {
    /// Waits for a turn, with the room for a query.
    pub fn turn<'r>(&'r self, asked: &Asked, room: Room<'r>) -> Result<Turn<'r>, Problem> {
        let mut is_taken = self.is_taken.lock().expect("no panic while locked");
        while *is_taken {
            asked.go_on()?;
            let patience = Duration::from_millis(100);
            let waited = self.freed.wait_timeout(is_taken, patience);
            is_taken = waited.expect("no panic while locked").0;
        }
        *is_taken = true;
        Ok(Turn { turns: self, room })
    }
}

/// A turn, which ends when it is dropped.
pub struct Turn<'r> {
    turns: &'r Turns,
    room: Room<'r>,
}

impl Turn<'_> {
    pub fn room(&self) -> Room<'_> {
        self.room
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.turns.is_taken.lock().expect("no panic while locked") = false;
        self.turns.freed.notify_one();
    }
}
