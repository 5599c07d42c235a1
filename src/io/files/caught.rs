//! Panics of file-reading crates, caught and returned as errors. Those crates panic at some files
//! that they should reject.

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    /// True while panics of this thread are caught and returned as errors.
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` and returns its result, or its panic message. After a panic, values that `work` was
/// modifying must not be used.
pub fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let told = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            if !CAUGHT.get() {
                told(panic);
            }
        }));
    });
    let outer = CAUGHT.replace(true);
    let done = panic::catch_unwind(AssertUnwindSafe(work));
    CAUGHT.set(outer);
    done.map_err(|panic| {
        let words = panic.downcast_ref::<String>().map(String::as_str);
        let words = words.or(panic.downcast_ref::<&str>().copied());
        words.unwrap_or("panicked").to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_told_in_its_words() {
        let number = 7;
        let inner = || {
            assert_eq!(
                caught(|| panic!("{number} of them")),
                Err::<(), _>("7 of them".to_owned())
            )
        };
        assert_eq!(caught(inner), Ok(()));
        let outer = || {
            inner();
            panic!("none")
        };
        assert_eq!(caught(outer), Err::<(), _>("none".to_owned()));
    }
}
