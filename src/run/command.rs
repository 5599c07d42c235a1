//! Work of the kind command: a program of the user makes the table.
//!
//! Rows go to it as an Arrow IPC stream and come back as one. It may read all before it writes, write
//! before it read all, or leave rows unread.

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use arrow::array::RecordBatch;
use arrow::compute::cast;
use arrow::datatypes::{DataType, SchemaRef};
use arrow_ipc::reader::StreamReader;
use arrow_ipc::writer::StreamWriter;

use super::{Runner, took};
use crate::config::PlannedStage;
use crate::models::libtorch::SET_HERE;
use crate::run::report::Tally;
use crate::run::{Start, Unit};
use crate::stages::{Command, Failure};
use crate::store::TableReader;

/// Between two looks at whether the run was asked to stop.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Lines of its standard error that are repeated when it fails.
const LAST_WORDS: usize = 5;

/// Batches that wait for each other.
const QUEUE: usize = 4;

/// What the program's streams hold.
enum Said {
    Rows(RecordBatch),
    /// A line of its standard error.
    Line(String),
    /// The rows ended, or could not be read.
    End(Result<(), String>),
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
        let rows_in = made.map_or(0, crate::store::Made::rows);

        let mut child = Running(start(work, round)?);
        let said = listen(&mut child.0, files, input_schema);
        let mut writer = self.writer(table, round, "part-00000", &stage.schema);
        let mut done = 0;
        let mut tally = Tally::default();
        let mut last_words: Vec<String> = Vec::new();
        let program = &work.words[0];
        let ended = loop {
            if self.interrupt.raised() {
                return Err(Failure::Interrupted);
            }
            match said.recv_timeout(LOOK_EVERY) {
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break Ok(()),
                Ok(Said::Line(line)) => {
                    self.report.note(&format!("{table}: {line}"));
                    last_words.push(line);
                    if last_words.len() > LAST_WORDS {
                        last_words.remove(0);
                    }
                }
                Ok(Said::Rows(batch)) => match fitted(&batch, &stage.schema) {
                    Ok(batch) => {
                        done += batch.num_rows() as u64;
                        writer.write(&batch)?;
                        tally.rewards(&batch);
                        self.report.figures(&tally.figures);
                        self.report.progress(done);
                    }
                    Err(problem) => break Err(problem),
                },
                Ok(Said::End(ended)) => break ended,
            }
        };
        if ended.is_err() {
            // It may go on writing what nobody reads.
            child.end();
        }
        let status = child
            .0
            .wait()
            .map_err(|error| Failure::Other(format!("`{program}`: {error}")))?;
        // What it said last may have come behind its rows.
        last_words.extend(said.try_iter().filter_map(|said| match said {
            Said::Line(line) => Some(line),
            _ => None,
        }));
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

/// What was wrong with how it ended, if anything was.
fn problem(rows: Result<(), String>, status: ExitStatus) -> Option<String> {
    match (rows, status.code()) {
        (Err(problem), _) if !problem.is_empty() => Some(problem),
        (_, Some(0)) => None,
        (_, Some(code)) => Some(format!("ended with exit code {code}")),
        (_, None) => {
            let signal = status.signal().unwrap_or_default();
            Some(format!("was ended by signal {signal}"))
        }
    }
}

/// Starts the program.
#[expect(
    unsafe_code,
    reason = "a program ends with the process that started it only if the kernel is told so between fork and exec"
)]
fn start(work: &Command<'_>, round: Option<u32>) -> Result<Child, Failure> {
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
fn listen(child: &mut Child, files: Vec<PathBuf>, schema: SchemaRef) -> Receiver<Said> {
    let (sender, said) = sync_channel(QUEUE);
    let stdin = child.stdin.take().expect("it is piped");
    let stdout = child.stdout.take().expect("it is piped");
    let stderr = child.stderr.take().expect("it is piped");
    thread::spawn(move || feed(stdin, files, &schema));
    let lines = sender.clone();
    thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            if lines.send(Said::Line(line)).is_err() {
                break;
            }
        }
    });
    thread::spawn(move || {
        let ended = read(stdout, &sender);
        // Whoever does not listen any more has ended the program.
        drop(sender.send(Said::End(ended)));
    });
    said
}

/// Writes the rows. A program that wants no more of them is no failure.
fn feed(stdin: ChildStdin, files: Vec<PathBuf>, schema: &SchemaRef) {
    let Ok(mut writer) = StreamWriter::try_new(stdin, schema) else {
        return;
    };
    for batch in TableReader::new(files) {
        let Ok(batch) = batch else {
            return;
        };
        // Files may have been written before the plan's schema had its metadata.
        let Ok(batch) = batch.with_schema(schema.clone()) else {
            return;
        };
        if writer.write(&batch).is_err() {
            return;
        }
    }
    drop(writer.finish());
}

/// Reads the rows that it makes. An empty error: it ended without any.
fn read(stdout: ChildStdout, sender: &SyncSender<Said>) -> Result<(), String> {
    let mut stdout = BufReader::new(stdout);
    if stdout.fill_buf().is_ok_and(<[u8]>::is_empty) {
        return Err(String::new());
    }
    let no_stream = |error| format!("wrote what is no Arrow IPC stream: {error}");
    let reader = StreamReader::try_new(stdout, None).map_err(no_stream)?;
    for batch in reader {
        let batch = batch.map_err(no_stream)?;
        if sender.send(Said::Rows(batch)).is_err() {
            break;
        }
    }
    Ok(())
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
