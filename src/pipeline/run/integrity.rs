//! What is read is what was written: files are compared with their SHA-256 before anything is made from
//! them, and what is something else is put aside and made again.

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::models::Kept;
use super::reconcile::tables_of;
use super::{RunError, Runner};
use crate::config::PlannedStage;
use crate::stages::{Failure, ModelState};
use ovchat_data::store::{CheckpointRecord, FileRecord, StoreError, TableVersion, hash_file};

/// A file, below the run's folder, and its SHA-256.
fn record(file: &FileRecord) -> (PathBuf, String) {
    (PathBuf::from(&file.file), file.sha256.clone())
}

/// The files of a checkpoint, likewise.
fn records(checkpoint: &CheckpointRecord) -> impl Iterator<Item = (PathBuf, String)> + '_ {
    let folder = Path::new(&checkpoint.folder);
    let files = checkpoint.sha256.iter();
    files.map(|(name, sha256)| (folder.join(name), sha256.clone()))
}

/// The files of a version's rows and of its checkpoint, likewise.
pub(super) fn all_of(made: &TableVersion) -> impl Iterator<Item = (PathBuf, String)> + '_ {
    let checkpoint = made.checkpoint.iter().flat_map(records);
    made.files().map(record).chain(checkpoint)
}

impl RunError {
    /// The file that was not what was written, if that is what went wrong.
    pub(super) fn spoiled(&self) -> Option<&Path> {
        match &*self.failure {
            Failure::Store(StoreError::Spoiled { path } | StoreError::Parquet { path, .. }) => {
                Some(path)
            }
            _ => None,
        }
    }
}

impl Runner<'_> {
    /// Sees to it that the tables which a stage reads, what there is of its own, and the checkpoints of
    /// its models are what was written: a bit that a disk has turned over would go into everything behind
    /// it. Each file is read once for that.
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
        written.retain(|file| !self.sound.contains(file));
        let root = self.folder.root();
        written.par_iter().try_for_each(|(file, sha256)| {
            let path = root.join(file);
            if hash_file(&path)? == *sha256 {
                return Ok(());
            }
            Err(StoreError::Spoiled { path })
        })?;
        self.sound.extend(written);
        Ok(())
    }

    /// Sees to it that what there is of a stage's own tables is what was written. A file whose size, time
    /// and inode are those of the last look is not read again.
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

    /// The same for the run's images.
    pub(super) fn look_at_images(&self) -> Result<(), Failure> {
        let images = self.folder.manifest().images.iter();
        self.look_at(images.map(|file| (file.file.clone(), file.sha256.as_str())))
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
            // What is remembered may be wrong.
            if hash_file(&path)? == *sha256 {
                fingerprints.note(&path, sha256);
                return Ok(());
            }
            let path = shown.join(file);
            Err(StoreError::Spoiled { path })
        });
        Ok(looked?)
    }

    /// Notes the size, time and inode of a table's files, which have just been written or looked at.
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

    /// Puts a file aside that is not what was written, so that the next time through makes it again.
    /// Returns whether it is so: a disk that can't be read just now spoils nothing.
    pub(super) fn mend(&mut self, spoiled: &Path) -> Result<bool, Failure> {
        // A model that is open may have been read from it.
        self.kept = Kept::default();
        if let Some(fork) = &self.folder.manifest().fork
            && self.folder.is_of_the_fork(spoiled)
        {
            return Err(Failure::Other(format!(
                "{} is not what was written; a disk or another program has changed it. It is of a round before \
                 the fork, which this run does not make: put it back as it was, or fork {} again, of which it comes",
                spoiled.display(),
                fork.of.display()
            )));
        }
        let Some(aside) = self.folder.put_aside(spoiled)? else {
            return Ok(false);
        };
        self.report.note(&format!(
            "{} is not what was written; a disk or another program has changed it. It is made again; what \
             was found lies in {}",
            spoiled.display(),
            aside.display()
        ));
        Ok(true)
    }
}
