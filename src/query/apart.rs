//! A thread for each query: its stack is deep enough for any query that is not refused, and whoever
//! waits for rows is free to do something else.

use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, Builder};
use std::time::Duration;

use super::{Part, QueryError};
use ovchat_io::files::caught;

/// The stack of a query's thread. A chain of terms becomes a tree as deep as it is long, through which
/// DataFusion walks by recursion, and which it drops so, too. Only what is used of it takes memory.
const STACK_BYTES: usize = 1 << 30;

/// The longest time without word from a query.
const PATIENCE: Duration = Duration::from_millis(100);

/// Does something in a thread of its own and waits for it.
pub fn apart<T: Send>(
    work: impl AsyncFnOnce() -> Result<T, QueryError> + Send,
) -> Result<T, QueryError> {
    thread::scope(|scope| {
        let thread = builder().spawn_scoped(scope, || unless_it_panics(|| block_on(work())));
        let thread = thread.map_err(|error| no_thread(&error))?;
        thread.join().unwrap_or_else(|_| Err(panicked("it ended")))
    })
}

/// Does something in a thread of its own that gives one piece after the other, and hands them to `sink`
/// in this thread. It holds two pieces at most. When `sink` fails, the thread is left to end by itself.
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
    let is_unheard = |_| QueryError("nobody waits for the rows".to_owned());
    sender.send(part).map_err(is_unheard)
}

fn builder() -> Builder {
    Builder::new()
        .name("query".to_owned())
        .stack_size(STACK_BYTES)
}

fn no_thread(error: &std::io::Error) -> QueryError {
    QueryError(format!("there is no thread for the query: {error}"))
}

/// The result of a query, or the message of its panic as an error.
fn unless_it_panics<T>(work: impl FnOnce() -> Result<T, QueryError>) -> Result<T, QueryError> {
    caught(work).unwrap_or_else(|message| Err(panicked(&message)))
}

fn panicked(message: &str) -> QueryError {
    QueryError(format!(
        "DataFusion failed at this query ({message}); write it in another way"
    ))
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a thread's own runtime");
    runtime.block_on(work)
}
