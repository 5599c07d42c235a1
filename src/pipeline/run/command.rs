//! The `command` stage: a user's program produces the table.
//!
//! The program gets rows as an Arrow IPC stream on stdin and returns rows as one on stdout. It may
//! read everything before it writes, write before it has read everything, or leave rows unread. The
//! returned stream is complete once its end-of-stream marker arrives: a program that dies between
//! two batches leaves a stream that is valid up to that point.

mod framing;
mod lines;

use std::collections::HashSet;
use std::ffi::OsString;
use std::io::{BufRead as _, BufReader, Read, Write};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use arrow::array::{Array as _, ArrayRef, AsArray as _, ListArray, RecordBatch, StringArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, SchemaRef};
use arrow_ipc::reader::StreamReader;
use arrow_ipc::writer::StreamWriter;

use self::framing::Framed;
use super::report::{Start, Tally, Unit};
use super::runner::{Runner, took};
use crate::config::{PlannedStage, Secrets};
use crate::stages::{Command, Failure, Inherited};
use ovchat_data::store::TableReader;
use ovchat_io::files::caught;
use ovchat_io::mask::Mask;
use ovchat_models::libtorch::SET_HERE;

/// The interval between checks for an interrupt.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The interval between checks for the program's exit once its output has ended, and for the end of
/// its output once it has exited.
const EXIT_LOOK_EVERY: Duration = Duration::from_millis(10);

/// The time to wait for rows after the program has exited; a child process may hold its output
/// open.
const LATE_ROWS: Duration = Duration::from_secs(2);

/// The time to wait for the last lines of stderr, which a child process may hold open.
const LATE_LINES: Duration = Duration::from_secs(1);

/// The number of last stderr lines that are repeated in a failure.
const LAST_WORDS: usize = 5;

/// The capacity of the queue of batches.
const QUEUE: usize = 4;

/// The advice for a program that did not end its stream.
const CLOSE: &str = "close the stream's writer after the last batch (pyarrow: `writer.close()`)";

/// The error for an output that stays open after the program has exited.
const HELD_OPEN: &str = "exited, but a process that it started holds its standard output open without ending \
    the Arrow IPC stream; wait for that process, or redirect its output";

/// A message from the threads that feed the program and read its output.
enum PipeMessage {
    Rows(RecordBatch),
    /// The end-of-stream marker. More output may follow it.
    Marker,
    /// A line of the program's stderr.
    Line(String),
    /// The end of the program's stdout.
    End(Ended),
    /// Reading the program's input rows failed.
    Unread(Failure),
}

/// The end of the program's stdout.
#[derive(Debug)]
enum Ended {
    /// A complete stream, with its end-of-stream marker.
    Whole,
    /// No stream, or one that ends before its end-of-stream marker; the message.
    Cut(String),
    /// Anything other than one stream of the declared columns; the message.
    Invalid(String),
}

impl Runner<'_> {
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
        let made = self
            .folder
            .manifest()
            .find(work.input.as_str(), input_round);
        let rows_in = made.map_or(0, ovchat_data::store::TableVersion::rows);

        let mut child = Running(start(work, round, &self.plan.secrets)?);
        let mask = self.plan.secrets.mask();
        let said = listen(&mut child.0, files, input_schema, mask.clone());
        let mut writer = self.writer(table, round, "part-00000", &stage.schema);
        let mut done = 0;
        let mut tally = Tally::default();
        let mut last_words: Vec<String> = Vec::new();
        let program = &work.words[0];
        let mut ended = None;
        let mut is_whole = false;
        // Set when the program exits, with the time of the exit or of the last rows after it: its
        // exit status decides.
        let mut exited: Option<(ExitStatus, Instant)> = None;
        let (status, ended) = loop {
            if self.interrupt.raised() {
                return Err(Failure::Interrupted);
            }
            if exited.is_none() {
                let status = child.0.try_wait();
                let failed =
                    |error: std::io::Error| Failure::Other(format!("`{program}`: {error}"));
                exited = status
                    .map_err(failed)?
                    .map(|status| (status, Instant::now()));
            }
            if let Some((status, since)) = exited {
                if let Some(ended) = ended {
                    break (status, ended);
                }
                if since.elapsed() > LATE_ROWS {
                    let ended = if is_whole {
                        Ended::Whole
                    } else {
                        Ended::Cut(HELD_OPEN.to_owned())
                    };
                    break (status, ended);
                }
            }
            let look_every = match (&ended, &exited) {
                (None, None) => LOOK_EVERY,
                _ => EXIT_LOOK_EVERY,
            };
            match said.recv_timeout(look_every) {
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    // The sender is only dropped without an `End` when the reader thread has
                    // panicked.
                    let problem = "wrote an Arrow IPC stream that cannot be read".to_owned();
                    ended.get_or_insert(Ended::Invalid(problem));
                    thread::sleep(EXIT_LOOK_EVERY);
                }
                Ok(PipeMessage::Line(line)) => {
                    self.report.note(&format!("{table}: {line}"));
                    keep(&mut last_words, line);
                }
                Ok(PipeMessage::Unread(failure)) => return Err(failure),
                // The output has failed already.
                Ok(PipeMessage::Rows(_) | PipeMessage::Marker | PipeMessage::End(_))
                    if ended.is_some() => {}
                Ok(PipeMessage::Marker) => is_whole = true,
                Ok(PipeMessage::Rows(batch)) => match fitted(&batch, &stage.schema) {
                    Ok(batch) => {
                        let batch = masked(batch, &mask);
                        done += batch.num_rows() as u64;
                        writer.write(&batch)?;
                        tally.rewards(&batch);
                        self.report.figures(&tally.figures);
                        self.report.progress(done);
                        if let Some((_, since)) = &mut exited {
                            *since = Instant::now();
                        }
                    }
                    Err(problem) => {
                        child.end();
                        ended = Some(Ended::Invalid(problem));
                    }
                },
                Ok(PipeMessage::End(end)) => {
                    if matches!(end, Ended::Invalid(_)) {
                        // It may keep writing although nothing reads its output.
                        child.end();
                    }
                    ended = Some(end);
                }
            }
        };
        let until = Instant::now() + LATE_LINES;
        let left = || until.saturating_duration_since(Instant::now());
        while let Ok(late) = said.recv_timeout(left()) {
            match late {
                PipeMessage::Line(line) => {
                    self.report.note(&format!("{table}: {line}"));
                    keep(&mut last_words, line);
                }
                PipeMessage::Unread(failure) => return Err(failure),
                PipeMessage::Rows(_) | PipeMessage::Marker | PipeMessage::End(_) => {}
            }
            if left().is_zero() {
                break;
            }
        }
        if let Some(problem) = problem(ended, status) {
            let mut words = format!("`{}` {problem}", work.words.join(" "));
            for line in &last_words {
                words.push_str("\n  ");
                words.push_str(line);
            }
            return Err(Failure::Other(words));
        }
        if done == 0 {
            writer.write_nothing()?;
        }
        let files = writer.finish()?;
        self.finish_in_one(table, round, rows_in, files, took(begun, done))
    }
}

/// Appends a line, keeping the last [`LAST_WORDS`].
fn keep(last_words: &mut Vec<String>, line: String) {
    last_words.push(line);
    if last_words.len() > LAST_WORDS {
        last_words.remove(0);
    }
}

/// The error message for a program's output and exit status; `None` on success. A truncated stream
/// is a consequence of a nonzero exit code, so the exit code is reported instead.
fn problem(ended: Ended, status: ExitStatus) -> Option<String> {
    match (ended, status.code()) {
        (Ended::Invalid(problem), _) | (Ended::Cut(problem), Some(0)) => Some(problem),
        (Ended::Whole, Some(0)) => None,
        (_, Some(code)) => Some(format!("exited with code {code}")),
        (_, None) => {
            let signal = status.signal().unwrap_or_default();
            Some(format!("was killed by signal {signal}"))
        }
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
#[expect(
    unsafe_code,
    reason = "PR_SET_PDEATHSIG must be set between fork and exec"
)]
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
    #[cfg(target_os = "linux")]
    // SAFETY: prctl is async-signal-safe, and touches nothing of this process.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    command.spawn().map_err(|error| {
        Failure::Other(format!(
            "cannot start `{program}` in {}: {error}",
            work.folder.display()
        ))
    })
}

/// The running program. On drop, for whatever reason, it is killed together with its process group.
struct Running(Child);

impl Running {
    #[expect(
        unsafe_code,
        reason = "the standard library cannot kill a process group"
    )]
    fn end(&self) {
        // SAFETY: kill touches no memory of this process. If the child has not been waited for, its
        // pid is still its own; if it has, its group id still belongs to its children, or to no
        // process.
        unsafe {
            libc::kill(-self.0.id().cast_signed(), libc::SIGKILL);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
        // It may have exited by itself.
        drop(self.0.wait());
    }
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

/// Masks secret values in the text columns: a program may be given a secret, or read one somewhere.
fn masked(batch: RecordBatch, mask: &Mask) -> RecordBatch {
    if mask.is_empty() {
        return batch;
    }
    let columns = batch.columns().iter();
    let columns = columns.map(|column| match column.data_type() {
        DataType::Utf8 => hidden(column, mask),
        DataType::List(item) if *item.data_type() == DataType::Utf8 => {
            let (item, offsets, texts, nulls) = column.as_list::<i32>().clone().into_parts();
            Arc::new(ListArray::new(item, offsets, hidden(&texts, mask), nulls))
        }
        _ => column.clone(),
    });
    RecordBatch::try_new(batch.schema(), columns.collect()).expect("the types are as before")
}

/// Masks secret values in a text column.
fn hidden(column: &ArrayRef, mask: &Mask) -> ArrayRef {
    let texts = column.as_string::<i32>();
    let hide = |text: Option<&str>| text.map(|text| mask.hide(text));
    Arc::new(texts.iter().map(hide).collect::<StringArray>())
}

/// Returns the declared columns, in their declared order.
fn fitted(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch, String> {
    let found = batch.schema();
    if let Some(other) = found
        .fields()
        .iter()
        .find(|field| schema.field_with_name(field.name()).is_err())
    {
        let declared: Vec<&str> = schema
            .fields()
            .iter()
            .map(|field| field.name().as_str())
            .collect();
        return Err(format!(
            "wrote column `{}`, which is not declared in `columns`; declared columns: {}",
            other.name(),
            declared.join(", ")
        ));
    }
    let mut names = HashSet::new();
    if let Some(twice) = (found.fields().iter()).find(|field| !names.insert(field.name())) {
        return Err(format!("wrote column `{}` twice", twice.name()));
    }
    let mut columns = Vec::new();
    for field in schema.fields() {
        let Some(column) = batch.column_by_name(field.name()) else {
            return Err(format!(
                "wrote no column `{}`, which is declared in `columns`",
                field.name()
            ));
        };
        let is_text = |of: &DataType| matches!(of, DataType::LargeUtf8 | DataType::Utf8View);
        let same = column.data_type() == field.data_type()
            || (*field.data_type() == DataType::Utf8 && is_text(column.data_type()))
            || matches!((column.data_type(), field.data_type()),
                (DataType::List(one), DataType::List(other)) if one.data_type() == other.data_type());
        if !same {
            return Err(format!(
                "wrote `{}` as {}, but `columns` declares {}",
                field.name(),
                column.data_type(),
                field.data_type()
            ));
        }
        columns.push(cast(column, field.data_type()).map_err(|error| error.to_string())?);
    }
    RecordBatch::try_new(schema.clone(), columns).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Int32Array};

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
