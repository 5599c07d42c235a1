//! Integrity checks: files are compared with their recorded SHA-256 before anything is built from
//! them, and corrupt files are quarantined and rebuilt.

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::models::Kept;
use super::reconcile::tables_of;
use super::runner::{RunError, Runner};
use crate::config::PlannedStage;
use crate::stages::{Failure, ModelState};
use ovchat_data::store::{CheckpointRecord, FileRecord, StoreError, TableVersion, hash_file};

/// The path of a file, relative to the run folder, and its SHA-256.
fn record(file: &FileRecord) -> (PathBuf, String) {
    (PathBuf::from(&file.file), file.sha256.clone())
}

/// The paths of a checkpoint's files, with their SHA-256.
fn records(checkpoint: &CheckpointRecord) -> impl Iterator<Item = (PathBuf, String)> + '_ {
    let folder = Path::new(&checkpoint.folder);
    let files = checkpoint.sha256.iter();
    files.map(|(name, sha256)| (folder.join(name), sha256.clone()))
}

/// The paths of all files of a version (rows and checkpoint), with their SHA-256.
pub(super) fn all_of(made: &TableVersion) -> impl Iterator<Item = (PathBuf, String)> + '_ {
    let checkpoint = made.checkpoint.iter().flat_map(records);
    made.files().map(record).chain(checkpoint)
}

impl RunError {
    /// Returns the path of the corrupt file, if that is the cause of the failure.
    pub(super) fn corrupt(&self) -> Option<&Path> {
        match &*self.failure {
            Failure::Store(StoreError::Corrupt { path } | StoreError::Parquet { path, .. }) => {
                Some(path)
            }
            _ => None,
        }
    }
}

impl Runner<'_> {
    /// Verifies the checksums of the tables that a stage reads, of existing versions of its own
    /// tables, and of its models' checkpoints: a flipped bit would propagate into everything
    /// downstream. Each file is read once for this.
    pub(super) fn look_at_inputs(
        &mut self,
        stage: &PlannedStage,
        round: Option<u32>,
    ) -> Result<(), Failure> {
        let mut written: Vec<(PathBuf, String)> = Vec::new();
        let manifest = self.folder.manifest();
        for (_, table) in &stage.inputs {
            let made = manifest.find(table.as_str(), self.plan.round_of(table, round));
            written.extend(made.into_iter().flat_map(TableVersion::files).map(record));
        }
        for table in tables_of(stage) {
            let own = manifest.versions();
            let own = own.filter(|made| made.is(table.as_str(), round));
            written.extend(own.flat_map(|made| made.files()).map(record));
        }
        for used in stage.spec.as_stage().uses() {
            if used.state == ModelState::Initial {
                continue;
            }
            for checkpoint in self.checkpoints(stage, used.model, round) {
                written.extend(records(checkpoint));
            }
        }
        written.retain(|file| !self.intact.contains(file));
        let root = self.folder.root();
        written.par_iter().try_for_each(|(file, sha256)| {
            let path = root.join(file);
            if hash_file(&path)? == *sha256 {
                return Ok(());
            }
            Err(StoreError::Corrupt { path })
        })?;
        self.intact.extend(written);
        Ok(())
    }

    /// Verifies the checksums of a stage's own tables. A file whose size, mtime and inode are
    /// unchanged since the last check is not read again.
    pub(super) fn look_at_own(
        &self,
        stage: &PlannedStage,
        round: Option<u32>,
    ) -> Result<(), Failure> {
        let tables = tables_of(stage);
        let manifest = self.folder.manifest();
        let made = tables.iter();
        let made = made.filter_map(|table| manifest.under_way(table.as_str(), round));
        self.look_at(made.flat_map(TableVersion::hashes))
    }

    /// Verifies the checksums of the run's images and videos in the same way.
    pub(super) fn look_at_media(&self) -> Result<(), Failure> {
        let media = self.folder.manifest().media();
        self.look_at(media.map(|file| (file.file.clone(), file.sha256.as_str())))
    }

    fn look_at<'m>(&self, files: impl Iterator<Item = (String, &'m str)>) -> Result<(), Failure> {
        let root = std::path::absolute(self.folder.root());
        let root = root.map_err(StoreError::io("find", self.folder.root()))?;
        let files: Vec<(String, &str)> = files.collect();
        let fingerprints = self.keys.fingerprints();
        let shown = self.folder.root();
        let looked = files.par_iter().try_for_each(|(file, sha256)| {
            let path = root.join(file);
            if fingerprints.file(&path)? == *sha256 {
                return Ok(());
            }
            // The remembered fingerprint may be wrong.
            if hash_file(&path)? == *sha256 {
                fingerprints.note(&path, sha256);
                return Ok(());
            }
            let path = shown.join(file);
            Err(StoreError::Corrupt { path })
        });
        Ok(looked?)
    }

    /// Records the size, mtime and inode of a table's files, which have just been written or
    /// verified.
    pub(super) fn note_stamps(&self, stage: &PlannedStage, round: Option<u32>) {
        let Ok(root) = std::path::absolute(self.folder.root()) else {
            return;
        };
        for table in tables_of(stage) {
            let made = self.folder.manifest().find(table.as_str(), round);
            for (file, sha256) in made.into_iter().flat_map(TableVersion::hashes) {
                self.keys.fingerprints().note(&root.join(file), sha256);
            }
        }
    }

    /// Quarantines a corrupt file, so that the next pass rebuilds it. Returns false if the file is
    /// intact after all: a disk that is temporarily unreadable corrupts nothing.
    pub(super) fn mend(&mut self, corrupt: &Path) -> Result<bool, Failure> {
        // An open model may have been read from it.
        self.kept = Kept::default();
        if let Some(fork) = &self.folder.manifest().fork
            && self.folder.is_of_the_fork(corrupt)
        {
            return Err(Failure::Other(format!(
                "{}: checksum mismatch: the file changed after it was written. It belongs to a round before the \
                 fork, which this run does not rebuild: restore the file from a backup, or fork {} again",
                corrupt.display(),
                fork.of.display()
            )));
        }
        let Some(aside) = self.folder.put_aside(corrupt)? else {
            return Ok(false);
        };
        self.report.note(&format!(
            "{}: checksum mismatch: the file changed after it was written; rebuilding it. The corrupt file \
             was moved to {}",
            corrupt.display(),
            aside.display()
        ));
        Ok(true)
    }
}
