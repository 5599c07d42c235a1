//! The record of a complete table version in `.cache/records`, from which a corrupt manifest can be
//! restored.

use serde::{Deserialize, Serialize};

use super::{Fork, TableVersion};

/// The folder of records, relative to the run folder.
pub(super) const RECORDS: &str = ".cache/records";

/// A complete table version with its final paths, and the metadata of its run.
#[derive(Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) format: u32,
    pub(super) pipeline: String,
    pub(super) fork: Option<Fork>,
    pub(super) made: TableVersion,
}

/// Returns the file name of a version's record.
pub(super) fn record_name(made: &TableVersion) -> String {
    let round = made
        .round
        .map_or_else(|| "once".to_owned(), |round| round.to_string());
    format!("{}.{}.{round}.json", made.key, made.table)
}
