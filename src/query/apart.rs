//! One thread per query, with a stack deep enough for any accepted query, so that the consumer of
//! the rows is free for other work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, Builder};
use std::time::Duration;

use futures::future::{Either, select};
use tokio::sync::oneshot;

use super::interface::{Part, QueryError};
use ovchat_io::files::caught;

/// The stack size of a query's thread, in bytes. A chain of terms becomes a tree as deep as it is
/// long, which DataFusion walks and drops recursively. Only the used part of the stack takes
/// memory.
const STACK_BYTES: usize = 1 << 30;

/// The maximum time without a message from a query.
const PATIENCE: Duration = Duration::from_millis(100);

/// Runs `work` in its own thread and waits for it.
pub fn apart<T: Send>(
    work: impl AsyncFnOnce() -> Result<T, QueryError> + Send,
) -> Result<T, QueryError> {
    thread::scope(|scope| {
        let thread = builder().spawn_scoped(scope, || unless_it_panics(|| block_on(work())));
        let thread = thread.map_err(|error| no_thread(&error))?;
        thread.join().unwrap_or_else(|_| Err(panicked("it ended")))
    })
}

/// The receiver of the parts of a query.
pub struct Listener {
    parts: SyncSender<Part>,
    /// Resolves when nobody receives parts any more.
    gone: oneshot::Receiver<()>,
    /// Becomes true then.
    pub is_gone: Arc<AtomicBool>,
}

/// Tells a query when it is dropped that nobody receives its parts any more.
struct Here {
    _gone: oneshot::Sender<()>,
    is_gone: Arc<AtomicBool>,
}

impl Drop for Here {
    fn drop(&mut self) {
        self.is_gone.store(true, Ordering::Relaxed);
    }
}

impl Listener {
    pub fn give(&self, part: Part) -> Result<(), QueryError> {
        self.parts.send(part).map_err(|_| unheard())
    }

    /// Waits for a piece of work, or fails as soon as nobody receives parts any more.
    pub async fn unless_gone<T>(
        &mut self,
        work: impl Future<Output = T> + Unpin,
    ) -> Result<T, QueryError> {
        match select(work, &mut self.gone).await {
            Either::Left((done, _)) => Ok(done),
            Either::Right(_) => Err(unheard()),
        }
    }
}

fn unheard() -> QueryError {
    QueryError::Other("the receiver of the rows is gone".to_owned())
}

/// Runs `work` in its own thread and passes its parts to `sink` in this thread. At most two parts
/// are buffered. If `sink` fails, the thread is detached, and ends soon.
pub fn piece_by_piece<E: From<QueryError>>(
    work: impl AsyncFnOnce(Listener) -> Result<(), QueryError> + Send + 'static,
    mut sink: impl FnMut(Part) -> Result<(), E>,
) -> Result<(), E> {
    let (parts, receiver) = sync_channel(1);
    let (sender, gone) = oneshot::channel();
    let is_gone = Arc::new(AtomicBool::new(false));
    let _here = Here {
        _gone: sender,
        is_gone: Arc::clone(&is_gone),
    };
    let listener = Listener {
        parts,
        gone,
        is_gone,
    };
    let thread = builder().spawn(move || unless_it_panics(|| block_on(work(listener))));
    let thread = thread.map_err(|error| no_thread(&error))?;
    loop {
        match receiver.recv_timeout(PATIENCE) {
            Ok(part) => sink(part)?,
            Err(RecvTimeoutError::Timeout) => sink(Part::Nothing)?,
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    Ok(thread
        .join()
        .unwrap_or_else(|_| Err(panicked("it ended")))?)
}

fn builder() -> Builder {
    Builder::new()
        .name("query".to_owned())
        .stack_size(STACK_BYTES)
}

fn no_thread(error: &std::io::Error) -> QueryError {
    QueryError::Other(format!("cannot start a thread for the query: {error}"))
}

/// The result of a query, or the message of its panic as an error.
fn unless_it_panics<T>(work: impl FnOnce() -> Result<T, QueryError>) -> Result<T, QueryError> {
    caught(work).unwrap_or_else(|message| Err(panicked(&message)))
}

fn panicked(message: &str) -> QueryError {
    QueryError::Other(format!(
        "DataFusion failed at this query ({message}); rewrite the query"
    ))
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a current-thread runtime builds");
    runtime.block_on(work)
}
