//! Standard output for data, its output format, and messages on standard error.

use std::io::{self, ErrorKind, IsTerminal, Write};

use clap::{Args, ValueEnum};

use super::failed::Failed;
use ovchat_io::visible::{visible, visible_bytes};

/// The option for the output format.
#[derive(Debug, Args)]
pub struct Output {
    /// The output format.
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
    /// An alias of --format json, from earlier versions.
    #[arg(long, hide = true, conflicts_with = "format")]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Human-readable text.
    Text,
    /// JSON.
    Json,
}

impl Output {
    pub fn is_json(&self) -> bool {
        self.json || self.format == Format::Json
    }
}

/// A writer to stdout that exits quietly when the reader closes it (`… | head`). Control sequences
/// are escaped on a terminal; files and programs get the bytes unchanged.
pub struct Out;

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if io::stdout().is_terminal() {
            let shown = visible_bytes(bytes);
            let written = io::stdout().write_all(shown.as_bytes());
            return written.map(|()| bytes.len()).map_err(end_if_unread);
        }
        io::stdout().write(bytes).map_err(end_if_unread)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush().map_err(end_if_unread)
    }
}

fn end_if_unread(error: io::Error) -> io::Error {
    if error.kind() == ErrorKind::BrokenPipe {
        std::process::exit(0);
    }
    error
}

/// Prints a line of data.
pub fn line(text: impl std::fmt::Display) -> Result<(), Failed> {
    let written = writeln!(Out, "{text}").and_then(|()| Out.flush());
    written.map_err(|error| Failed::Words(format!("cannot write to stdout: {error}")))
}

/// Writes a message to stderr.
pub fn write_words(text: &str) {
    // A closed stderr is no reason to stop.
    let _ = writeln!(io::stderr(), "{}", visible(text));
}

/// Prints a formatted message to stderr, like `eprintln!`.
macro_rules! say {
    ($($words:tt)*) => {
        $crate::out::write_words(&format!($($words)*))
    };
}
pub(super) use say;
