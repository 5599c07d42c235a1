//! The manifest: the record of a run's tables.
//!
//! `manifest.json` is rewritten atomically whenever a stage is done. Between two rewrites each
//! commit is a synced line in `manifest.<generation>.log`: a run of a million prompts has tens of
//! thousands of parts, and rewriting a list that grows with every part would cost more than the
//! parts. A line truncated by a crash was never committed. Manifest and log have checksums, and the
//! previous manifest is kept with its log, so that a corrupt manifest can be restored from the two.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::lease::Lease;
use super::{StoreError, sealed, sync_folder, write_atomically};

/// The version of the manifest and of the folder layout. Format 1 names the folder of a round
/// `round=2`, and its files have no column `round`; a run keeps the format it was created with.
const FORMAT: u32 = 2;

/// The manifest before the last rewrite.
pub(super) const PREVIOUS: &str = "manifest.previous.json";

/// A file of the run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Path relative to the run folder.
    pub file: String,
    pub rows: u64,
    pub bytes: u64,
    pub sha256: String,
    /// The CRC-32 of each block of [`super::BLOCK`] bytes; empty in runs of earlier versions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub crc32: Vec<u32>,
}

/// One committed part of a table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PartRecord {
    pub part: u32,
    /// The number of input rows.
    pub rows_in: u64,
    pub files: Vec<FileRecord>,
    pub rejects: Vec<FileRecord>,
    /// Telemetry of the part.
    #[serde(default)]
    pub telemetry: Vec<FileRecord>,
    /// The number of rejects of class `fault`.
    pub faults: u64,
    /// The number of rejects of class `dropped`.
    pub dropped: u64,
    /// The cost of building it, if known.
    #[serde(default)]
    pub took: Option<Took>,
}

/// The duration of some work, and the number of rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Took {
    pub seconds: f64,
    /// Rows that were computed, without reused ones.
    pub rows: u64,
}

/// The forecast for a table when it was begun.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Expected {
    pub rows: Option<u64>,
    pub seconds: Option<f64>,
}

/// A saved training state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateRecord {
    /// The number of steps done when it was saved.
    pub step: u64,
    /// The folder of the state, relative to the run folder.
    pub folder: String,
    /// The files in it, by name, with their sizes in bytes.
    pub files: BTreeMap<String, u64>,
}

/// A checkpoint that a training stage wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointRecord {
    /// The name of the model in the pipeline.
    pub model: String,
    /// Path relative to the run folder.
    pub folder: String,
    /// The files in it, by name, with their sizes in bytes.
    pub files: BTreeMap<String, u64>,
    /// The SHA-256 of the files; empty in runs of earlier versions.
    #[serde(default)]
    pub sha256: BTreeMap<String, String>,
}

/// A version of a table in one round: its key inputs, and the rows built so far.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TableVersion {
    pub table: String,
    /// `None` for a static table.
    pub round: Option<u32>,
    pub kind: Option<String>,
    pub key: String,
    /// The key inputs, so that a rebuild can be explained.
    pub because: Value,
    /// The number of groups of input rows per part; a change of the setting only applies to the
    /// next table version.
    pub part_groups: u32,
    /// True if the rows of some prompt were not adjacent in the input, so that the parts were cut
    /// from gathered rows. Earlier versions cut such an input wherever the prompt changed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_gathered: bool,
    /// The number of threads of the CPU that its networks compute with. Another process that finishes the
    /// table keeps it, as it affects the last bits of results.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
    /// The number of worker processes that make it; `None` for the run's own process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workers: Option<u32>,
    pub complete: bool,
    /// For a complete table that was loaded: a digest of its rows. Tables that read it are keyed by
    /// the digest, so that a user's file may change as long as its rows do not.
    pub content: Option<String>,
    pub parts: Vec<PartRecord>,
    /// For a training under way: its saved states, newest last.
    #[serde(default)]
    pub states: Vec<StateRecord>,
    pub checkpoint: Option<CheckpointRecord>,
    /// The forecast when it was begun.
    #[serde(default)]
    pub expected: Expected,
}

impl TableVersion {
    pub fn is(&self, table: &str, round: Option<u32>) -> bool {
        self.table == table && self.round == round
    }

    /// Returns the version as it was when a training state was saved.
    #[must_use]
    pub fn back_at(mut self, state: &StateRecord) -> Self {
        self.states.retain(|other| other.step <= state.step);
        self.parts.retain(|part| u64::from(part.part) < state.step);
        self
    }
}

impl PartRecord {
    /// Returns the files of its rows, its rejects and its telemetry.
    pub fn all_files(&self) -> impl Iterator<Item = &FileRecord> {
        self.files
            .iter()
            .chain(&self.rejects)
            .chain(&self.telemetry)
    }
}

impl TableVersion {
    pub fn files(&self) -> impl Iterator<Item = &FileRecord> {
        self.parts.iter().flat_map(|part| &part.files)
    }

    pub fn rejects(&self) -> impl Iterator<Item = &FileRecord> {
        self.parts.iter().flat_map(|part| &part.rejects)
    }

    pub fn telemetry(&self) -> impl Iterator<Item = &FileRecord> {
        self.parts.iter().flat_map(|part| &part.telemetry)
    }

    /// Returns the files of its rows, its rejects and its telemetry.
    pub fn all_files(&self) -> impl Iterator<Item = &FileRecord> {
        self.files().chain(self.rejects()).chain(self.telemetry())
    }

    /// Returns the files of its rows, rejects, telemetry and checkpoint, with their SHA-256.
    pub fn hashes(&self) -> impl Iterator<Item = (String, &str)> {
        let files = self.all_files();
        let files = files.map(|file| (file.file.clone(), file.sha256.as_str()));
        let checkpoint = self.checkpoint.iter().flat_map(|checkpoint| {
            let files = checkpoint.sha256.iter();
            files.map(|(name, sha256)| (format!("{}/{name}", checkpoint.folder), sha256.as_str()))
        });
        files.chain(checkpoint)
    }

    /// True for a table that was loaded from a user's file, and therefore needs its images.
    pub fn is_loaded(&self) -> bool {
        self.round.is_none() && matches!(self.kind.as_deref(), Some("prompt" | "pair"))
    }

    pub fn rows(&self) -> u64 {
        self.files().map(|file| file.rows).sum()
    }

    pub fn bytes(&self) -> u64 {
        self.all_files().map(|file| file.bytes).sum()
    }

    /// Returns the total cost of its parts; `None` if no part has one recorded.
    pub fn took(&self) -> Option<Took> {
        let mut parts = self.parts.iter().filter_map(|part| part.took);
        let first = parts.next()?;
        Some(parts.fold(first, |sum, part| Took {
            seconds: sum.seconds + part.seconds,
            rows: sum.rows + part.rows,
        }))
    }
}

/// The origin of a forked run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fork {
    /// The folder of the original run.
    pub of: PathBuf,
    /// The first round that this run builds itself. Earlier rounds are kept as they are, whatever
    /// the pipeline says now.
    pub at: u32,
}

/// A superseded table, kept in `.cache` in case its settings return.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ArchivedTable {
    pub made: TableVersion,
}

/// One commit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// A table is begun.
    Begin(TableVersion),
    /// A part is done.
    Part {
        table: String,
        round: Option<u32>,
        part: PartRecord,
        /// The training state saved after the part, and the number of states to keep.
        state: Option<(StateRecord, u32)>,
    },
    /// A table is complete. `parts` replaces the listed parts, which may have been compacted.
    Finish {
        table: String,
        round: Option<u32>,
        parts: Vec<PartRecord>,
        content: Option<String>,
        checkpoint: Option<CheckpointRecord>,
    },
    /// A new version of a complete table is begun or resumed.
    Stage(TableVersion),
    /// A staged version is archived in its present state. Its files stay where they are.
    ParkStaged { table: String, round: Option<u32> },
    /// A complete version becomes current; the previous version and other conflicting tables are
    /// archived. The records contain the paths after the moves.
    Replace {
        old: Option<TableVersion>,
        new: TableVersion,
        #[serde(default)]
        others: Vec<TableVersion>,
    },
    /// A table was superseded; the record contains the new paths of its files.
    Park(TableVersion),
    /// An archived table is current again.
    Unpark(TableVersion),
    /// New images.
    Images(FileRecord),
    /// New videos.
    Videos(FileRecord),
}

/// The manifest of a run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    /// The number of rewrites; the log that continues this manifest has the same number.
    pub generation: u64,
    /// The pipeline name in the pipeline file.
    pub pipeline: String,
    /// The pipeline file that was run last, and its effective settings.
    pub source: Value,
    pub made: Vec<TableVersion>,
    /// Versions, begun or complete, that conflict with complete ones of `made`. Their files are
    /// below `.cache/<key>` until they are complete, pass their expectations and replace the
    /// others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub staged: Vec<TableVersion>,
    #[serde(rename = "parked")]
    pub archived: Vec<ArchivedTable>,
    pub images: Vec<FileRecord>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub videos: Vec<FileRecord>,
    /// The origin of its first rounds, for a forked run.
    #[serde(default)]
    pub fork: Option<Fork>,
    /// The problem found in the files of the manifest when it was read, and how it was restored.
    #[serde(skip)]
    pub damage: Option<String>,
    #[serde(skip)]
    folder: PathBuf,
    /// The lease of this process, if the run is on a file system that machines share.
    #[serde(skip)]
    pub(super) guard: Option<Arc<Lease>>,
}

impl Manifest {
    /// Returns the files of the images and of the videos, which no table version owns.
    pub fn media(&self) -> impl Iterator<Item = &FileRecord> {
        self.images.iter().chain(&self.videos)
    }

    /// Creates an empty manifest, not yet written.
    pub fn new(folder: &Path, pipeline: &str) -> Self {
        Self {
            format: FORMAT,
            generation: 0,
            pipeline: pipeline.to_owned(),
            source: Value::Null,
            made: Vec::new(),
            staged: Vec::new(),
            archived: Vec::new(),
            images: Vec::new(),
            videos: Vec::new(),
            fork: None,
            damage: None,
            folder: folder.to_owned(),
            guard: None,
        }
    }

    /// Reads the manifest in `folder` and the commits since its last rewrite. A corrupt manifest is
    /// restored, see [`Self::damage`].
    pub fn read(folder: &Path) -> Result<Self, StoreError> {
        loop {
            let mut manifest = match Self::read_sealed(folder, "manifest.json") {
                Ok(manifest) => manifest,
                Err(StoreError::NotARun { .. }) if Self::is_restorable(folder) => {
                    return Self::restored(folder, "missing");
                }
                Err(StoreError::Damaged { problem, .. }) => {
                    return Self::restored(folder, &problem);
                }
                Err(error) => return Err(error),
            };
            let generation = manifest.generation;
            if manifest.replay_logs()? {
                return Ok(manifest);
            }
            // There is no log yet, or the run's process has just rewritten the manifest and removed
            // the log.
            let again = Self::read_sealed(folder, "manifest.json");
            if again.is_ok_and(|again| again.generation == generation) {
                return Ok(manifest);
            }
        }
    }

    /// Reads one file of the manifest, without its log.
    pub(super) fn read_sealed(folder: &Path, name: &str) -> Result<Self, StoreError> {
        let path = folder.join(name);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(StoreError::NotARun {
                    path: folder.to_owned(),
                    hint: "",
                });
            }
            Err(error) => return Err(StoreError::io("read", &path)(error)),
        };
        let damaged = |problem: String| StoreError::Damaged {
            path: path.clone(),
            problem,
        };
        if let Some(flaw) = sealed::flaw(&text) {
            return Err(damaged(flaw.to_owned()));
        }
        let mut manifest: Self =
            serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        if !(1..=FORMAT).contains(&manifest.format) {
            let format = manifest.format;
            let problem = format!(
                "format {format} is not supported (this version of pipeline reads formats 1 to {FORMAT}); use the \
                 version that wrote it"
            );
            return Err(StoreError::Manifest { path, problem });
        }
        folder.clone_into(&mut manifest.folder);
        Ok(manifest)
    }

    /// Applies the log of this generation and later ones; returns false if there is none. Commits
    /// after a corrupt line are ignored, because the change in that line is unknown.
    pub(super) fn replay_logs(&mut self) -> Result<bool, StoreError> {
        let mut generations = Self::generations(&self.folder);
        generations.retain(|generation| *generation >= self.generation);
        for generation in &generations {
            self.generation = *generation;
            let log = self.log_path();
            let lines = match fs::read(&log) {
                Ok(lines) => lines,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
                Err(error) => return Err(StoreError::io("read", &log)(error)),
            };
            for (number, line) in lines.split_inclusive(|byte| *byte == b'\n').enumerate() {
                // Only a crash leaves an incomplete line, and only as the last one.
                let Some(line) = line.strip_suffix(b"\n") else {
                    break;
                };
                let text = sealed::unseal_line(line);
                let event = text.and_then(|text| serde_json::from_slice(text).ok());
                let Some(event) = event else {
                    self.damage = Some(format!(
                        "{}: line {} is corrupt; later commits are discarded, and what they built is rebuilt",
                        log.display(),
                        number + 1
                    ));
                    return Ok(true);
                };
                self.apply(event);
            }
        }
        Ok(!generations.is_empty())
    }

    /// Returns the generations that have a log in `folder`, in order.
    pub(super) fn generations(folder: &Path) -> Vec<u64> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let number = |name: &str| {
            let number = name.strip_prefix("manifest.")?.strip_suffix(".log")?;
            number.parse().ok()
        };
        let numbers = entries.filter_map(|entry| number(&entry.file_name().to_string_lossy()));
        let mut numbers: Vec<u64> = numbers.collect();
        numbers.sort_unstable();
        numbers
    }

    /// Commits an event: appends it to the log and syncs. The event is durable when this returns.
    pub fn commit(&mut self, event: Event) -> Result<(), StoreError> {
        self.commit_all(vec![event])
    }

    /// Commits events, in order, with one sync.
    pub fn commit_all(&mut self, events: Vec<Event>) -> Result<(), StoreError> {
        self.guard.as_ref().map_or(Ok(()), |lease| lease.check())?;
        let path = self.log_path();
        let fresh = !path.exists();
        let mut lines = Vec::new();
        for event in &events {
            let line = serde_json::to_vec(event).expect("events are plain data");
            lines.extend(sealed::seal_line(&line));
            lines.push(b'\n');
        }
        let mut log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(StoreError::io("write", &path))?;
        let before = log.metadata().map_err(StoreError::io("read", &path))?.len();
        if let Err(error) = log.write_all(&lines).and_then(|()| log.sync_all()) {
            // Remove a half-written line, so that the next commit does not continue it.
            let _ = log.set_len(before);
            return Err(StoreError::io("write", &path)(error));
        }
        if fresh {
            sync_folder(&self.folder)?;
        }
        for event in events {
            self.apply(event);
        }
        Ok(())
    }

    /// Rewrites `manifest.json` and starts a new log. The previous manifest and its log are kept.
    pub fn rewrite(&mut self) -> Result<(), StoreError> {
        self.guard.as_ref().map_or(Ok(()), |lease| lease.check())?;
        let before = self.generation;
        let logs = Self::generations(&self.folder);
        // A log with a later number is a leftover of a lost manifest.
        self.generation = before.max(logs.last().copied().unwrap_or(0)) + 1;
        let text = serde_json::to_vec_pretty(self).expect("a manifest is plain data");
        let written = self.keep_previous().and_then(|()| {
            write_atomically(&self.folder.join("manifest.json"), &sealed::seal(&text))
        });
        if let Err(error) = written {
            self.generation = before;
            return Err(error);
        }
        for generation in logs.into_iter().filter(|generation| *generation < before) {
            let _ = fs::remove_file(self.log_of(generation));
        }
        if self.damage.take().is_some() {
            // Rewrites once more, so that the previous manifest is intact, too.
            return self.rewrite();
        }
        Ok(())
    }

    /// Links `manifest.json` as the previous manifest, unless it is corrupt.
    fn keep_previous(&self) -> Result<(), StoreError> {
        let path = self.folder.join("manifest.json");
        if self.damage.is_some() || !path.exists() {
            return Ok(());
        }
        let previous = self.folder.join(PREVIOUS);
        let hidden = self.folder.join(format!(".new-{PREVIOUS}"));
        let _ = fs::remove_file(&hidden);
        if fs::hard_link(&path, &hidden).is_err() {
            fs::copy(&path, &hidden).map_err(StoreError::io("copy", &path))?;
        }
        fs::rename(&hidden, &previous).map_err(StoreError::io("write", &previous))
    }

    /// True if a round was built by the run that this one was forked from, and is kept as it is.
    pub fn is_kept(&self, round: Option<u32>) -> bool {
        let own = self.fork.as_ref().map_or(0, |fork| fork.at);
        round.is_some_and(|round| round < own)
    }

    /// Returns the current version of a table in a round (`None`: the static table).
    pub fn find(&self, table: &str, round: Option<u32>) -> Option<&TableVersion> {
        self.made.iter().find(|made| made.is(table, round))
    }

    /// Returns the staged version of a table in a round.
    pub fn staged(&self, table: &str, round: Option<u32>) -> Option<&TableVersion> {
        self.staged.iter().find(|made| made.is(table, round))
    }

    /// Returns the version of a table that is being built: the staged one, or the table itself.
    pub fn under_way(&self, table: &str, round: Option<u32>) -> Option<&TableVersion> {
        self.staged(table, round)
            .or_else(|| self.find(table, round))
    }

    fn under_way_mut(&mut self, table: &str, round: Option<u32>) -> Option<&mut TableVersion> {
        let all = self.staged.iter_mut().chain(&mut self.made);
        all.into_iter().find(|made| made.is(table, round))
    }

    /// Returns all table versions that have files: current, staged, archived.
    pub fn versions(&self) -> impl Iterator<Item = &TableVersion> {
        let archived = self.archived.iter().map(|archived| &archived.made);
        self.made.iter().chain(&self.staged).chain(archived)
    }

    /// True if folders are named `round-2` and files have a column `round`.
    pub fn has_round_column(&self) -> bool {
        self.format > 1
    }

    fn log_path(&self) -> PathBuf {
        self.log_of(self.generation)
    }

    fn log_of(&self, generation: u64) -> PathBuf {
        self.folder.join(format!("manifest.{generation}.log"))
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Begin(made) => self.begin(made),
            Event::Part {
                table,
                round,
                part,
                state,
            } => {
                if let Some(made) = self.under_way_mut(&table, round) {
                    made.parts.retain(|other| other.part != part.part);
                    made.parts.push(part);
                    made.parts.sort_by_key(|part| part.part);
                    if let Some((state, kept)) = state {
                        made.states.push(state);
                        let stale = made.states.len().saturating_sub(kept.max(1) as usize);
                        made.states.drain(..stale);
                    }
                }
            }
            Event::Finish {
                table,
                round,
                parts,
                content,
                checkpoint,
            } => {
                if let Some(made) = self.under_way_mut(&table, round) {
                    made.parts = parts;
                    made.content = content;
                    made.checkpoint = checkpoint;
                    made.complete = true;
                    made.states.clear();
                }
            }
            Event::Stage(made) => {
                self.forget_archived(&made);
                self.staged
                    .retain(|other| !other.is(&made.table, made.round));
                self.staged.push(made);
            }
            Event::ParkStaged { table, round } => {
                let staged = self.staged.iter().position(|made| made.is(&table, round));
                if let Some(position) = staged {
                    let made = self.staged.remove(position);
                    self.archive(made);
                }
            }
            Event::Replace { old, new, others } => {
                self.forget_archived(&new);
                self.staged.retain(|made| !made.is(&new.table, new.round));
                let current = self
                    .made
                    .iter()
                    .position(|made| made.is(&new.table, new.round));
                match current {
                    Some(position) => self.made[position] = new,
                    None => self.made.push(new),
                }
                for other in others {
                    self.remove(&other.table.clone(), other.round);
                    self.archive(other);
                }
                if let Some(old) = old {
                    self.archive(old);
                }
            }
            Event::Park(made) => {
                self.remove(&made.table.clone(), made.round);
                self.archive(made);
            }
            Event::Unpark(made) => {
                self.forget_archived(&made);
                self.remove(&made.table.clone(), made.round);
                self.made.push(made);
            }
            Event::Images(file) => self.images.push(file),
            Event::Videos(file) => self.videos.push(file),
        }
    }

    fn begin(&mut self, made: TableVersion) {
        self.remove(&made.table.clone(), made.round);
        self.made.push(made);
    }

    fn remove(&mut self, table: &str, round: Option<u32>) {
        self.made.retain(|made| !made.is(table, round));
    }

    fn archive(&mut self, made: TableVersion) {
        self.forget_archived(&made);
        self.archived.push(ArchivedTable { made });
    }

    fn forget_archived(&mut self, made: &TableVersion) {
        self.archived.retain(|ArchivedTable { made: other }| {
            !(other.is(&made.table, made.round) && other.key == made.key)
        });
    }
}

/// Creates and removes a file in `folder`, to reject a folder without write permission before any
/// work is done.
pub(super) fn probe_writable(folder: &Path) -> Result<(), StoreError> {
    let path = folder.join(".writable");
    File::create(&path).map_err(StoreError::io("write in", folder))?;
    fs::remove_file(&path).map_err(StoreError::io("write in", folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(table: &str) -> TableVersion {
        TableVersion {
            table: table.to_owned(),
            round: Some(1),
            kind: None,
            key: "k".to_owned(),
            because: Value::Null,
            part_groups: 64,
            is_gathered: false,
            threads: None,
            workers: None,
            complete: false,
            content: None,
            parts: Vec::new(),
            states: Vec::new(),
            checkpoint: None,
            expected: Expected::default(),
        }
    }

    fn part(number: u32) -> Event {
        let part = PartRecord {
            part: number,
            rows_in: 1,
            files: Vec::new(),
            rejects: Vec::new(),
            telemetry: Vec::new(),
            faults: 0,
            dropped: 0,
            took: None,
        };
        Event::Part {
            table: "a".to_owned(),
            round: Some(1),
            part,
            state: None,
        }
    }

    #[test]
    fn what_was_committed_is_read_again_and_a_torn_line_never_happened() {
        let folder = tempfile::tempdir().unwrap();
        let mut manifest = Manifest::new(folder.path(), "p");
        manifest.rewrite().unwrap();
        manifest.commit(Event::Begin(made("a"))).unwrap();
        manifest.commit(part(0)).unwrap();
        let log = manifest.log_path();
        let mut torn = fs::read(&log).unwrap();
        torn.extend_from_slice(br#"{"part":{"table":"a","ro"#);
        fs::write(&log, torn).unwrap();
        let read = Manifest::read(folder.path()).unwrap();
        assert_eq!(read.find("a", Some(1)).unwrap().parts.len(), 1);
        assert!(read.find("a", None).is_none());
    }

    #[test]
    fn a_log_of_an_older_generation_is_not_applied_twice() {
        let folder = tempfile::tempdir().unwrap();
        let mut manifest = Manifest::new(folder.path(), "p");
        manifest.rewrite().unwrap();
        manifest.commit(Event::Begin(made("a"))).unwrap();
        let old_log = manifest.log_path();
        let lines = fs::read(&old_log).unwrap();
        manifest.made.clear();
        manifest.rewrite().unwrap();
        fs::write(&old_log, lines).unwrap();
        assert!(Manifest::read(folder.path()).unwrap().made.is_empty());
    }
}
