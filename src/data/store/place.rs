//! Paths of a table's files within a run.

use std::path::PathBuf;

use arrow::datatypes::SchemaRef;

use super::{TableVersion, TableWriter};

/// The paths of the files of one table version.
#[derive(Debug, Clone)]
pub struct Place {
    pub(super) root: PathBuf,
    /// Empty, or `.cache/<key>/` for a staged version.
    pub(super) prefix: String,
    /// `.cache/<key>/`, for files that are moved into place once the version is complete.
    pub(super) hidden: String,
    /// Suffix of the file names of a staged version (`-` and the first digits of its key), so that
    /// a program that opens a file twice never reads half of one version and half of another.
    pub(super) suffix: String,
    pub(super) table: String,
    pub(super) round: Option<u32>,
    /// See [`super::Manifest::has_round_column`].
    pub(super) has_round_column: bool,
}

impl Place {
    /// Returns the folder of the table's rows, relative to the run folder.
    pub fn folder(&self) -> String {
        let folder = table_folder(&self.table, self.round, self.has_round_column);
        format!("{}{folder}", self.prefix)
    }

    /// Returns a writer of `<folder>/<name>.parquet`.
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

    /// Returns a writer of rows of another kind (`rejects`, `telemetry`) that belong to the
    /// table's. These kinds have a column `round` of their own.
    pub fn beside(
        &self,
        kind: &str,
        part: &str,
        schema: &SchemaRef,
        footer: &[(&str, String)],
    ) -> TableWriter {
        let stem = format!("{}-{part}", self.beside_stem(kind));
        TableWriter::new(&self.root, &stem, schema.clone(), footer)
    }

    pub(super) fn beside_stem(&self, kind: &str) -> String {
        let round = self
            .round
            .map_or_else(String::new, |round| format!("-round-{round}"));
        format!("{}{kind}/{}{round}", self.prefix, self.table)
    }

    /// Returns the folder that a checkpoint is written to, relative to the run folder. The folder
    /// is moved to `checkpoints/<name>` when the version it belongs to is complete and current.
    pub fn checkpoint(&self, name: &str) -> String {
        format!("{}checkpoints/{name}", self.hidden)
    }
}

/// Returns the folder of a current table: `rewards/round-2`, or `rewards/round=2` in runs of format
/// 1.
pub(super) fn table_folder(table: &str, round: Option<u32>, has_round_column: bool) -> String {
    match round {
        Some(round) if has_round_column => format!("{table}/round-{round}"),
        Some(round) => format!("{table}/round={round}"),
        None => table.to_owned(),
    }
}

/// Returns the files and folders of a version, relative to the run folder. Saved states are never
/// moved.
pub(super) fn places(made: &TableVersion) -> impl Iterator<Item = &str> {
    let files = made.all_files().map(|file| file.file.as_str());
    let checkpoint = made
        .checkpoint
        .iter()
        .map(|checkpoint| checkpoint.folder.as_str());
    files
        .chain(checkpoint)
        .chain(made.states.iter().map(|state| state.folder.as_str()))
}

/// Returns the name of the folder below `.cache` of a staged or archived version. Static tables
/// have their own folders, because the folder of a static table would contain those of its rounds,
/// possibly under the same key.
pub(super) fn cache_name(made: &TableVersion) -> String {
    match made.round {
        Some(_) => made.key.clone(),
        None => format!("{}.once", made.key),
    }
}

/// Returns the cache folder of a version relative to the run folder, with a trailing slash.
pub(super) fn below_cache(made: &TableVersion) -> String {
    format!(".cache/{}/", cache_name(made))
}

/// Returns the final path of a file of a staged or archived version.
pub(super) fn in_place<'n>(name: &'n str, made: &TableVersion) -> &'n str {
    // Earlier versions used one folder per key.
    let of_key = || name.strip_prefix(&format!(".cache/{}/", made.key));
    let stripped = name.strip_prefix(&below_cache(made)).or_else(of_key);
    stripped.unwrap_or(name)
}

/// Returns the record of a version with its final paths.
pub(super) fn placed(made: TableVersion) -> TableVersion {
    let staged = made.clone();
    relocated(made, |file| in_place(file, &staged).to_owned())
}

/// Returns the record of a version with each path mapped by `name`.
fn relocated(mut made: TableVersion, name: impl Fn(&str) -> String) -> TableVersion {
    for part in &mut made.parts {
        let beside = part.rejects.iter_mut().chain(&mut part.telemetry);
        for file in part.files.iter_mut().chain(beside) {
            file.file = name(&file.file);
        }
    }
    if let Some(checkpoint) = &mut made.checkpoint {
        checkpoint.folder = name(&checkpoint.folder);
    }
    made
}

/// Returns the record of a current version, moved below `.cache/<key>`.
pub(super) fn relocated_below_cache(made: TableVersion) -> TableVersion {
    let below = below_cache(&made);
    relocated(made, |file| format!("{below}{file}"))
}
