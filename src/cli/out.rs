//! Standard output, for data; and whether it is for people or for programs.

use std::io::{self, ErrorKind, Write};

use clap::{Args, ValueEnum};

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

/// Writes to stdout, and ends the program quietly when nobody reads it any more (`… | head`).
pub struct Out;

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
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
