//! What a run tells of itself while it goes on.

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

/// Takes notice of what a run does. The command line draws bars or lines; tests listen.
pub trait Report {
    fn start(&mut self, start: Start<'_>);
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
