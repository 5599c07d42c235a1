//! A running program, and the messages that arrive from it: rows for the table, lines of stderr, and
//! the end of its output.

use std::collections::HashSet;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ExitStatus};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use arrow::array::{Array as _, ArrayRef, AsArray as _, ListArray, RecordBatch, StringArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, SchemaRef};

use crate::config::PlannedStage;
use crate::run::report::{Report, Tally};
use crate::stages::{Command, Failure, TableName};
use ovchat_data::store::{FileRecord, TableWriter};
use ovchat_io::mask::Mask;

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

/// The error for an output that stays open after the program has exited.
const HELD_OPEN: &str = "exited, but a process that it started holds its standard output open without ending \
    the Arrow IPC stream; wait for that process, or redirect its output";

/// A message from the threads that feed the program and read its output.
pub enum PipeMessage {
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
pub enum Ended {
    /// A complete stream, with its end-of-stream marker.
    Whole,
    /// No stream, or one that ends before its end-of-stream marker; the message.
    Cut(String),
    /// Anything other than one stream of the declared columns; the message.
    Invalid(String),
}

/// A running program, as far as its messages have arrived.
pub struct Program<'w> {
    /// The program and its arguments.
    words: &'w [String],
    messages: Receiver<PipeMessage>,
    child: Running,
    last_words: Vec<String>,
    /// True once the end-of-stream marker has arrived.
    is_whole: bool,
    ended: Option<Ended>,
    /// The exit status, and the time of the exit or of the last rows after it.
    exited: Option<(ExitStatus, Instant)>,
}

impl<'w> Program<'w> {
    pub fn new(work: &Command<'w>, child: Running, messages: Receiver<PipeMessage>) -> Self {
        Self {
            words: work.words,
            messages,
            child,
            last_words: Vec::new(),
            is_whole: false,
            ended: None,
            exited: None,
        }
    }

    /// Returns the exit status and the end of the output, once both are known. An output that stays
    /// open for [`LATE_ROWS`] after the exit counts as ended.
    pub fn ending(&mut self) -> Result<Option<(ExitStatus, Ended)>, Failure> {
        if self.exited.is_none() {
            let status = self.child.0.try_wait();
            let failed =
                |error: std::io::Error| Failure::Other(format!("`{}`: {error}", self.words[0]));
            let status = status.map_err(failed)?;
            self.exited = status.map(|status| (status, Instant::now()));
        }
        let Some((status, since)) = self.exited else {
            return Ok(None);
        };
        if self.ended.is_none() && since.elapsed() > LATE_ROWS {
            self.ended = Some(if self.is_whole {
                Ended::Whole
            } else {
                Ended::Cut(HELD_OPEN.to_owned())
            });
        }
        Ok(self.ended.take().map(|ended| (status, ended)))
    }

    /// Waits a moment for the next message, and handles it.
    pub fn hear(&mut self, output: &mut ProgramOutput<'_>) -> Result<(), Failure> {
        let look_every = match (&self.ended, &self.exited) {
            (None, None) => LOOK_EVERY,
            _ => EXIT_LOOK_EVERY,
        };
        match self.messages.recv_timeout(look_every) {
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                // The sender is only dropped without an `End` when the reader thread has panicked.
                let problem = "wrote an Arrow IPC stream that cannot be read".to_owned();
                self.ended.get_or_insert(Ended::Invalid(problem));
                thread::sleep(EXIT_LOOK_EVERY);
            }
            Ok(PipeMessage::Line(line)) => self.keep(line, output),
            Ok(PipeMessage::Unread(failure)) => return Err(failure),
            // The output has failed already.
            Ok(PipeMessage::Rows(_) | PipeMessage::Marker | PipeMessage::End(_))
                if self.ended.is_some() => {}
            Ok(PipeMessage::Marker) => self.is_whole = true,
            Ok(PipeMessage::Rows(batch)) => match fitted(&batch, output.schema) {
                Ok(batch) => {
                    output.add(batch)?;
                    if let Some((_, since)) = &mut self.exited {
                        *since = Instant::now();
                    }
                }
                Err(problem) => self.end_output(Ended::Invalid(problem)),
            },
            Ok(PipeMessage::End(ended)) => self.end_output(ended),
        }
        Ok(())
    }

    /// Records the end of the output, and ends a program that wrote an invalid one: it may keep
    /// writing although nothing reads its output.
    fn end_output(&mut self, ended: Ended) {
        if matches!(ended, Ended::Invalid(_)) {
            self.child.end();
        }
        self.ended = Some(ended);
    }

    /// Waits a little for the last lines of stderr.
    pub fn hear_last_lines(&mut self, output: &mut ProgramOutput<'_>) -> Result<(), Failure> {
        let until = Instant::now() + LATE_LINES;
        let left = || until.saturating_duration_since(Instant::now());
        while let Ok(late) = self.messages.recv_timeout(left()) {
            match late {
                PipeMessage::Line(line) => self.keep(line, output),
                PipeMessage::Unread(failure) => return Err(failure),
                PipeMessage::Rows(_) | PipeMessage::Marker | PipeMessage::End(_) => {}
            }
            if left().is_zero() {
                break;
            }
        }
        Ok(())
    }

    /// Shows a line, and keeps the last [`LAST_WORDS`].
    fn keep(&mut self, line: String, output: &mut ProgramOutput<'_>) {
        output.note(&line);
        self.last_words.push(line);
        if self.last_words.len() > LAST_WORDS {
            self.last_words.remove(0);
        }
    }

    /// Returns the failure of the program, with its last lines; `None` on success.
    pub fn failure(&self, (status, ended): (ExitStatus, Ended)) -> Option<Failure> {
        let problem = problem(ended, status)?;
        let mut words = format!("`{}` {problem}", self.words.join(" "));
        for line in &self.last_words {
            words.push_str("\n  ");
            words.push_str(line);
        }
        Some(Failure::Other(words))
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

/// The running program. On drop, for whatever reason, it is killed together with its process group.
pub struct Running(pub Child);

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

/// The table that a program builds.
pub struct ProgramOutput<'r> {
    table: &'r TableName,
    schema: &'r SchemaRef,
    mask: Mask,
    writer: TableWriter,
    report: &'r mut dyn Report,
    /// The number of rows written.
    done: u64,
    tally: Tally,
}

impl<'r> ProgramOutput<'r> {
    pub fn new(
        stage: &'r PlannedStage,
        mask: Mask,
        writer: TableWriter,
        report: &'r mut dyn Report,
    ) -> Self {
        Self {
            table: &stage.name,
            schema: &stage.schema,
            mask,
            writer,
            report,
            done: 0,
            tally: Tally::default(),
        }
    }

    fn note(&mut self, line: &str) {
        self.report.note(&format!("{}: {line}", self.table));
    }

    /// Writes rows that have the declared columns.
    fn add(&mut self, batch: RecordBatch) -> Result<(), Failure> {
        let batch = masked(batch, &self.mask);
        self.done += batch.num_rows() as u64;
        self.writer.write(&batch)?;
        self.tally.rewards(&batch);
        self.report.figures(&self.tally.figures);
        self.report.progress(self.done);
        Ok(())
    }

    /// Finishes the table's files. Returns the number of rows, and the files.
    pub fn finish(mut self) -> Result<(u64, Vec<FileRecord>), Failure> {
        if self.done == 0 {
            self.writer.write_nothing()?;
        }
        Ok((self.done, self.writer.finish()?))
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
