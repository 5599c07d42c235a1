//! The folder of a run: opening, committing, superseding, compacting.

use std::fs;
use std::path::{Path, PathBuf};

use arrow::datatypes::SchemaRef;

use super::manifest::probe_writable;
use super::parquet::schema_of_file;
use super::{
    CheckpointRecord, Event, FileRecord, Lock, Made, Manifest, PartRecord, StoreError, TableReader,
    TableWriter, sync_folder,
};

/// Parts are compacted when there are several and a file would hold many of them.
const COMPACT_BELOW_BYTES: u64 = 64 << 20;

/// A run's folder, held by this process (or only read).
pub struct RunFolder {
    root: PathBuf,
    manifest: Manifest,
    _lock: Option<Lock>,
}

impl RunFolder {
    /// Opens the run of the pipeline in `root`, or begins one. Takes the lock, and strikes out what
    /// the manifest lists but the disk no longer has; the tables that lost something are returned.
    pub fn open(root: &Path, pipeline: &str) -> Result<(Self, Vec<String>), StoreError> {
        fs::create_dir_all(root).map_err(StoreError::io("create", root))?;
        probe_writable(root)?;
        let lock = Lock::take(root)?;
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
                let hint = ", and other files; choose an empty folder with --run";
                return Err(StoreError::NotARun { path, hint });
            }
            Err(error) => return Err(error),
        };
        let mut run = Self {
            root: root.to_owned(),
            manifest,
            _lock: Some(lock),
        };
        let lost = run.strike_out_lost()?;
        run.manifest.rewrite()?;
        run.sweep()?;
        Ok((run, lost))
    }

    /// Opens a run to look at it, also while another process works on it.
    pub fn read(root: &Path) -> Result<Self, StoreError> {
        Ok(Self {
            root: root.to_owned(),
            manifest: Manifest::read(root)?,
            _lock: None,
        })
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

    /// Records what was run last, and rewrites the manifest.
    pub fn set_source(&mut self, source: serde_json::Value) -> Result<(), StoreError> {
        self.manifest.source = source;
        self.manifest.rewrite()
    }

    /// The files of a table in a round.
    pub fn files(&self, table: &str, round: Option<u32>) -> Vec<PathBuf> {
        let made = self.manifest.find(table, round);
        made.into_iter()
            .flat_map(Made::files)
            .map(|file| self.root.join(&file.file))
            .collect()
    }

    /// The rows of a table in a round, in order.
    pub fn reader(&self, table: &str, round: Option<u32>) -> TableReader {
        TableReader::new(self.files(table, round))
    }

    /// The schema of a table's files, `None` when it has none.
    pub fn schema(&self, table: &str, round: Option<u32>) -> Result<Option<SchemaRef>, StoreError> {
        self.files(table, round)
            .first()
            .map(|file| schema_of_file(file))
            .transpose()
    }

    /// Where a table's files lie, below the root.
    pub fn table_folder(table: &str, round: Option<u32>) -> String {
        match round {
            Some(round) => format!("{table}/round={round}"),
            None => table.to_owned(),
        }
    }

    /// A folder for what is not part of any table; `.cache` is no reader's business.
    pub fn cache(&self) -> Result<PathBuf, StoreError> {
        let cache = self.root.join(".cache");
        fs::create_dir_all(&cache).map_err(StoreError::io("create", &cache))?;
        Ok(cache)
    }

    /// Moves a table that was superseded into `.cache/<key>`, where readers do not look.
    pub fn park(&mut self, table: &str, round: Option<u32>) -> Result<(), StoreError> {
        let Some(made) = self.manifest.find(table, round).cloned() else {
            return Ok(());
        };
        let below = format!(".cache/{}", made.key);
        let parked = self.relocate(made, |file| format!("{below}/{file}"))?;
        self.commit(Event::Park(parked))
    }

    /// Makes a parked table current again, if one with this key is there.
    pub fn unpark(
        &mut self,
        table: &str,
        round: Option<u32>,
        key: &str,
    ) -> Result<bool, StoreError> {
        let found = self.manifest.parked.iter().map(|parked| &parked.made);
        let mut found =
            found.filter(|made| made.table == table && made.round == round && made.key == key);
        let Some(made) = found.next().cloned() else {
            return Ok(false);
        };
        let below = format!(".cache/{key}/");
        let made = self.relocate(made, |file| {
            file.strip_prefix(&below).unwrap_or(file).to_owned()
        })?;
        self.commit(Event::Unpark(made))?;
        Ok(true)
    }

    /// Ends a table: many small parts become few large files, and the manifest calls it complete.
    pub fn finish(
        &mut self,
        table: &str,
        round: Option<u32>,
        checkpoint: Option<CheckpointRecord>,
    ) -> Result<(), StoreError> {
        let made = self
            .manifest
            .find(table, round)
            .expect("a table that was begun")
            .clone();
        let folder = Self::table_folder(table, round);
        let old: Vec<FileRecord> = made.files().chain(made.rejects()).cloned().collect();
        let files = self.compact(
            &made.files().cloned().collect::<Vec<_>>(),
            &format!("{folder}/all"),
        )?;
        let round_name = round.map_or(String::new(), |round| format!("-round-{round}"));
        let rejects = self.compact(
            &made.rejects().cloned().collect::<Vec<_>>(),
            &format!("rejects/{table}{round_name}"),
        )?;
        let kept: Vec<String> = files
            .iter()
            .chain(&rejects)
            .map(|file| file.file.clone())
            .collect();
        let whole = PartRecord {
            part: 0,
            rows_in: made.parts.iter().map(|part| part.rows_in).sum(),
            files,
            rejects,
            faults: made.parts.iter().map(|part| part.faults).sum(),
            dropped: made.parts.iter().map(|part| part.dropped).sum(),
        };
        let parts = vec![whole];
        self.commit(Event::Finish {
            table: table.to_owned(),
            round,
            parts,
            checkpoint,
        })?;
        self.manifest.rewrite()?;
        for file in old.iter().filter(|file| !kept.contains(&file.file)) {
            let _ = fs::remove_file(self.root.join(&file.file));
        }
        Ok(())
    }

    /// Rewrites small files as few large ones; returns the files to list.
    fn compact(&self, files: &[FileRecord], stem: &str) -> Result<Vec<FileRecord>, StoreError> {
        let bytes: u64 = files.iter().map(|file| file.bytes).sum();
        if files.len() < 2 || bytes / files.len() as u64 >= COMPACT_BELOW_BYTES {
            return Ok(files.to_vec());
        }
        let paths: Vec<PathBuf> = files
            .iter()
            .map(|file| self.root.join(&file.file))
            .collect();
        let schema = schema_of_file(&paths[0])?;
        let mut writer = TableWriter::new(&self.root, stem, schema, &[]);
        for batch in TableReader::new(paths) {
            writer.write(&batch?)?;
        }
        writer.finish()
    }

    /// Moves the files of a table to other names below the root.
    fn relocate(&self, mut made: Made, name: impl Fn(&str) -> String) -> Result<Made, StoreError> {
        let files = made
            .parts
            .iter_mut()
            .flat_map(|part| part.files.iter_mut().chain(&mut part.rejects));
        for file in files {
            let target = name(&file.file);
            self.move_below_root(&file.file, &target)?;
            file.file = target;
        }
        if let Some(checkpoint) = &mut made.checkpoint {
            let target = name(&checkpoint.folder);
            self.move_below_root(&checkpoint.folder, &target)?;
            checkpoint.folder = target;
        }
        Ok(made)
    }

    /// Moves a file or folder. One that has been moved already stays where it is: a crash may have
    /// come between the moves and the commit that records them.
    fn move_below_root(&self, from: &str, to: &str) -> Result<(), StoreError> {
        let (from, to) = (self.root.join(from), self.root.join(to));
        if !from.exists() && to.exists() {
            return Ok(());
        }
        let folder = to.parent().expect("a file in a folder");
        fs::create_dir_all(folder).map_err(StoreError::io("create", folder))?;
        if to.is_dir() {
            fs::remove_dir_all(&to).map_err(StoreError::io("replace", &to))?;
        }
        fs::rename(&from, &to).map_err(StoreError::io("move", &from))?;
        sync_folder(folder)
    }

    /// Removes what a killed process wrote and never committed, so that readers of `**/*.parquet`
    /// see nothing that the manifest doesn't know.
    fn sweep(&self) -> Result<(), StoreError> {
        let listed = self
            .manifest
            .made
            .iter()
            .flat_map(|made| made.files().chain(made.rejects()));
        let listed: std::collections::HashSet<&str> = listed
            .chain(&self.manifest.images)
            .map(|file| file.file.as_str())
            .collect();
        let mut files = Vec::new();
        files_below(&self.root, Path::new(""), &mut files)?;
        for file in files {
            let name = file.to_string_lossy();
            let ours = name.ends_with(".parquet") || name.ends_with(".parquet.new");
            if ours && !listed.contains(&*name) {
                let path = self.root.join(&file);
                fs::remove_file(&path).map_err(StoreError::io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Strikes out what the manifest lists and the disk has not, or has with another size.
    fn strike_out_lost(&mut self) -> Result<Vec<String>, StoreError> {
        let there = |file: &FileRecord| {
            fs::metadata(self.root.join(&file.file))
                .is_ok_and(|metadata| metadata.len() == file.bytes)
        };
        let mut lost = Vec::new();
        let mut kept = Vec::new();
        for made in &self.manifest.made {
            let mut made = made.clone();
            let whole = |part: &PartRecord| part.files.iter().chain(&part.rejects).all(there);
            let checkpoint_there = made
                .checkpoint
                .as_ref()
                .is_none_or(|checkpoint| self.root.join(&checkpoint.folder).is_dir());
            let state_there = made
                .state
                .as_ref()
                .is_none_or(|state| self.root.join(&state.folder).is_dir());
            if made.parts.iter().all(whole) && checkpoint_there && state_there {
                kept.push(made);
                continue;
            }
            lost.push(made.table.clone());
            // A training goes on from a state that matches its steps, or begins again.
            if !made.complete && made.state.is_none() {
                made.parts.retain(whole);
                kept.push(made);
            }
        }
        let images_there = self.manifest.images.iter().all(there);
        self.manifest.made = kept;
        if !images_there {
            // Without its pictures no table can be used; the loading stages bring them back.
            lost.push("images".to_owned());
            self.manifest.images.clear();
            let loads = |made: &Made| {
                made.round.is_none() && matches!(made.kind.as_deref(), Some("prompt" | "pair"))
            };
            self.manifest.made.retain(|made| !loads(made));
        }
        self.manifest
            .parked
            .retain(|parked| parked.made.files().chain(parked.made.rejects()).all(&there));
        Ok(lost)
    }
}

/// The files in and below a folder (links are not ours), relative to `root`; hidden folders and checkpoints left out.
fn files_below(root: &Path, below: &Path, files: &mut Vec<PathBuf>) -> Result<(), StoreError> {
    let folder = root.join(below);
    for entry in fs::read_dir(&folder).map_err(StoreError::io("read", &folder))? {
        let entry = entry.map_err(StoreError::io("read", &folder))?;
        let name = below.join(entry.file_name());
        let kind = entry.file_type().map_err(StoreError::io("read", &folder))?;
        if kind.is_file() {
            files.push(name);
        } else if kind.is_dir()
            && !entry.file_name().to_string_lossy().starts_with('.')
            && name != Path::new("checkpoints")
        {
            files_below(root, &name, files)?;
        }
    }
    Ok(())
}

/// Whether a folder without a manifest may become a run: nothing in it but what a run begun and
/// killed at once leaves.
fn is_fresh(root: &Path) -> Result<bool, StoreError> {
    for entry in fs::read_dir(root).map_err(StoreError::io("read", root))? {
        let entry = entry.map_err(StoreError::io("read", root))?;
        if !entry.file_name().to_string_lossy().starts_with('.') {
            return Ok(false);
        }
    }
    Ok(true)
}
