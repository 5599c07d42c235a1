//! Work of the kind command: a program of the user makes the table.
//!
//! Rows go to it as an Arrow IPC stream and come back as one. It may read all before it writes, write
//! before it read all, or leave rows unread. The stream that comes back is complete when it has its
//! end-of-stream marker: a program that dies between two batches leaves a stream that is valid up to there.

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
use super::{Runner, took};
use crate::config::{PlannedStage, Secrets};
use crate::run::report::Tally;
use crate::run::{Start, Unit};
use crate::stages::{Command, Failure, Inherited};
use ovchat_data::store::TableReader;
use ovchat_io::files::caught;
use ovchat_io::mask::Mask;
use ovchat_models::libtorch::SET_HERE;

/// Between two looks at whether the run was asked to stop.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Between two looks at whether the program has ended, once its rows have, and the other way round.
const EXIT_LOOK_EVERY: Duration = Duration::from_millis(10);

/// For rows that come when the program has ended; something that it started may keep its output open.
const LATE_ROWS: Duration = Duration::from_secs(2);

/// For the last lines of its standard error, which something that it started may keep open.
const LATE_LINES: Duration = Duration::from_secs(1);

/// Lines of its standard error that are repeated when it fails.
const LAST_WORDS: usize = 5;

/// Batches that wait for each other.
const QUEUE: usize = 4;

/// The advice for a program that did not end its stream.
const CLOSE: &str = "close the stream's writer after the last batch (pyarrow: `writer.close()`)";

/// The end of an output that does not end with the program.
const HELD_OPEN: &str = "ended, and something that it has started keeps its standard output open without having \
    ended the Arrow IPC stream; wait for it, or redirect its output";

/// A message of the threads that feed the program and read its output.
enum PipeMessage {
    Rows(RecordBatch),
    /// The end-of-stream marker. The output may go on behind it.
    Marker,
    /// A line of its standard error.
    Line(String),
    /// The end of its standard output.
    End(Ended),
    /// The rows that it was to read could not be read.
    Unread(Failure),
}

/// The end of the program's standard output.
#[derive(Debug)]
enum Ended {
    /// A whole stream, with its end-of-stream marker.
    Whole,
    /// No stream, or one that stops before its end-of-stream marker; in words.
    Cut(String),
    /// Something else than one stream of the declared columns; in words.
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
        // Its exit decides: when it was, or when the last rows came after it.
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
                    // Only a reader that has panicked goes without a word.
                    let problem = "wrote an Arrow IPC stream that can't be read".to_owned();
                    ended.get_or_insert(Ended::Invalid(problem));
                    thread::sleep(EXIT_LOOK_EVERY);
                }
                Ok(PipeMessage::Line(line)) => {
                    self.report.note(&format!("{table}: {line}"));
                    keep(&mut last_words, line);
                }
                Ok(PipeMessage::Unread(failure)) => return Err(failure),
                // It has failed already.
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
                        // It may go on writing what nobody reads.
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

/// Keeps a line with those before it, up to [`LAST_WORDS`].
fn keep(last_words: &mut Vec<String>, line: String) {
    last_words.push(line);
    if last_words.len() > LAST_WORDS {
        last_words.remove(0);
    }
}

/// The failure of a program by its output and its exit status, in words; `None` for a success. A stream
/// that was cut off follows from an exit code, and so the exit code is the one to tell.
fn problem(ended: Ended, status: ExitStatus) -> Option<String> {
    match (ended, status.code()) {
        (Ended::Invalid(problem), _) | (Ended::Cut(problem), Some(0)) => Some(problem),
        (Ended::Whole, Some(0)) => None,
        (_, Some(code)) => Some(format!("ended with exit code {code}")),
        (_, None) => {
            let signal = status.signal().unwrap_or_default();
            Some(format!("was ended by signal {signal}"))
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
    reason = "a program ends with the process that started it only if the kernel is told so between fork and exec"
)]
fn start(work: &Command<'_>, round: Option<u32>, secrets: &Secrets) -> Result<Child, Failure> {
    let (program, arguments) = work.words.split_first().expect("the plan checked it");
    let mut command = std::process::Command::new(program);
    command
        .args(arguments)
        // With what it starts in turn it is a group, which ends together.
        .process_group(0)
        .current_dir(work.folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    for name in withheld(work.env, secrets) {
        command.env_remove(name);
    }
    // What was set for our libtorch is not meant for the one that the program may use.
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
            "`{program}` can't be started in {}: {error}",
            work.folder.display()
        ))
    })
}

/// The program while it runs: ended when it is not wanted any more, whatever the reason, with all that it
/// has started in turn.
struct Running(Child);

impl Running {
    #[expect(
        unsafe_code,
        reason = "the standard library ends single processes only"
    )]
    fn end(&self) {
        // SAFETY: kill touches nothing of this process. It was not waited for, so that the number is its
        // own; or it was, and then the number of its group is still that of what it has started, or nobody's.
        unsafe {
            libc::kill(-self.0.id().cast_signed(), libc::SIGKILL);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
        // It may have ended by itself.
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
            let problem =
                "the rows for the command can't be read: this is a mistake of this program";
            Err(Failure::Other(problem.to_owned()))
        });
        if let Err(failure) = fed {
            // Before the program sees the end of its input, and takes it for all.
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

/// Writes the rows of a table as a stream. A program that wants no more of them is no failure; a table
/// that can't be read is.
fn feed(stdin: impl Write, files: Vec<PathBuf>, schema: &SchemaRef) -> Result<(), Failure> {
    let Ok(mut writer) = StreamWriter::try_new(stdin, schema) else {
        return Ok(());
    };
    for batch in TableReader::new(files) {
        // Files may have been written before the plan's schema had its metadata.
        let batch = batch?.with_schema(schema.clone()).map_err(|error| {
            Failure::Other(format!("the rows for the command can't be read: {error}"))
        })?;
        if writer.write(&batch).is_err() {
            return Ok(());
        }
    }
    drop(writer.finish());
    Ok(())
}

/// Reads the rows that the program makes, up to the end of its output.
fn read(stdout: impl Read, sender: &SyncSender<PipeMessage>) -> Ended {
    let mut stdout = BufReader::new(stdout);
    if stdout.fill_buf().is_ok_and(<[u8]>::is_empty) {
        return Ended::Cut(format!(
            "wrote nothing to its standard output; for a table without rows, {CLOSE}"
        ));
    }
    let no_stream = |error| Ended::Invalid(format!("wrote what is no Arrow IPC stream: {error}"));
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
                    "wrote an Arrow IPC stream that stops inside a batch: {CLOSE}"
                ));
            }
            Some(Err(error)) => {
                let refused = framed.refused.clone();
                return refused.map_or_else(|| no_stream(error), Ended::Invalid);
            }
            // The reader takes an output that ends between two batches for a whole stream.
            None if !framed.is_whole => {
                return Ended::Cut(format!(
                    "wrote an Arrow IPC stream without its end-of-stream marker, and rows may be missing: {CLOSE}"
                ));
            }
            None => break,
        }
    }
    drop(sender.send(PipeMessage::Marker));
    match reader.get_mut().read(&mut [0]) {
        Ok(0) => Ended::Whole,
        Ok(_) => Ended::Invalid(
            "wrote more to its standard output after the end of its Arrow IPC stream; write all rows as \
             one stream, and messages to the standard error"
                .to_owned(),
        ),
        Err(error) => Ended::Cut(format!("its standard output can't be read: {error}")),
    }
}

/// The rows without secret values in their texts: a program may be given one, or read it somewhere.
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

/// A column of texts without secret values.
fn hidden(column: &ArrayRef, mask: &Mask) -> ArrayRef {
    let texts = column.as_string::<i32>();
    let hide = |text: Option<&str>| text.map(|text| mask.hide(text));
    Arc::new(texts.iter().map(hide).collect::<StringArray>())
}

/// The columns that are declared, in their order.
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
            "wrote a column `{}`, which `columns` does not declare; it declares {}",
            other.name(),
            declared.join(", ")
        ));
    }
    let mut names = HashSet::new();
    if let Some(twice) = (found.fields().iter()).find(|field| !names.insert(field.name())) {
        return Err(format!("wrote two columns `{}`", twice.name()));
    }
    let mut columns = Vec::new();
    for field in schema.fields() {
        let Some(column) = batch.column_by_name(field.name()) else {
            return Err(format!(
                "wrote no column `{}`, which `columns` declares",
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
                "wrote `{}` as {}, and `columns` declares {}",
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

    /// A stream of two batches, and where each part of it ends.
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
        // The marker of Arrow before 0.15.
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
