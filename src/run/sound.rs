//! What is read is what was written: files are compared with their SHA-256 before anything is made from
//! them, and what is something else is put aside and made again.

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::models::Kept;
use super::{RunError, Runner};
use crate::config::PlannedStage;
use crate::stages::{Failure, ModelState};
use crate::store::{Made, StoreError, hash_file};

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
        let inputs = stage.inputs.iter().map(|(_, table)| table);
        let inputs = inputs.map(|table| (table, self.plan.round_of(table, round)));
        for (table, round) in inputs.chain([(&stage.name, round)]) {
            let made = manifest.find(table.as_str(), round);
            let parked = manifest.parked.iter().map(|parked| &parked.made);
            let superseded = parked.filter(|made| {
                *table == stage.name && made.table == table.as_str() && made.round == round
            });
            let files = made.into_iter().chain(superseded).flat_map(Made::files);
            written.extend(files.map(|file| (PathBuf::from(&file.file), file.sha256.clone())));
        }
        for used in stage.spec.as_stage().uses() {
            if used.state == ModelState::Initial {
                continue;
            }
            for checkpoint in self.checkpoints(stage, used.model, round) {
                let folder = Path::new(&checkpoint.folder);
                let files = checkpoint.sha256.iter();
                written.extend(files.map(|(name, sha256)| (folder.join(name), sha256.clone())));
            }
        }
        written.retain(|(_, sha256)| !self.sound.contains(sha256));
        let root = self.folder.root();
        written.par_iter().try_for_each(|(file, sha256)| {
            let path = root.join(file);
            if hash_file(&path)? == *sha256 {
                return Ok(());
            }
            Err(StoreError::Spoiled { path })
        })?;
        self.sound
            .extend(written.into_iter().map(|(_, sha256)| sha256));
        Ok(())
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
