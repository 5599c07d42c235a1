//! Progress reporting: the events of a run, and the figures of a table in progress.

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type};

use crate::config::Secrets;
use crate::stages::TableName;

/// The unit of a stage's progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Rows,
    Steps,
}

/// A stage that starts or resumes.
pub struct Start<'a> {
    pub table: &'a TableName,
    pub round: Option<u32>,
    pub unit: Unit,
    /// The total; unknown for a file that is still being read.
    pub total: Option<u64>,
    /// The number already done by an earlier run.
    pub done: u64,
}

/// The figures of a table in progress, where available.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Figures {
    /// The loss of the last optimizer update.
    pub loss: Option<f64>,
    /// The accuracy of the last optimizer update.
    pub accuracy: Option<f64>,
    /// The mean of the rewards that this run has computed or reused for the table.
    pub mean_reward: Option<f64>,
    /// The number of rows a training has consumed in this run; other stages count rows as progress.
    pub rows: Option<u64>,
}

/// Figures that are updated as the table grows.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) figures: Figures,
    reward_sum: f64,
    reward_count: u64,
}

impl Tally {
    /// Adds the row of an optimizer update, which consumed `rows` rows.
    pub(super) fn step(&mut self, step: &RecordBatch, rows: u64) {
        let last = |name| numbers(step, name)?.into_iter().flatten().last();
        self.figures.loss = last("loss");
        self.figures.accuracy = last("accuracy");
        *self.figures.rows.get_or_insert(0) += rows;
    }

    /// Adds rows of the table; rows without a column `reward` are ignored.
    pub(super) fn rewards(&mut self, rows: &RecordBatch) {
        let Some(rewards) = numbers(rows, "reward") else {
            return;
        };
        let rewards = rewards.into_iter().flatten();
        let sum = rewards.fold((0.0, 0), |(sum, count), reward| (sum + reward, count + 1));
        self.add(sum);
    }

    /// Adds rewards by their sum and number.
    pub(super) fn add(&mut self, (sum, count): (f64, u64)) {
        self.reward_sum += sum;
        self.reward_count += count;
        if self.reward_count > 0 {
            self.figures.mean_reward = Some(self.reward_sum / self.reward_count as f64);
        }
    }

    /// The sum and the number of the rewards.
    pub(super) fn rewards_so_far(&self) -> (f64, u64) {
        (self.reward_sum, self.reward_count)
    }
}

/// Returns the values of a numeric column; `None` if there is no such column.
fn numbers(rows: &RecordBatch, name: &str) -> Option<Vec<Option<f64>>> {
    let column = rows.column_by_name(name)?;
    if !column.data_type().is_numeric() {
        return None;
    }
    let column = cast(column, &DataType::Float64).ok()?;
    Some(column.as_primitive::<Float64Type>().iter().collect())
}

/// A listener for the events of a run: the command line draws progress bars or log lines, tests
/// record them.
pub trait Report {
    fn start(&mut self, start: Start<'_>);
    /// The figures of the stage that started last; called before the `progress` they belong to.
    fn figures(&mut self, _figures: &Figures) {}
    /// The progress of the stage that started last.
    fn progress(&mut self, done: u64);
    /// A table is complete: its rows, and the numbers of its rejects.
    fn finished(
        &mut self,
        table: &TableName,
        round: Option<u32>,
        rows: u64,
        faults: u64,
        dropped: u64,
    );
    /// A table was up to date.
    fn reused(&mut self, table: &TableName, round: Option<u32>, rows: u64);
    /// A message for the user.
    fn note(&mut self, text: &str);
}

/// A report that masks the pipeline's secrets and forwards to another.
pub(super) struct Masked<'a> {
    pub(super) report: &'a mut dyn Report,
    pub(super) secrets: &'a Secrets,
}

impl Report for Masked<'_> {
    fn start(&mut self, start: Start<'_>) {
        self.report.start(start);
    }

    fn figures(&mut self, figures: &Figures) {
        self.report.figures(figures);
    }

    fn progress(&mut self, done: u64) {
        self.report.progress(done);
    }

    fn finished(
        &mut self,
        table: &TableName,
        round: Option<u32>,
        rows: u64,
        faults: u64,
        dropped: u64,
    ) {
        self.report.finished(table, round, rows, faults, dropped);
    }

    fn reused(&mut self, table: &TableName, round: Option<u32>, rows: u64) {
        self.report.reused(table, round, rows);
    }

    fn note(&mut self, text: &str) {
        self.report.note(&self.secrets.hide(text));
    }
}
