//! The store that the ranks of a cluster share: numbers that are counted up, values that are set once.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

/// A store that all ranks see. An error is in words, and final: the connection is lost.
pub trait Board {
    /// Adds to a number, which begins at 0, and returns the sum.
    fn add(&self, key: &str, by: i64) -> Result<i64, String>;
    fn set(&self, key: &str, value: &[u8]) -> Result<(), String>;
    /// Returns a value; `None` if it was not set yet. Does not wait.
    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, String>;
}

/// The place of a process in a cluster, as its launcher tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankPlace {
    /// The number of this process, and of all.
    pub rank: u32,
    pub world: u32,
    /// The address of the board.
    pub host: String,
    pub port: u16,
    /// True if this process serves the board.
    pub is_server: bool,
    /// The beginning of all keys, which differs from those of earlier starts.
    pub prefix: String,
}

/// A board within this thread, for tests.
#[derive(Debug, Clone, Default)]
pub struct LocalBoard {
    numbers: Rc<RefCell<HashMap<String, i64>>>,
    values: Rc<RefCell<HashMap<String, Vec<u8>>>>,
}

impl Board for LocalBoard {
    fn add(&self, key: &str, by: i64) -> Result<i64, String> {
        let mut numbers = self.numbers.borrow_mut();
        let number = numbers.entry(key.to_owned()).or_default();
        *number += by;
        Ok(*number)
    }

    fn set(&self, key: &str, value: &[u8]) -> Result<(), String> {
        self.values
            .borrow_mut()
            .insert(key.to_owned(), value.to_vec());
        Ok(())
    }

    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, String> {
        Ok(self.values.borrow().get(key).cloned())
    }
}
