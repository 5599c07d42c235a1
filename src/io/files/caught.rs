//! Panics of the crates that read files, told as errors: they panic at some files that they should refuse.

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    /// Whether a panic of this thread is caught, and told as an error.
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// The result of `work`, or the message of its panic. Values that it was changing must not be used after one.
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
        words.unwrap_or("it panics").to_owned()
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
