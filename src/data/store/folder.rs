//! The run folder: opening, committing, archiving, compacting.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use arrow::datatypes::SchemaRef;

use super::manifest::probe_writable;
use super::parquet::schema_of_file;
use super::place::{below_cache, cache_name, places};
use super::record::{RECORDS, record_name};
use super::{
    ArchivedTable, CheckpointRecord, Event, FileRecord, Fork, Lock, Manifest, PartRecord,
    StoreError, TableReader, TableVersion, TableWriter, create_folder, hash_file, write_folder,
};

/// Folders of rows that stages write in addition to their tables.
const BESIDE: [&str; 2] = ["rejects", "telemetry"];

/// Parts are compacted if they are small, both by bytes and by rows: a file of some thousand rows,
/// about a row group, is read as fast as a part of a larger one, and rewriting it costs as much as
/// writing it did.
const COMPACT_BELOW_BYTES: u64 = 64 << 20;
const COMPACT_BELOW_ROWS: u64 = 2048;

/// A run folder, either locked by this process or opened read-only.
pub struct RunFolder {
    pub(super) root: PathBuf,
    pub(super) manifest: Manifest,
    lock: Option<Lock>,
}

/// A file of a table, as read by queries.
#[derive(Debug, Clone)]
pub struct TableFile {
    pub path: PathBuf,
    /// See [`FileRecord::crc32`]; if empty, reads are not verified.
    pub crc32: Vec<u32>,
}

impl From<PathBuf> for TableFile {
    fn from(path: PathBuf) -> Self {
        let crc32 = Vec::new();
        Self { path, crc32 }
    }
}

/// Problems found when a run was opened.
pub struct Opened {
    /// Tables and files that are missing or corrupt, and are rebuilt.
    pub lost: Vec<String>,
    /// See [`Manifest::damage`].
    pub damage: Option<String>,
}

/// See [`RunFolder::put_aside`].
const CORRUPT: &str = "spoiled";

/// See [`RunFolder::calls`].
const CALLS: &str = "calls";

/// Number and interval of a reader's retries on a run whose files are being moved.
const UNSETTLED_LOOKS: u32 = 20;
const UNSETTLED_LOOK_EVERY: Duration = Duration::from_millis(50);

impl RunFolder {
    /// Opens the run of the pipeline in `root`, or creates it. Takes the lock, and removes manifest
    /// entries whose files are missing; the tables that lost files are returned.
    pub fn open(root: &Path, pipeline: &str) -> Result<(Self, Opened), StoreError> {
        Self::open_or_wait(root, pipeline, false, &mut |_| {})
    }

    /// Like [`Self::open`]; for the lock, see [`Lock::take_or_wait`].
    pub fn open_or_wait(
        root: &Path,
        pipeline: &str,
        take_over: bool,
        say: &mut dyn FnMut(&str),
    ) -> Result<(Self, Opened), StoreError> {
        create_folder(root)?;
        let lock = Lock::take_or_wait(root, take_over, say)?;
        probe_writable(root)?;
        let manifest = match Manifest::read(root) {
            Ok(manifest) if manifest.pipeline == pipeline => manifest,
            Ok(manifest) => {
                return Err(StoreError::OtherPipeline {
                    path: root.to_owned(),
                    found: manifest.pipeline,
                    wanted: pipeline.to_owned(),
                });
            }
            Err(StoreError::NotARun { .. }) if is_fresh(root)? => Manifest::new(root, pipeline),
            Err(StoreError::NotARun { path, .. }) => {
                let hint = "; the folder contains other files, choose an empty one with --run";
                return Err(StoreError::NotARun { path, hint });
            }
            Err(error) => return Err(error),
        };
        let mut run = Self {
            root: root.to_owned(),
            manifest,
            lock: Some(lock),
        };
        run.manifest.guard = run.lock.as_ref().and_then(Lock::lease);
        let damage = run.manifest.damage.clone();
        run.finish_moves()?;
        let mut lost = run.strike_out_lost();
        run.manifest.rewrite()?;
        if damage.is_some() {
            // A restored manifest may list files that have changed since.
            let flaws = run.set_flaws_aside()?;
            lost.extend(flaws.into_iter().map(|flaw| flaw.file));
        }
        run.sweep()?;
        run.sweep_cache()?;
        Ok((run, Opened { lost, damage }))
    }

    /// Opens a run read-only, also while another process works on it. Moves that a killed process
    /// committed but did not perform are performed first, if this process has the permissions.
    pub fn read(root: &Path) -> Result<Self, StoreError> {
        let read = || -> Result<Self, StoreError> {
            Ok(Self {
                root: root.to_owned(),
                manifest: Manifest::read(root)?,
                lock: None,
            })
        };
        let mut run = read()?;
        for _ in 0..UNSETTLED_LOOKS {
            if !run.is_unsettled() {
                break;
            }
            if let Some(lock) = Lock::take_now(root) {
                run = read()?;
                let moved = run.finish_moves();
                drop(lock);
                // Without write permission, use the run as it is.
                if moved.is_err() {
                    break;
                }
            } else {
                // The holder of the lock is about to perform them.
                std::thread::sleep(UNSETTLED_LOOK_EVERY);
                run = read()?;
            }
        }
        Ok(run)
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub fn commit(&mut self, event: Event) -> Result<(), StoreError> {
        self.manifest.commit(event)
    }

    /// Commits events with one sync, see [`Manifest::commit_all`].
    pub fn commit_all(&mut self, events: Vec<Event>) -> Result<(), StoreError> {
        self.manifest.commit_all(events)
    }

    /// Records the pipeline that was run last, and rewrites the manifest.
    pub fn set_source(&mut self, source: serde_json::Value) -> Result<(), StoreError> {
        self.manifest.source = source;
        self.manifest.rewrite()
    }

    /// Creates a run in the new folder `to` with the static tables of this run and those of the
    /// rounds before `at`, as hard links if the file system supports them. For `source` see
    /// [`Self::set_source`].
    pub fn fork(&self, to: &Path, at: u32, source: serde_json::Value) -> Result<(), StoreError> {
        write_folder(to, |hidden| {
            create_folder(hidden)?;
            let mut manifest = Manifest::new(hidden, &self.manifest.pipeline);
            manifest.format = self.manifest.format;
            manifest.source = source;
            let of = std::path::absolute(&self.root).unwrap_or_else(|_| self.root.clone());
            manifest.fork = Some(Fork { of, at });
            let made = self.manifest.made.iter();
            let shared = made.filter(|made| made.complete && made.round.is_none_or(|of| of < at));
            for made in shared {
                for file in made.all_files() {
                    link(&self.root, hidden, &file.file)?;
                }
                if let Some(checkpoint) = &made.checkpoint {
                    for name in checkpoint.files.keys() {
                        link(&self.root, hidden, &format!("{}/{name}", checkpoint.folder))?;
                    }
                }
                let record = format!("{RECORDS}/{}", record_name(made));
                if self.root.join(&record).is_file() {
                    link(&self.root, hidden, &record)?;
                }
                manifest.made.push(made.clone());
            }
            for file in self.manifest.media() {
                link(&self.root, hidden, &file.file)?;
            }
            manifest.images.clone_from(&self.manifest.images);
            manifest.videos.clone_from(&self.manifest.videos);
            // Replies that were paid for are reused. Call logs grow, so each run has its own copy.
            let calls = fs::read_dir(self.calls()).into_iter().flatten().flatten();
            for name in calls.map(|entry| entry.file_name()) {
                let copied = hidden.join(CALLS).join(&name);
                create_folder(&hidden.join(CALLS))?;
                fs::copy(self.calls().join(&name), &copied)
                    .map_err(StoreError::io("copy", &copied))?;
            }
            // Avoids reading the user's files again.
            let known = ".cache/fingerprints.json";
            if self.root.join(known).is_file() {
                link(&self.root, hidden, known)?;
            }
            manifest.rewrite()
        })
    }

    /// Removes all archived tables and their files. Returns the removed entries.
    pub fn forget_archived(&mut self) -> Result<Vec<ArchivedTable>, StoreError> {
        let archived = std::mem::take(&mut self.manifest.archived);
        self.manifest.rewrite()?;
        self.sweep_cache()?;
        Ok(archived)
    }

    /// Returns the files of a table in a round.
    pub fn files(&self, table: &str, round: Option<u32>) -> Vec<PathBuf> {
        let files = self.table_files(table, round).into_iter();
        files.map(|file| file.path).collect()
    }

    /// Returns the files of a table in a round with their checksums, for queries.
    pub fn table_files(&self, table: &str, round: Option<u32>) -> Vec<TableFile> {
        let made = self.manifest.find(table, round);
        made.map_or_else(Vec::new, |made| self.checked(made.files()))
    }

    /// Adds paths to files of this run, with their checksums.
    pub fn checked<'f>(&self, files: impl IntoIterator<Item = &'f FileRecord>) -> Vec<TableFile> {
        let checked = files.into_iter().map(|file| TableFile {
            path: self.root.join(&file.file),
            crc32: file.crc32.clone(),
        });
        checked.collect()
    }

    /// Returns a reader of the rows of a table in a round, in order.
    pub fn reader(&self, table: &str, round: Option<u32>) -> TableReader {
        TableReader::new(self.files(table, round))
    }

    /// Returns the schema of a table's files, or `None` if it has none.
    pub fn schema(&self, table: &str, round: Option<u32>) -> Result<Option<SchemaRef>, StoreError> {
        self.files(table, round)
            .first()
            .map(|file| schema_of_file(file))
            .transpose()
    }

    /// Returns the folder of the call logs of models behind endpoints.
    pub fn calls(&self) -> PathBuf {
        self.root.join(CALLS)
    }

    /// Returns the folder `.cache`, for files that are not part of any table and not meant for
    /// readers.
    pub fn cache(&self) -> Result<PathBuf, StoreError> {
        let cache = self.root.join(".cache");
        create_folder(&cache)?;
        Ok(cache)
    }

    /// Moves a corrupt file to a folder that readers ignore, and removes the table parts it
    /// belonged to from the manifest. Returns the new path, or `None` if the run does not list the
    /// file or the file is intact. An unreadable file is not known to be corrupt: that is an error.
    pub fn put_aside(&mut self, corrupt: &Path) -> Result<Option<PathBuf>, StoreError> {
        let Ok(name) = corrupt.strip_prefix(&self.root) else {
            return Ok(None);
        };
        let Some(sha256) = self.sha256(&name.to_string_lossy()) else {
            return Ok(None);
        };
        if hash_file(corrupt)? == sha256 {
            return Ok(None);
        }
        let aside = format!("{CORRUPT}/{}.{CORRUPT}", name.display());
        let aside = self.root.join(aside);
        create_folder(aside.parent().expect("a file in a folder"))?;
        fs::rename(corrupt, &aside).map_err(StoreError::io("move", corrupt))?;
        self.strike_out_lost();
        self.manifest.rewrite()?;
        Ok(Some(aside))
    }

    /// Returns the SHA-256 of a file listed in the manifest.
    fn sha256(&self, name: &str) -> Option<String> {
        let made: Vec<&TableVersion> = self.manifest.versions().collect();
        let files = made.iter().flat_map(|made| made.all_files());
        let mut files = files.chain(self.manifest.media());
        if let Some(file) = files.find(|file| file.file == name) {
            return Some(file.sha256.clone());
        }
        let mut checkpoints = made.iter().filter_map(|made| made.checkpoint.as_ref());
        checkpoints.find_map(|checkpoint| {
            let file = name.strip_prefix(&checkpoint.folder)?.strip_prefix('/')?;
            checkpoint.sha256.get(file).cloned()
        })
    }

    /// True if a file belongs to a round that a fork took over and does not build itself.
    pub fn is_of_the_fork(&self, file: &Path) -> bool {
        let Ok(name) = file.strip_prefix(&self.root) else {
            return false;
        };
        let name = name.to_string_lossy();
        let mut kept = self.manifest.made.iter();
        kept.any(|made| {
            let mut files = made.all_files();
            let checkpoint = made.checkpoint.as_ref();
            let is_of = files.any(|file| file.file == name)
                || checkpoint.is_some_and(|one| Path::new(&*name).starts_with(&one.folder));
            is_of && self.manifest.is_kept(made.round)
        })
    }

    /// Completes a table: compacts many small parts into a few large files, and marks the table
    /// complete in the manifest. A staged version stays staged until [`Self::replace_by_staged`].
    pub fn finish(
        &mut self,
        table: &str,
        round: Option<u32>,
        content: Option<String>,
        checkpoint: Option<CheckpointRecord>,
        footer: &[(&str, String)],
    ) -> Result<(), StoreError> {
        let made = self.manifest.under_way(table, round);
        let made = made.expect("a table under way").clone();
        let place = self.place(table, round);
        let old: Vec<FileRecord> = made.all_files().cloned().collect();
        // Rows are compacted in `.cache`, so that no reader sees them twice.
        let hidden = below_cache(&made);
        let folder = self.table_folder(table, round);
        let files: Vec<FileRecord> = made.files().cloned().collect();
        let mut files = self.compact(&files, |schema| {
            place.writer_in(&format!("{hidden}{folder}"), "all", schema, footer)
        })?;
        let mut checkpoint = checkpoint;
        if self.manifest.staged(table, round).is_none() {
            let files = files.iter_mut().map(|file| &mut file.file);
            for name in files.chain(checkpoint.iter_mut().map(|one| &mut one.folder)) {
                if let Some(in_place) = name.strip_prefix(&hidden) {
                    *name = in_place.to_owned();
                }
            }
        }
        let beside = |kind: &str, files: Vec<FileRecord>| {
            let stem = place.beside_stem(kind);
            self.compact(&files, |schema| {
                TableWriter::new(&self.root, &stem, schema.clone(), footer)
            })
        };
        let rejects = beside("rejects", made.rejects().cloned().collect())?;
        let telemetry = beside("telemetry", made.telemetry().cloned().collect())?;
        let whole = PartRecord {
            part: 0,
            rows_in: made.parts.iter().map(|part| part.rows_in).sum(),
            files,
            rejects,
            telemetry,
            faults: made.parts.iter().map(|part| part.faults).sum(),
            dropped: made.parts.iter().map(|part| part.dropped).sum(),
            took: made.took(),
        };
        let kept: Vec<String> = whole.all_files().map(|file| file.file.clone()).collect();
        let parts = vec![whole];
        self.commit(Event::Finish {
            table: table.to_owned(),
            round,
            parts,
            content,
            checkpoint: checkpoint.clone(),
        })?;
        if self.manifest.staged(table, round).is_none() {
            self.put_in_place(&made, checkpoint.as_ref())?;
        }
        for file in old.iter().filter(|file| !kept.contains(&file.file)) {
            let _ = fs::remove_file(self.root.join(&file.file));
        }
        self.write_record(table, round)?;
        self.manifest.rewrite()
    }

    /// Rewrites small files as a few large ones, and returns the files to list.
    fn compact(
        &self,
        files: &[FileRecord],
        writer: impl FnOnce(&SchemaRef) -> TableWriter,
    ) -> Result<Vec<FileRecord>, StoreError> {
        let count = files.len() as u64;
        let bytes: u64 = files.iter().map(|file| file.bytes).sum();
        let rows: u64 = files.iter().map(|file| file.rows).sum();
        let is_large = |sum: u64, bound: u64| sum >= bound * count;
        if count < 2 || is_large(bytes, COMPACT_BELOW_BYTES) || is_large(rows, COMPACT_BELOW_ROWS) {
            return Ok(files.to_vec());
        }
        let paths: Vec<PathBuf> = files
            .iter()
            .map(|file| self.root.join(&file.file))
            .collect();
        let mut writer = writer(&schema_of_file(&paths[0])?);
        for batch in TableReader::new(paths) {
            writer.write(&batch?)?;
        }
        writer.finish()
    }

    /// Removes files that a killed process wrote but never committed, so that readers of
    /// `**/*.parquet` only see files listed in the manifest. Affects only files with names of this
    /// program, in its own folders.
    fn sweep(&self) -> Result<(), StoreError> {
        let versions = || self.manifest.versions();
        let listed = versions().flat_map(TableVersion::all_files);
        let listed: HashSet<&str> = listed
            .chain(self.manifest.media())
            .map(|file| file.file.as_str())
            .collect();
        let mut folders: HashSet<String> = versions()
            .map(|made| self.table_folder(&made.table, made.round))
            .collect();
        folders.extend(["images", "videos"].map(str::to_owned));
        folders.extend(BESIDE.map(str::to_owned));
        for made in &self.manifest.staged {
            let below = |folder: &str| format!("{}{folder}", below_cache(made));
            folders.insert(below(&self.table_folder(&made.table, made.round)));
            folders.extend(BESIDE.map(below));
        }
        for folder in folders {
            let Ok(entries) = fs::read_dir(self.root.join(&folder)) else {
                continue;
            };
            for entry in entries {
                let entry = entry.map_err(StoreError::io("read", &self.root))?;
                let name = entry.file_name().to_string_lossy().into_owned();
                let ours = name.starts_with("part-")
                    || name.starts_with("all")
                    || BESIDE.iter().any(|beside| folder.ends_with(beside));
                let ours = ours && (name.ends_with(".parquet") || name.ends_with(".parquet.new"));
                let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
                if ours && is_file && !listed.contains(format!("{folder}/{name}").as_str()) {
                    fs::remove_file(entry.path())
                        .map_err(StoreError::io("remove", &entry.path()))?;
                }
            }
        }
        Ok(())
    }

    /// Removes entries of `.cache` that no record refers to: states of finished trainings, folders
    /// of queries, and half-written states of a killed process.
    fn sweep_cache(&self) -> Result<(), StoreError> {
        let versions = self.manifest.versions();
        let mut named: HashSet<&str> = versions
            .flat_map(places)
            .filter_map(|name| name.strip_prefix(".cache/")?.split('/').next())
            .collect();
        let staged: Vec<String> = self.manifest.staged.iter().map(cache_name).collect();
        named.extend(staged.iter().map(String::as_str));
        let cache = self.cache()?;
        let records: HashSet<String> = self.manifest.versions().map(record_name).collect();
        let stale = fs::read_dir(self.root.join(RECORDS)).into_iter().flatten();
        for entry in stale.flatten() {
            if !records.contains(&*entry.file_name().to_string_lossy()) {
                let _ = fs::remove_file(entry.path());
            }
        }
        named.extend(
            Path::new(RECORDS)
                .file_name()
                .and_then(|name| name.to_str()),
        );
        for entry in fs::read_dir(&cache).map_err(StoreError::io("read", &cache))? {
            let entry = entry.map_err(StoreError::io("read", &cache))?;
            let path = entry.path();
            if path.is_dir() && !named.contains(&*entry.file_name().to_string_lossy()) {
                fs::remove_dir_all(&path).map_err(StoreError::io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Removes manifest entries whose files are missing or differ in size. Returns the names of the
    /// affected tables.
    pub(super) fn strike_out_lost(&mut self) -> Vec<String> {
        let has_size = |name: &str, bytes: u64| {
            fs::metadata(self.root.join(name)).is_ok_and(|metadata| metadata.len() == bytes)
        };
        let there = |file: &FileRecord| has_size(&file.file, file.bytes);
        let folder_there = |folder: &str, files: &BTreeMap<String, u64>| {
            files
                .iter()
                .all(|(name, bytes)| has_size(&format!("{folder}/{name}"), *bytes))
        };
        let whole = |part: &PartRecord| part.all_files().all(&there);
        let folders_there = |made: &TableVersion| {
            let mut checkpoint = made.checkpoint.iter();
            let mut states = made.states.iter();
            checkpoint.all(|checkpoint| folder_there(&checkpoint.folder, &checkpoint.files))
                && states.all(|state| folder_there(&state.folder, &state.files))
        };
        let mut lost = Vec::new();
        let mut survivor = |made: &TableVersion| {
            if made.parts.iter().all(&whole) && folders_there(made) {
                return Some(made.clone());
            }
            lost.push(made.table.clone());
            if made.complete {
                return None;
            }
            let mut made = made.clone();
            if made.states.is_empty() {
                made.parts.retain(&whole);
                return Some(made);
            }
            // Training resumes from the newest state that is intact, along with the steps before
            // it, or starts over.
            made.states
                .retain(|state| folder_there(&state.folder, &state.files));
            let newest = made.states.last().cloned()?;
            let made = made.back_at(&newest);
            made.parts.iter().all(&whole).then_some(made)
        };
        let mut kept: Vec<TableVersion> = self
            .manifest
            .made
            .iter()
            .filter_map(&mut survivor)
            .collect();
        let mut staged: Vec<TableVersion> = self
            .manifest
            .staged
            .iter()
            .filter_map(&mut survivor)
            .collect();
        let images_there = self.manifest.images.iter().all(&there);
        if !self.manifest.videos.iter().all(&there) {
            lost.push("videos".to_owned());
            self.manifest.videos.clear();
        }
        let mut archived = self.manifest.archived.clone();
        archived.retain(|archived| {
            archived.made.parts.iter().all(&whole) && folders_there(&archived.made)
        });
        if !images_there {
            // No table can be used without its images; the loading stages restore them.
            lost.push("images".to_owned());
            kept.retain(|made| !made.is_loaded());
            staged.retain(|made| !made.is_loaded());
            archived.retain(|archived| !archived.made.is_loaded());
            self.manifest.images.clear();
        }
        self.manifest.made = kept;
        self.manifest.staged = staged;
        self.manifest.archived = archived;
        lost
    }
}

/// Hard-links a file of one run into another, or copies it.
fn link(from: &Path, to: &Path, name: &str) -> Result<(), StoreError> {
    let (from, to) = (from.join(name), to.join(name));
    create_folder(to.parent().expect("a file in a folder"))?;
    if fs::hard_link(&from, &to).is_err() {
        fs::copy(&from, &to).map_err(StoreError::io("copy", &from))?;
    }
    Ok(())
}

/// Returns the files in a folder and its subfolders, with their sizes, for the manifest.
pub fn files_in(folder: &Path) -> Result<BTreeMap<String, u64>, StoreError> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(StoreError::io("read", folder))? {
        let entry = entry.map_err(StoreError::io("read", folder))?;
        let metadata = entry.metadata().map_err(StoreError::io("read", folder))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if metadata.is_dir() {
            let below = files_in(&entry.path())?.into_iter();
            files.extend(below.map(|(file, bytes)| (format!("{name}/{file}"), bytes)));
        } else {
            files.insert(name, metadata.len());
        }
    }
    Ok(files)
}

/// True if a folder without a manifest may become a run: it contains nothing but leftovers of a run
/// that was killed right after its start.
fn is_fresh(root: &Path) -> Result<bool, StoreError> {
    for entry in fs::read_dir(root).map_err(StoreError::io("read", root))? {
        let entry = entry.map_err(StoreError::io("read", root))?;
        if !entry.file_name().to_string_lossy().starts_with('.') {
            return Ok(false);
        }
    }
    Ok(true)
}
