//! The messages between the run and its workers: lines of JSON.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::{PlanTexts, Secrets};
use crate::stages::{Failure, TableName};
use ovchat_data::store::{PartRecord, StoreError, TableVersion};

/// The first line to a worker.
#[derive(Serialize, Deserialize)]
pub struct Begin {
    /// The plan of the run, whatever its files contain by now.
    pub texts: PlanTexts,
    /// The run folder.
    pub folder: PathBuf,
}

/// A line to a worker.
#[derive(Serialize, Deserialize)]
pub enum Order {
    /// The following parts belong to this table.
    Table(Box<TableOrder>),
    Part(Cut),
}

/// A table whose parts are computed by workers.
#[derive(Clone, Serialize, Deserialize)]
pub struct TableOrder {
    pub stage: TableName,
    /// The stage's own table, or one that it needs first.
    pub table: TableName,
    pub round: Option<u32>,
    /// The version, without its parts.
    pub made: TableVersion,
    /// The numbers of its parts that exist.
    pub existing: Vec<u32>,
    /// The key inputs of its rows.
    pub because: Value,
    /// The key and the number of rows of its input. Another machine may still see an older manifest.
    pub input: (String, u64),
    /// The end of the names of its files: those of a process that was given up never replace them.
    pub token: String,
}

/// The rows of the input from which a part is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cut {
    pub part: u32,
    /// The first row, in the order of the groups.
    pub first_row: u64,
    pub rows: u64,
}

/// A line from a worker.
#[derive(Serialize, Deserialize)]
pub enum Reply {
    /// A part is computed from now on.
    Began(u32),
    /// The number of input rows of the part in progress that are done.
    Progress(u64),
    Note(String),
    Part(Box<PartDone>),
    Failed(WorkerFailure),
}

/// A part that was written, but not yet committed.
#[derive(Serialize, Deserialize)]
pub struct PartDone {
    pub record: PartRecord,
    /// The number of input rows.
    pub rows: u64,
    /// The sum and the number of its rewards.
    pub rewards: (f64, u64),
}

/// A part that its workers did not survive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    pub cut: Cut,
    pub reason: String,
}

/// A [`Failure`] of a worker.
#[derive(Debug, Serialize, Deserialize)]
pub struct WorkerFailure {
    message: String,
    /// The file, if it does not match its checksum or is not valid Parquet.
    corrupt: Option<PathBuf>,
}

impl WorkerFailure {
    /// Hides the secrets in its message.
    #[must_use]
    pub fn hide(self, secrets: &Secrets) -> Self {
        Self {
            message: secrets.hide(&self.message),
            ..self
        }
    }
}

impl From<&Failure> for WorkerFailure {
    fn from(failure: &Failure) -> Self {
        let corrupt = match failure {
            Failure::Store(StoreError::Corrupt { path } | StoreError::Parquet { path, .. }) => {
                Some(path.clone())
            }
            _ => None,
        };
        Self {
            message: failure.to_string(),
            corrupt,
        }
    }
}

impl From<WorkerFailure> for Failure {
    fn from(failure: WorkerFailure) -> Self {
        match failure.corrupt {
            Some(path) => Self::Store(StoreError::Corrupt { path }),
            None => Self::Other(failure.message),
        }
    }
}

/// A message of a rank to rank 0 about a table.
#[derive(Serialize, Deserialize)]
pub enum RankReply {
    Part(Box<PartDone>),
    Note(String),
    Lost(Lost),
    Failed(WorkerFailure),
}

/// The key of the end of the run on the board: [`DONE`] or [`FAILED`].
pub const END: &str = "end";
pub const DONE: &[u8] = b"done";
pub const FAILED: &[u8] = b"failed";

/// The key of the number of ranks that have noticed it.
pub const ENDED: &str = "ended";

/// The time between two signs of life of a rank.
pub const BEAT_EVERY: Duration = Duration::from_secs(5);

/// The key of the number of tables that were given out.
pub const TABLES: &str = "tables";

/// The key of the number of starts of ranks other than 0.
pub const STARTS: &str = "starts";
