//! One thread per query, with a stack deep enough for any accepted query, so that the consumer of
//! the rows is free for other work.

use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, Builder};
use std::time::Duration;

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

/// Runs `work` in its own thread and passes its parts to `sink` in this thread. At most two parts
/// are buffered. If `sink` fails, the thread is detached and ends by itself.
pub fn piece_by_piece<E: From<QueryError>>(
    work: impl AsyncFnOnce(&dyn Fn(Part) -> Result<(), QueryError>) -> Result<(), QueryError>
    + Send
    + 'static,
    mut sink: impl FnMut(Part) -> Result<(), E>,
) -> Result<(), E> {
    let (sender, receiver) = sync_channel(1);
    let thread = builder().spawn(move || {
        let give = |part| give(&sender, part);
        unless_it_panics(|| block_on(work(&give)))
    });
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

fn give(sender: &SyncSender<Part>, part: Part) -> Result<(), QueryError> {
    let is_unheard = |_| QueryError::Other("the receiver of the rows is gone".to_owned());
    sender.send(part).map_err(is_unheard)
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
