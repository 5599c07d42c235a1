//! How many calls are under way at once, and that they rest no longer than the run goes on.

use std::num::NonZeroU32;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How many calls may be under way.
pub struct CallLimiter {
    state: Mutex<LimiterState>,
    changed: Condvar,
    most: f64,
}

struct LimiterState {
    under_way: usize,
    limit: f64,
    /// Whether it was too much once.
    was_too_many: bool,
    /// Whether nothing is to be asked any more.
    is_closed: bool,
}

impl CallLimiter {
    pub fn new(most: NonZeroU32) -> Self {
        // The first call is alone: a wrong address or key is found out once.
        let state = LimiterState {
            under_way: 0,
            limit: 1.0,
            was_too_many: false,
            is_closed: false,
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            most: f64::from(most.get()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, LimiterState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until one more call may be under way. `false` means that none may, ever again.
    #[must_use]
    pub fn enter(&self) -> bool {
        let is_full = |state: &mut LimiterState| {
            !state.is_closed && state.under_way as f64 >= state.limit.floor().max(1.0)
        };
        let waited = self.changed.wait_while(self.lock(), is_full);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        state.under_way += usize::from(!state.is_closed);
        !state.is_closed
    }

    /// Waits for so long, or until the gate closes.
    pub fn rest(&self, time: Duration) {
        let is_open = |state: &mut LimiterState| !state.is_closed;
        drop(self.changed.wait_timeout_while(self.lock(), time, is_open));
    }

    /// Lets nobody in any more, and wakes all who wait.
    pub fn close(&self) {
        self.lock().is_closed = true;
        self.changed.notify_all();
    }

    pub fn is_closed(&self) -> bool {
        self.lock().is_closed
    }

    /// A call came back; `was_too_many`: the endpoint could not take it.
    pub fn leave(&self, was_too_many: bool) {
        let mut state = self.lock();
        state.under_way = state.under_way.saturating_sub(1);
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
        let gate = CallLimiter::new(NonZeroU32::new(16).unwrap());
        let limit = || gate.lock().limit;
        for _ in 0..40 {
            assert!(gate.enter());
            gate.leave(false);
        }
        assert!((limit() - 16.0).abs() < 1e-9);
        assert!(gate.enter());
        gate.leave(true);
        assert!((limit() - 8.0).abs() < 1e-9);
        for _ in 0..20 {
            assert!(gate.enter());
            gate.leave(true);
        }
        assert!((limit() - 1.0).abs() < 1e-9);
        assert!(gate.enter());
        gate.leave(false);
        assert!((limit() - 2.0).abs() < 1e-9);
    }

    #[test]
    fn nobody_waits_at_a_gate_that_closes() {
        let gate = CallLimiter::new(NonZeroU32::MIN);
        assert!(gate.enter());
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| gate.enter());
            let rests = scope.spawn(|| gate.rest(Duration::MAX));
            std::thread::sleep(Duration::from_millis(20));
            gate.close();
            assert!(!waits.join().unwrap());
            rests.join().unwrap();
        });
        assert!(!gate.enter());
    }
}
