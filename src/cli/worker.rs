//! `pipeline worker`: the process that computes parts of tables for a run, which starts it.

use std::fs::File;
use std::io::{self, BufWriter};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use super::failed::Failed;
use ovchat_models::ModelLoader;
use ovchat_pipeline::run::work;

/// Reads orders from stdin and replies on stdout until stdin is closed.
pub fn run(loader: Option<&dyn ModelLoader>) -> Result<(), Failed> {
    let cannot = |error: io::Error| Failed::Words(format!("cannot start a worker: {error}"));
    // A signal to the group of processes stops the run, which then closes stdin.
    for signal in [SIGINT, SIGTERM] {
        flag::register(signal, Arc::new(AtomicBool::new(false))).map_err(cannot)?;
    }
    // What a library prints to stdout must not come between the replies.
    let replies = rustix::io::fcntl_dupfd_cloexec(io::stdout(), 3).map_err(|e| cannot(e.into()))?;
    rustix::stdio::dup2_stdout(io::stderr()).map_err(|error| cannot(error.into()))?;
    let replies = BufWriter::new(File::from(replies));
    work(loader, io::stdin(), replies).map_err(|failure| Failed::Words(failure.to_string()))
}
