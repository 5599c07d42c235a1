//! The `command` stage: a user's program produces the table.
//!
//! The program gets rows as an Arrow IPC stream on stdin and returns rows as one on stdout. It may
//! read everything before it writes, write before it has read everything, or leave rows unread. The
//! returned stream is complete once its end-of-stream marker arrives: a program that dies between
//! two batches leaves a stream that is valid up to that point.

mod framing;
mod lines;
mod program;

use std::collections::HashSet;
use std::ffi::OsString;
use std::io::{BufRead as _, BufReader, Read, Write};
use std::os::unix::process::CommandExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Instant;

use arrow::datatypes::SchemaRef;
use arrow_ipc::reader::StreamReader;
use arrow_ipc::writer::StreamWriter;

use self::framing::Framed;
use self::program::{Ended, PipeMessage, Program, ProgramOutput, Running};
use super::report::{Start, Unit};
use super::runner::{Runner, took};
use crate::config::{PlannedStage, Secrets};
use crate::stages::{Command, Failure, Inherited, end_with_parent};
use ovchat_data::store::{TableReader, TableVersion};
use ovchat_io::files::caught;
use ovchat_io::mask::Mask;
use ovchat_models::libtorch::SET_HERE;

/// The capacity of the queue of batches.
const QUEUE: usize = 4;

/// The advice for a program that did not end its stream.
const CLOSE: &str = "close the stream's writer after the last batch (pyarrow: `writer.close()`)";

impl Runner<'_> {
    /// Builds the table with the user's program.
    pub(super) fn command(
        &mut self,
        stage: &PlannedStage,
        round: Option<u32>,
        work: &Command<'_>,
    ) -> Result<(), Failure> {
        let table = &stage.name;
        let begun = Instant::now();
        self.report.start(Start {
            table,
            round,
            unit: Unit::Rows,
            total: None,
            done: 0,
        });
        let input_round = self.plan.round_of(work.input, round);
        let input = self.plan.stage(work.input);
        let input_schema = input.expect("the plan names every table").schema.clone();
        let files = self.folder.files(work.input.as_str(), input_round);
        let manifest = self.folder.manifest();
        let made = manifest.find(work.input.as_str(), input_round);
        let rows_in = made.map_or(0, TableVersion::rows);

        let mut child = Running(start(work, round, &self.plan.secrets)?);
        let mask = self.plan.secrets.mask();
        let messages = listen(&mut child.0, files, input_schema, mask.clone());
        let writer = self.writer(table, round, "part-00000", &stage.schema);
        let mut program = Program::new(work, child, messages);
        let mut output = ProgramOutput::new(stage, mask, writer, &mut *self.report);
        let ending = loop {
            if self.interrupt.raised() {
                return Err(Failure::Interrupted);
            }
            if let Some(ending) = program.ending()? {
                break ending;
            }
            program.hear(&mut output)?;
        };
        program.hear_last_lines(&mut output)?;
        if let Some(failure) = program.failure(ending) {
            return Err(failure);
        }
        let (done, files) = output.finish()?;
        self.finish_in_one(table, round, rows_in, files, took(begun, done))
    }
}

/// The variables of this environment that a command does not inherit.
pub fn withheld(env: &Inherited, secrets: &Secrets) -> Vec<OsString> {
    let named: HashSet<&str> = secrets.names().collect();
    let names = std::env::vars_os().map(|(name, _)| name);
    let mut names: Vec<OsString> = names
        .filter(|name| {
            let text = name.to_string_lossy();
            !env.takes(&text, named.contains(&*text))
        })
        .collect();
    names.sort();
    names
}

/// Starts the program.
fn start(work: &Command<'_>, round: Option<u32>, secrets: &Secrets) -> Result<Child, Failure> {
    let (program, arguments) = work.words.split_first().expect("the plan checked it");
    let mut command = std::process::Command::new(program);
    command
        .args(arguments)
        // The program and its children form a process group, so that they can be killed together.
        .process_group(0)
        .current_dir(work.folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    for name in withheld(work.env, secrets) {
        command.env_remove(name);
    }
    // Variables that were set for this program's libtorch must not affect the one that the command
    // may use.
    if let Ok(names) = std::env::var(SET_HERE) {
        for name in names.split(',').filter(|name| !name.is_empty()) {
            command.env_remove(name);
        }
        command.env_remove(SET_HERE);
    }
    if let Some(round) = round {
        command.env("OVCHAT_ROUND", round.to_string());
    }
    end_with_parent(&mut command);
    command.spawn().map_err(|error| {
        Failure::Other(format!(
            "cannot start `{program}` in {}: {error}",
            work.folder.display()
        ))
    })
}

/// Feeds the program and listens to it.
fn listen(
    child: &mut Child,
    files: Vec<PathBuf>,
    schema: SchemaRef,
    mask: Mask,
) -> Receiver<PipeMessage> {
    let (sender, said) = sync_channel(QUEUE);
    let stdin = child.stdin.take().expect("it is piped");
    let stdout = child.stdout.take().expect("it is piped");
    let stderr = child.stderr.take().expect("it is piped");
    let unread = sender.clone();
    thread::spawn(move || {
        let fed = catch_unwind(AssertUnwindSafe(|| feed(&stdin, files, &schema)));
        let fed = fed.unwrap_or_else(|_| {
            let problem = "cannot read the rows for the command: internal error";
            Err(Failure::Other(problem.to_owned()))
        });
        if let Err(failure) = fed {
            // This must arrive before the program sees the end of its input and takes it for
            // complete.
            drop(unread.send(PipeMessage::Unread(failure)));
        }
    });
    let words = sender.clone();
    thread::spawn(move || {
        lines::each(stderr, &mask, |line| {
            words.send(PipeMessage::Line(line)).is_ok()
        });
    });
    thread::spawn(move || {
        let ended = caught(|| read(stdout, &sender)).unwrap_or_else(|message| {
            Ended::Invalid(format!("wrote an invalid Arrow IPC stream: {message}"))
        });
        // Whoever does not listen any more has ended the program.
        drop(sender.send(PipeMessage::End(ended)));
    });
    said
}

/// Writes the rows of a table as a stream. A program that closes its stdin early is not an error; a
/// table that cannot be read is.
fn feed(stdin: impl Write, files: Vec<PathBuf>, schema: &SchemaRef) -> Result<(), Failure> {
    let Ok(mut writer) = StreamWriter::try_new(stdin, schema) else {
        return Ok(());
    };
    for batch in TableReader::new(files) {
        // Files may have been written before the plan's schema had its metadata.
        let batch = batch?.with_schema(schema.clone()).map_err(|error| {
            Failure::Other(format!("cannot read the rows for the command: {error}"))
        })?;
        if writer.write(&batch).is_err() {
            return Ok(());
        }
    }
    drop(writer.finish());
    Ok(())
}

/// Reads the rows that the program returns, up to the end of its output.
fn read(stdout: impl Read, sender: &SyncSender<PipeMessage>) -> Ended {
    let mut stdout = BufReader::new(stdout);
    if stdout.fill_buf().is_ok_and(<[u8]>::is_empty) {
        return Ended::Cut(format!(
            "wrote nothing to its standard output; even for a table without rows, {CLOSE}"
        ));
    }
    let no_stream = |error| Ended::Invalid(format!("wrote an invalid Arrow IPC stream: {error}"));
    let mut framed = Framed::new(stdout);
    let mut reader = match StreamReader::try_new(&mut framed, None) {
        Ok(reader) => reader,
        Err(error) => {
            return framed
                .refused
                .map_or_else(|| no_stream(error), Ended::Invalid);
        }
    };
    loop {
        let batch = reader.next();
        let framed = reader.get_ref();
        match batch {
            Some(Ok(batch)) => {
                if sender.send(PipeMessage::Rows(batch)).is_err() {
                    return Ended::Whole;
                }
            }
            Some(Err(_)) if framed.is_over => {
                return Ended::Cut(format!(
                    "wrote an Arrow IPC stream that ends inside a batch: {CLOSE}"
                ));
            }
            Some(Err(error)) => {
                let refused = framed.refused.clone();
                return refused.map_or_else(|| no_stream(error), Ended::Invalid);
            }
            // The reader takes an output that ends between two batches for a complete stream.
            None if !framed.is_whole => {
                return Ended::Cut(format!(
                    "wrote an Arrow IPC stream without an end-of-stream marker, so rows may be missing: {CLOSE}"
                ));
            }
            None => break,
        }
    }
    drop(sender.send(PipeMessage::Marker));
    match reader.get_mut().read(&mut [0]) {
        Ok(0) => Ended::Whole,
        Ok(_) => Ended::Invalid(
            "wrote to its standard output after the end of the Arrow IPC stream; write all rows as \
             one stream, and messages to standard error"
                .to_owned(),
        ),
        Err(error) => Ended::Cut(format!("cannot read its standard output: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Int32Array, RecordBatch};

    use super::*;

    /// A stream of two batches, and its schema.
    fn stream() -> (Vec<u8>, SchemaRef) {
        let numbers: ArrayRef = Arc::new(Int32Array::from(vec![1, 2, 3]));
        let batch = RecordBatch::try_from_iter([("number", numbers)]).unwrap();
        let mut writer = StreamWriter::try_new(Vec::new(), &batch.schema()).unwrap();
        writer.write(&batch).unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        (writer.into_inner().unwrap(), batch.schema())
    }

    fn ending(bytes: &[u8]) -> (usize, Ended) {
        let (sender, said) = sync_channel(8);
        let ended = read(bytes, &sender);
        drop(sender);
        let rows = said.iter().map(|said| match said {
            PipeMessage::Rows(batch) => batch.num_rows(),
            _ => 0,
        });
        (rows.sum(), ended)
    }

    #[test]
    fn a_stream_is_whole_with_its_marker_only() {
        let (bytes, _) = stream();
        let marker = bytes.len() - 8;
        assert!(matches!(ending(&bytes), (6, Ended::Whole)));
        // The end-of-stream marker of Arrow before 0.15.
        let legacy = [&bytes[..marker], &[0; 4]].concat();
        assert!(matches!(ending(&legacy), (6, Ended::Whole)));
        for length in 1..bytes.len() {
            let (rows, ended) = ending(&bytes[..length]);
            assert!(
                !matches!(ended, Ended::Whole),
                "{length} bytes, {rows} rows"
            );
        }
        let (rows, ended) = ending(&bytes[..marker]);
        assert_eq!(rows, 6);
        assert!(matches!(ended, Ended::Cut(words) if words.contains("end-of-stream marker")));
    }

    #[test]
    fn what_stands_behind_a_stream_is_not_passed_over() {
        let (bytes, _) = stream();
        for behind in [&bytes[..], b"done\n"] {
            let (rows, ended) = ending(&[&bytes[..], behind].concat());
            assert_eq!(rows, 6);
            assert!(matches!(ended, Ended::Invalid(words) if words.contains("as one stream")));
        }
    }

    #[test]
    fn a_table_that_cannot_be_read_is_not_fed_as_a_shorter_one() {
        let (_, schema) = stream();
        let folder = tempfile::tempdir().unwrap();
        let mut fed = Vec::new();
        let missing = vec![folder.path().join("missing.parquet")];
        let failure = feed(&mut fed, missing, &schema).unwrap_err().to_string();
        assert!(failure.contains("missing.parquet"), "{failure}");
        assert!(matches!(ending(&fed), (0, Ended::Cut(_))));
    }
}
