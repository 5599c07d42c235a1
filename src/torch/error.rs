//! Errors: libtorch's panics as [`ModelError`], and errors about the files of a model.
//!
//! A failing libtorch call inside a network is a bug and panics, which keeps the math readable. Two
//! failures are not bugs: running out of memory and a failing device. Any call can cause them, so
//! they are caught at the entry to a network, and recognized by libtorch's own words, which a panic
//! quotes whatever its wording. Every other panic is resumed.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind, set_hook, take_hook};
use std::path::Path;
use std::sync::Once;

use tch::TchError;

use super::device::torch_error;
use ovchat_models::ModelError;

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// The starts of the stack traces in libtorch's errors, after the message: the place where a
/// `c10::Error` was raised, or the first frame.
const TRACES: [&str; 2] = ["Exception raised from ", "frame #0: "];

/// The message of C++'s allocator.
const BAD_ALLOC: &str = "std::bad_alloc";

/// Runs `compute`, which calls networks. `what` completes "out of memory while …"; `batch` and
/// `length` are the rows and tokens that are computed at once.
///
/// After a failure, values that `compute` was changing may be partially updated.
pub fn guarded<T>(
    what: &str,
    batch: usize,
    length: usize,
    compute: impl FnOnce() -> T,
) -> Result<T, ModelError> {
    #[cfg(test)]
    if tests::runs_out() {
        return Err(ModelError::OutOfMemory {
            what: what.to_owned(),
            batch,
            length,
        });
    }
    keep_quiet_when_guarded();
    let outer = GUARDED.replace(true);
    let outcome = catch_unwind(AssertUnwindSafe(compute));
    GUARDED.set(outer);
    #[cfg(test)]
    if tests::ran_out() {
        return Err(ModelError::OutOfMemory {
            what: what.to_owned(),
            batch,
            length,
        });
    }
    outcome.or_else(|payload| match torch_words(&*payload) {
        Some(words) => {
            let error = TchError::Torch(words.to_owned());
            Err(torch_error(what.to_owned(), batch, length, &error))
        }
        None => resume_unwind(payload),
    })
}

/// Returns libtorch's error message if the panic came from a failed libtorch call.
fn torch_words(payload: &(dyn std::any::Any + Send)) -> Option<&str> {
    let text = payload.downcast_ref::<String>()?;
    if text.contains(BAD_ALLOC) {
        return Some(BAD_ALLOC);
    }
    let start = TRACES.iter().filter_map(|trace| text.find(trace)).min()?;
    let words = &text[..start];
    // The panic quotes the error by `Debug`. The first line is enough.
    let words = words.split_once('"').map_or(words, |(_, quoted)| quoted);
    Some(words.split("\\n").next().unwrap_or(words))
}

/// Suppresses the panic message of panics that [`guarded`] turns into errors.
fn keep_quiet_when_guarded() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let others = take_hook();
        set_hook(Box::new(move |panic| {
            if !GUARDED.get() || torch_words(panic.payload()).is_none() {
                others(panic);
            }
        }));
    });
}

/// An error about a file of the model.
pub fn refuse(path: &Path, problem: String) -> ModelError {
    ModelError::Weights {
        path: path.to_owned(),
        problem,
    }
}

#[cfg(test)]
pub mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    thread_local! {
        static SUCCEED: Cell<Option<usize>> = const { Cell::new(None) };
        static LATE: Cell<Option<usize>> = const { Cell::new(None) };
    }

    /// Lets the next `calls` calls of [`guarded`] on this thread succeed and the one after them run
    /// out of memory, once.
    pub fn run_out_after(calls: usize) {
        SUCCEED.set(Some(calls));
    }

    /// Like [`run_out_after`], but memory runs out when all work of the call is done.
    pub fn run_out_late_after(calls: usize) {
        LATE.set(Some(calls));
    }

    pub fn runs_out() -> bool {
        counted_down(&SUCCEED)
    }

    pub fn ran_out() -> bool {
        counted_down(&LATE)
    }

    fn counted_down(left: &'static std::thread::LocalKey<Cell<Option<usize>>>) -> bool {
        match left.get() {
            None => false,
            Some(0) => {
                left.set(None);
                true
            }
            Some(calls) => {
                left.set(Some(calls - 1));
                false
            }
        }
    }

    #[test]
    fn too_large_a_tensor_is_out_of_memory() {
        let error = guarded("testing", 2, 3, || {
            Tensor::zeros([1 << 30, 1 << 16], (Kind::Float, Device::Cpu))
        });
        let text = error.unwrap_err().to_string();
        assert_eq!(text, "out of memory while testing (2 rows, 3 tokens)");
    }

    #[test]
    fn errors_of_libtorch_are_recognized_in_any_panic() {
        let words = |text: &str| torch_words(&text.to_owned()).map(str::to_owned);
        let raised = "no memory\nException raised from alloc at a.cpp:1";
        assert_eq!(words(&format!("failed: {raised:?}")).unwrap(), "no memory");
        assert_eq!(words("it threw std::bad_alloc").unwrap(), BAD_ALLOC);
        assert_eq!(words("index out of bounds"), None);
    }

    #[test]
    fn other_errors_of_libtorch_keep_their_words() {
        let one = Tensor::from_slice(&[1.0f32, 2.0]);
        let error = guarded("testing", 1, 1, || &one + Tensor::from_slice(&[1.0f32; 3]));
        let text = error.unwrap_err().to_string();
        assert!(text.contains("size of tensor a (2)"), "{text}");
        assert!(!text.contains('\n') && !text.contains("frame #"), "{text}");
    }

    #[test]
    #[should_panic(expected = "a bug of this crate")]
    fn bugs_still_panic() {
        let _ = guarded("testing", 1, 1, || panic!("a bug of this crate"));
    }
}
