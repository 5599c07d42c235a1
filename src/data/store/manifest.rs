//! The record of what a run made.
//!
//! `manifest.json` is rewritten atomically whenever a stage is done. Between two rewritings each
//! commit is a line in `manifest.<generation>.log`, synced: a run of a million prompts has tens of
//! thousands of parts, and rewriting a list that grows with every part would cost more than the
//! parts. A line that was cut off by a crash never happened. Both have checksums, and the manifest before
//! stays with its log: the two restore one that is damaged.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{StoreError, sealed, sync_folder, write_atomically};

/// The version of the manifest and of the folder's layout. Format 1 names the folder of a round
/// `round=2`, and its files have no column `round`; a run that was begun so goes on so.
const FORMAT: u32 = 2;

/// The manifest before the last rewriting.
pub(super) const PREVIOUS: &str = "manifest.previous.json";

/// A file of the run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Relative to the run's folder.
    pub file: String,
    pub rows: u64,
    pub bytes: u64,
    pub sha256: String,
    /// The CRC-32 of each block of [`super::BLOCK`] bytes; none in runs of earlier versions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub crc32: Vec<u32>,
}

/// One committed part of a table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PartRecord {
    pub part: u32,
    /// Rows of the input that went in.
    pub rows_in: u64,
    pub files: Vec<FileRecord>,
    pub rejects: Vec<FileRecord>,
    /// What a network did for it.
    #[serde(default)]
    pub telemetry: Vec<FileRecord>,
    /// Rejects of class `fault`.
    pub faults: u64,
    /// Rejects of class `dropped`.
    pub dropped: u64,
    /// What it took to make, where that is known.
    #[serde(default)]
    pub took: Option<Took>,
}

/// How long something took, and for how much.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Took {
    pub seconds: f64,
    /// Rows that were computed; others were taken over.
    pub rows: u64,
}

/// What was expected of a table when it was begun.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Expected {
    pub rows: Option<u64>,
    pub seconds: Option<f64>,
}

/// The saved state of a training.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateRecord {
    /// Steps done when it was saved.
    pub step: u64,
    /// The folder of the state, relative to the run's folder.
    pub folder: String,
    /// The files in it, by name, with their sizes.
    pub files: BTreeMap<String, u64>,
}

/// A checkpoint that a training stage wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointRecord {
    /// The name of the model in the pipeline.
    pub model: String,
    /// Relative to the run's folder.
    pub folder: String,
    /// The files in it, by name, with their sizes.
    pub files: BTreeMap<String, u64>,
    /// Their SHA-256; runs of earlier versions have none.
    #[serde(default)]
    pub sha256: BTreeMap<String, String>,
}

/// A table in one round: what decided it and what was made of it so far.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TableVersion {
    pub table: String,
    /// `None` for a static table.
    pub round: Option<u32>,
    pub kind: Option<String>,
    pub key: String,
    /// What the key was hashed from, so that a re-run can be explained.
    pub because: Value,
    /// Groups of input rows per part; a change of the setting applies to the next making only.
    pub part_groups: u32,
    /// Whether the rows of some prompt were not adjacent in the input, so that the parts were cut from
    /// gathered rows. Earlier versions cut such an input wherever the prompt changed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_gathered: bool,
    pub complete: bool,
    /// Of a complete table that was loaded: a digest of its rows. Tables that read it are keyed by
    /// it, so that a file of the user may change as long as its rows do not.
    pub content: Option<String>,
    pub parts: Vec<PartRecord>,
    /// Of a training under way: its saved states, the newest last.
    #[serde(default)]
    pub states: Vec<StateRecord>,
    pub checkpoint: Option<CheckpointRecord>,
    /// What was expected of it when it was begun.
    #[serde(default)]
    pub expected: Expected,
}

impl TableVersion {
    pub fn is(&self, table: &str, round: Option<u32>) -> bool {
        self.table == table && self.round == round
    }

    /// The same training as it was when a state was saved.
    #[must_use]
    pub fn back_at(mut self, state: &StateRecord) -> Self {
        self.states.retain(|other| other.step <= state.step);
        self.parts.retain(|part| u64::from(part.part) < state.step);
        self
    }
}

impl PartRecord {
    /// The files of its rows, and those beside them.
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

    /// The files of its rows, and those beside them.
    pub fn all_files(&self) -> impl Iterator<Item = &FileRecord> {
        self.files().chain(self.rejects()).chain(self.telemetry())
    }

    /// The files of its rows, those beside them and those of its checkpoint, with their SHA-256.
    pub fn hashes(&self) -> impl Iterator<Item = (String, &str)> {
        let files = self.all_files();
        let files = files.map(|file| (file.file.clone(), file.sha256.as_str()));
        let checkpoint = self.checkpoint.iter().flat_map(|checkpoint| {
            let files = checkpoint.sha256.iter();
            files.map(|(name, sha256)| (format!("{}/{name}", checkpoint.folder), sha256.as_str()))
        });
        files.chain(checkpoint)
    }

    /// True for a table that was loaded from a file of the user, and so wants its pictures.
    pub fn is_loaded(&self) -> bool {
        self.round.is_none() && matches!(self.kind.as_deref(), Some("prompt" | "pair"))
    }

    pub fn rows(&self) -> u64 {
        self.files().map(|file| file.rows).sum()
    }

    pub fn bytes(&self) -> u64 {
        self.all_files().map(|file| file.bytes).sum()
    }

    /// What its parts took together; `None` where none says.
    pub fn took(&self) -> Option<Took> {
        let mut parts = self.parts.iter().filter_map(|part| part.took);
        let first = parts.next()?;
        Some(parts.fold(first, |sum, part| Took {
            seconds: sum.seconds + part.seconds,
            rows: sum.rows + part.rows,
        }))
    }
}

/// A run that goes on from another one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fork {
    /// The folder of the other run.
    pub of: PathBuf,
    /// The first round that is this run's own. Those before are taken as they are, whatever the
    /// pipeline says now.
    pub at: u32,
}

/// A superseded table, kept in `.cache` in case its settings come back.
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
        /// A state of the training behind it, and how many of its states stay.
        state: Option<(StateRecord, u32)>,
    },
    /// A table is done. `parts` replaces what was listed (they may have been compacted).
    Finish {
        table: String,
        round: Option<u32>,
        parts: Vec<PartRecord>,
        content: Option<String>,
        checkpoint: Option<CheckpointRecord>,
    },
    /// A new version of a complete table is begun, or goes on.
    Stage(TableVersion),
    /// A staged version is set aside, as far as it got. Its files stay where they are.
    ParkStaged { table: String, round: Option<u32> },
    /// A complete version becomes the table, and the one before is set aside, as are other tables in its
    /// way. The records say where the files of all lie afterwards.
    Replace {
        old: Option<TableVersion>,
        new: TableVersion,
        #[serde(default)]
        others: Vec<TableVersion>,
    },
    /// A table was superseded; its files lie where the record now says.
    Park(TableVersion),
    /// A superseded table is current again.
    Unpark(TableVersion),
    /// New pictures.
    Images(FileRecord),
}

/// Everything the run knows about itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    /// Counts rewritings; the log that continues this manifest carries the same number.
    pub generation: u64,
    /// The name in the pipeline file.
    pub pipeline: String,
    /// The pipeline file that was run last, and the settings as meant.
    pub source: Value,
    pub made: Vec<TableVersion>,
    /// Versions, begun or complete, in whose way complete ones of `made` are. Their files lie below
    /// `.cache/<key>` until they are complete and as expected, and replace the others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub staged: Vec<TableVersion>,
    pub parked: Vec<ArchivedTable>,
    pub images: Vec<FileRecord>,
    /// Where its first rounds come from, if not from here.
    #[serde(default)]
    pub fork: Option<Fork>,
    /// What was wrong with the files of the manifest when it was read, and how it was restored.
    #[serde(skip)]
    pub damage: Option<String>,
    #[serde(skip)]
    folder: PathBuf,
}

impl Manifest {
    /// A manifest of nothing, not yet written.
    pub fn new(folder: &Path, pipeline: &str) -> Self {
        Self {
            format: FORMAT,
            generation: 0,
            pipeline: pipeline.to_owned(),
            source: Value::Null,
            made: Vec::new(),
            staged: Vec::new(),
            parked: Vec::new(),
            images: Vec::new(),
            fork: None,
            damage: None,
            folder: folder.to_owned(),
        }
    }

    /// Reads the manifest in `folder` and what was committed since it was rewritten. A damaged one is
    /// restored, see [`Self::damage`].
    pub fn read(folder: &Path) -> Result<Self, StoreError> {
        loop {
            let mut manifest = match Self::read_sealed(folder, "manifest.json") {
                Ok(manifest) => manifest,
                Err(StoreError::NotARun { .. }) if Self::is_restorable(folder) => {
                    return Self::restored(folder, "it is missing");
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
            // No log yet, or the run's process rewrote the manifest, and removed the log, just now.
            let again = Self::read_sealed(folder, "manifest.json");
            if again.is_ok_and(|again| again.generation == generation) {
                return Ok(manifest);
            }
        }
    }

    /// Reads one file of the manifest, without a log.
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
                "it has format {format}, and this version of pipeline reads formats 1 to {FORMAT}; use the \
                 version that wrote it"
            );
            return Err(StoreError::Manifest { path, problem });
        }
        folder.clone_into(&mut manifest.folder);
        Ok(manifest)
    }

    /// Applies the log of this generation and those after it; false if there is none. What comes behind a
    /// damaged line did not happen: it can't be known what that line changed.
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
                // Only a crash leaves a line without its end, and only as the last one.
                let Some(line) = line.strip_suffix(b"\n") else {
                    break;
                };
                let text = sealed::unseal_line(line);
                let event = text.and_then(|text| serde_json::from_slice(text).ok());
                let Some(event) = event else {
                    self.damage = Some(format!(
                        "{}: line {} is damaged; what was committed there and later is made again",
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

    /// The generations that have a log in `folder`, in order.
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

    /// Writes one commit down, synced; when this returns, it happened.
    pub fn commit(&mut self, event: Event) -> Result<(), StoreError> {
        let path = self.log_path();
        let fresh = !path.exists();
        let line = serde_json::to_vec(&event).expect("events are plain data");
        let mut line = sealed::seal_line(&line);
        line.push(b'\n');
        let mut log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(StoreError::io("write", &path))?;
        let before = log.metadata().map_err(StoreError::io("read", &path))?.len();
        if let Err(error) = log.write_all(&line).and_then(|()| log.sync_all()) {
            // Take a half-written line back, so that the next commit does not continue it.
            let _ = log.set_len(before);
            return Err(StoreError::io("write", &path)(error));
        }
        if fresh {
            sync_folder(&self.folder)?;
        }
        self.apply(event);
        Ok(())
    }

    /// Rewrites `manifest.json` and starts a new log. The file before and its log stay.
    pub fn rewrite(&mut self) -> Result<(), StoreError> {
        let before = self.generation;
        let logs = Self::generations(&self.folder);
        // A log of a later number is what was left of a manifest that was lost.
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
            // So that the one before is whole, too.
            return self.rewrite();
        }
        Ok(())
    }

    /// Gives `manifest.json` a second name, unless it is damaged.
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

    /// Whether a round was made by the run that this one was forked from, and stays as it is.
    pub fn is_kept(&self, round: Option<u32>) -> bool {
        let own = self.fork.as_ref().map_or(0, |fork| fork.at);
        round.is_some_and(|round| round < own)
    }

    /// What was made of a table in a round (`None`: the static table).
    pub fn find(&self, table: &str, round: Option<u32>) -> Option<&TableVersion> {
        self.made.iter().find(|made| made.is(table, round))
    }

    /// The staged version of a table in a round.
    pub fn staged(&self, table: &str, round: Option<u32>) -> Option<&TableVersion> {
        self.staged.iter().find(|made| made.is(table, round))
    }

    /// The version of a table that is being made: the staged one, or the table itself.
    pub fn under_way(&self, table: &str, round: Option<u32>) -> Option<&TableVersion> {
        self.staged(table, round)
            .or_else(|| self.find(table, round))
    }

    fn under_way_mut(&mut self, table: &str, round: Option<u32>) -> Option<&mut TableVersion> {
        let all = self.staged.iter_mut().chain(&mut self.made);
        all.into_iter().find(|made| made.is(table, round))
    }

    /// Every version of a table that has files: current, staged, parked.
    pub fn versions(&self) -> impl Iterator<Item = &TableVersion> {
        let parked = self.parked.iter().map(|parked| &parked.made);
        self.made.iter().chain(&self.staged).chain(parked)
    }

    /// Folders are named `round-2`, and files have a column `round`.
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
            Event::Begin(made) => {
                self.remove(&made.table.clone(), made.round);
                self.made.push(made);
            }
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
        }
    }

    fn remove(&mut self, table: &str, round: Option<u32>) {
        self.made.retain(|made| !made.is(table, round));
    }

    fn archive(&mut self, made: TableVersion) {
        self.forget_archived(&made);
        self.parked.push(ArchivedTable { made });
    }

    fn forget_archived(&mut self, made: &TableVersion) {
        self.parked.retain(|ArchivedTable { made: other }| {
            !(other.is(&made.table, made.round) && other.key == made.key)
        });
    }
}

/// Opens a file for appending and reports whether it could be; used to refuse a folder that can't
/// be written to before any work is done.
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
