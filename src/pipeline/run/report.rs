//! What a run tells of itself while it goes on.

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type};

use crate::config::Secrets;
use crate::stages::TableName;

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Rows,
    Steps,
}

/// A stage that begins or goes on.
pub struct Start<'a> {
    pub table: &'a TableName,
    pub round: Option<u32>,
    pub unit: Unit,
    /// How many there are; unknown for a file that is still being read.
    pub total: Option<u64>,
    /// How many were done by an earlier run.
    pub done: u64,
}

/// Numbers of a table under way, as far as it has them.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Figures {
    /// Of the last optimizer update.
    pub loss: Option<f64>,
    /// Of the last optimizer update.
    pub accuracy: Option<f64>,
    /// Over the rewards that this run has computed or taken over for the table.
    pub mean_reward: Option<f64>,
    /// Rows that went through a training in this run; other work counts them as its progress.
    pub rows: Option<u64>,
}

/// Figures that grow with the table.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) figures: Figures,
    reward_sum: f64,
    reward_count: u64,
}

impl Tally {
    /// Takes in the row of an optimizer update, which read so many rows.
    pub(super) fn step(&mut self, step: &RecordBatch, rows: u64) {
        let last = |name| numbers(step, name)?.into_iter().flatten().last();
        self.figures.loss = last("loss");
        self.figures.accuracy = last("accuracy");
        *self.figures.rows.get_or_insert(0) += rows;
    }

    /// Takes in rows of the table; those without a column `reward` say nothing.
    pub(super) fn rewards(&mut self, rows: &RecordBatch) {
        let Some(rewards) = numbers(rows, "reward") else {
            return;
        };
        for reward in rewards.into_iter().flatten() {
            self.reward_sum += reward;
            self.reward_count += 1;
        }
        if self.reward_count > 0 {
            self.figures.mean_reward = Some(self.reward_sum / self.reward_count as f64);
        }
    }
}

/// The numbers of a column.
fn numbers(rows: &RecordBatch, name: &str) -> Option<Vec<Option<f64>>> {
    let column = rows.column_by_name(name)?;
    if !column.data_type().is_numeric() {
        return None;
    }
    let column = cast(column, &DataType::Float64).ok()?;
    Some(column.as_primitive::<Float64Type>().iter().collect())
}

/// Takes notice of what a run does. The command line draws bars or lines; tests listen.
pub trait Report {
    fn start(&mut self, start: Start<'_>);
    /// The figures of the stage that was started last; before the `progress` that they belong to.
    fn figures(&mut self, _figures: &Figures) {}
    /// Of the stage that was started last, so many are done.
    fn progress(&mut self, done: u64);
    /// A table is done: its rows, and how many were set aside.
    fn finished(
        &mut self,
        table: &TableName,
        round: Option<u32>,
        rows: u64,
        faults: u64,
        dropped: u64,
    );
    /// A table was there already.
    fn reused(&mut self, table: &TableName, round: Option<u32>, rows: u64);
    /// Something worth a line.
    fn note(&mut self, text: &str);
}

/// Tells another report, without the secrets of the pipeline.
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
