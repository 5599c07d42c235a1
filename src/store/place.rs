//! The place of a table's files within a run.

use std::path::PathBuf;

use arrow::datatypes::SchemaRef;

use super::{Made, TableWriter};

/// The place of the files of one version of a table.
#[derive(Debug, Clone)]
pub struct Place {
    pub(super) root: PathBuf,
    /// Empty, or `.cache/<key>/` for a staged version.
    pub(super) prefix: String,
    /// Ends the names of a staged version's files (`-` and the first digits of its key), so that a program
    /// that opens a file twice never reads half of one version and half of another.
    pub(super) suffix: String,
    pub(super) table: String,
    pub(super) round: Option<u32>,
    /// See [`super::Manifest::has_round_column`].
    pub(super) has_round_column: bool,
}

impl Place {
    /// The folder of the table's rows, relative to the run's folder.
    pub fn folder(&self) -> String {
        let folder = table_folder(&self.table, self.round, self.has_round_column);
        format!("{}{folder}", self.prefix)
    }

    /// A writer of `<folder>/<name>.parquet`.
    pub fn writer(&self, name: &str, schema: &SchemaRef, footer: &[(&str, String)]) -> TableWriter {
        self.writer_in(&self.folder(), name, schema, footer)
    }

    pub(super) fn writer_in(
        &self,
        folder: &str,
        name: &str,
        schema: &SchemaRef,
        footer: &[(&str, String)],
    ) -> TableWriter {
        let stem = format!("{folder}/{name}{}", self.suffix);
        let round = self.round.filter(|_| self.has_round_column);
        TableWriter::new(&self.root, &stem, schema.clone(), footer).in_round(round)
    }

    /// A writer of rows of another kind (`rejects`, `telemetry`) that belong to the table's. These kinds
    /// have a column `round` of their own.
    pub fn beside(
        &self,
        kind: &str,
        part: u32,
        schema: &SchemaRef,
        footer: &[(&str, String)],
    ) -> TableWriter {
        let stem = format!("{}-{part:05}", self.beside_stem(kind));
        TableWriter::new(&self.root, &stem, schema.clone(), footer)
    }

    pub(super) fn beside_stem(&self, kind: &str) -> String {
        let round = self
            .round
            .map_or_else(String::new, |round| format!("-round-{round}"));
        format!("{}{kind}/{}{round}", self.prefix, self.table)
    }

    /// The folder of a checkpoint, relative to the run's folder.
    pub fn checkpoint(&self, name: &str) -> String {
        format!("{}checkpoints/{name}", self.prefix)
    }
}

/// The folder of a table in its place: `rewards/round-2`, `round=2` in runs of format 1.
pub(super) fn table_folder(table: &str, round: Option<u32>, has_round_column: bool) -> String {
    match round {
        Some(round) if has_round_column => format!("{table}/round-{round}"),
        Some(round) => format!("{table}/round={round}"),
        None => table.to_owned(),
    }
}

/// The files and folders of a version, relative to the run's folder; states stay where they are.
pub(super) fn places(made: &Made) -> impl Iterator<Item = &str> {
    let files = made.all_files().map(|file| file.file.as_str());
    let checkpoint = made
        .checkpoint
        .iter()
        .map(|checkpoint| checkpoint.folder.as_str());
    files
        .chain(checkpoint)
        .chain(made.states.iter().map(|state| state.folder.as_str()))
}
