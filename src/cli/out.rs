//! Standard output, for data; whether it is for people or for programs; and words on standard error.

use std::io::{self, ErrorKind, IsTerminal, Write};

use clap::{Args, ValueEnum};

use ovchat_io::visible::{visible, visible_bytes};

/// The flag of the output format.
#[derive(Debug, Args)]
pub struct Output {
    /// The output format.
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
    /// The same as --format json, as it was called before.
    #[arg(long, hide = true, conflicts_with = "format")]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

impl Output {
    pub fn is_json(&self) -> bool {
        self.json || self.format == Format::Json
    }
}

/// Writes to stdout, and ends the program quietly when nobody reads it any more (`… | head`). A terminal
/// is shown nothing that it would obey; files and programs get the bytes as they are.
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
pub fn line(text: impl std::fmt::Display) -> Result<(), super::Failed> {
    let written = writeln!(Out, "{text}").and_then(|()| Out.flush());
    written.map_err(|error| super::Failed::Words(format!("cannot write to stdout: {error}")))
}

/// Writes a line of words to stderr.
pub fn write_words(text: &str) {
    // Nobody reading it any more is no reason to stop.
    let _ = writeln!(io::stderr(), "{}", visible(text));
}

/// Says something to people on stderr, in the words of a format, as `eprintln!` would.
macro_rules! say {
    ($($words:tt)*) => {
        $crate::out::write_words(&format!($($words)*))
    };
}
pub(super) use say;
