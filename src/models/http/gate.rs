//! How many calls are under way at once.

use std::num::NonZeroU32;
use std::sync::{Condvar, Mutex, MutexGuard};

/// How many calls may be under way.
pub struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
    most: f64,
}

struct GateState {
    under_way: usize,
    limit: f64,
    /// Whether it was too much once.
    was_too_many: bool,
}

impl Gate {
    pub fn new(most: NonZeroU32) -> Self {
        // The first call is alone: a wrong address or key is found out once.
        let state = GateState {
            under_way: 0,
            limit: 1.0,
            was_too_many: false,
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            most: f64::from(most.get()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().expect("no panic while locked")
    }

    /// Waits until one more call may be under way.
    pub fn enter(&self) {
        let mut state = self.lock();
        while state.under_way as f64 >= state.limit.floor().max(1.0) {
            state = self.changed.wait(state).expect("no panic while locked");
        }
        state.under_way += 1;
    }

    /// A call came back; `was_too_many`: the endpoint could not take it.
    pub fn leave(&self, was_too_many: bool) {
        let mut state = self.lock();
        state.under_way -= 1;
        state.was_too_many |= was_too_many;
        state.limit = if was_too_many {
            (state.limit / 2.0).max(1.0)
        } else if state.was_too_many {
            (state.limit + 1.0 / state.limit).min(self.most)
        } else {
            (state.limit + 1.0).min(self.most)
        };
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_halves_when_it_is_too_much_and_opens_again() {
        let gate = Gate::new(NonZeroU32::new(16).unwrap());
        let limit = || gate.lock().limit;
        for _ in 0..40 {
            gate.enter();
            gate.leave(false);
        }
        assert!((limit() - 16.0).abs() < 1e-9);
        gate.enter();
        gate.leave(true);
        assert!((limit() - 8.0).abs() < 1e-9);
        for _ in 0..20 {
            gate.enter();
            gate.leave(true);
        }
        assert!((limit() - 1.0).abs() < 1e-9);
        gate.enter();
        gate.leave(false);
        assert!((limit() - 2.0).abs() < 1e-9);
    }
}
