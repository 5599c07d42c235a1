//! A limit on concurrent calls that adapts to the endpoint.

use std::num::NonZeroU32;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A limiter of concurrent calls.
pub struct CallLimiter {
    state: Mutex<LimiterState>,
    changed: Condvar,
    most: f64,
}

struct LimiterState {
    under_way: usize,
    limit: f64,
    /// True once the endpoint has rejected a call as too many.
    was_too_many: bool,
    /// True if no more calls may start.
    is_closed: bool,
}

impl CallLimiter {
    pub fn new(most: NonZeroU32) -> Self {
        // Starts with a single call, so that a wrong address or key costs one call only.
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

    /// Waits until one more call may start. `false` if the limiter was closed.
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

    /// Waits for `time`, or until the limiter is closed.
    pub fn rest(&self, time: Duration) {
        let is_open = |state: &mut LimiterState| !state.is_closed;
        drop(self.changed.wait_timeout_while(self.lock(), time, is_open));
    }

    /// Closes the limiter: no more calls start, and all waiting threads wake up.
    pub fn close(&self) {
        self.lock().is_closed = true;
        self.changed.notify_all();
    }

    pub fn is_closed(&self) -> bool {
        self.lock().is_closed
    }

    /// Reports the end of a call; `was_too_many` is true if the endpoint could not take it.
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
