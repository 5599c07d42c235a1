//! Versions of a table: staged while they are built, current, and archived once they are
//! superseded.
//!
//! A complete version stays current until the new one is complete and accepted. Then the folders of
//! the two are swapped in one system call, so that a glob finds the old files or the new ones,
//! never both; a program that listed the old files and opens them later does not find them. A table
//! that changes from static to one with rounds, or back, is missing for a moment. The commit comes
//! first: renames that were interrupted by a crash are finished the next time the run is opened.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::folder::RunFolder;
use super::place::{
    Place, below_cache, in_place, placed, places, relocated_below_cache, table_folder,
};
use super::{
    CheckpointRecord, Event, FileRecord, StoreError, TableVersion, create_folder, hash_file,
    sync_folder,
};

impl RunFolder {
    /// Returns the place of the table version under way, or else of the current one.
    pub fn place(&self, table: &str, round: Option<u32>) -> Place {
        let staged = self.manifest.staged(table, round);
        Place {
            root: self.root.clone(),
            prefix: staged.map_or_else(String::new, below_cache),
            hidden: (self.manifest.under_way(table, round)).map_or_else(String::new, below_cache),
            suffix: staged.map_or_else(String::new, |made| {
                format!("-{}", made.key.get(..8).unwrap_or(&made.key))
            }),
            table: table.to_owned(),
            round,
            has_round_column: self.manifest.has_round_column(),
        }
    }

    /// Returns the folder of a table's files once they are current, relative to the run folder.
    pub(super) fn table_folder(&self, table: &str, round: Option<u32>) -> String {
        table_folder(table, round, self.manifest.has_round_column())
    }

    /// Commits the start of a version. It is staged if it conflicts with complete versions, see
    /// [`Self::displaced`]; conflicting unfinished versions are archived.
    pub fn begin(
        &mut self,
        made: TableVersion,
        checkpoint: Option<&str>,
    ) -> Result<(), StoreError> {
        let event = if self.make_way(&made, checkpoint)? {
            Event::Begin(made)
        } else {
            Event::Stage(made)
        };
        self.commit(event)
    }

    /// Commits a change to a version under way.
    pub fn record(&mut self, made: TableVersion) -> Result<(), StoreError> {
        let is_staged = self.manifest.staged(&made.table, made.round).is_some();
        self.commit(if is_staged {
            Event::Stage(made)
        } else {
            Event::Begin(made)
        })
    }

    /// Returns the other current versions that a version of a table replaces: the previous version
    /// of the same round; versions without rounds if this one has a round, or the reverse, since
    /// one folder cannot hold both; and versions with a checkpoint in the folder `checkpoint`.
    pub fn displaced(
        &self,
        table: &str,
        round: Option<u32>,
        key: Option<&str>,
        checkpoint: Option<&str>,
    ) -> impl Iterator<Item = &TableVersion> {
        self.manifest.made.iter().filter(move |other| {
            let is_table = other.table == table
                && (other.round == round || other.round.is_some() != round.is_some());
            let other_checkpoint = other.checkpoint.as_ref().map(|one| one.folder.as_str());
            let is_checkpoint = checkpoint.is_some() && checkpoint == other_checkpoint;
            let is_itself = other.is(table, round) && Some(other.key.as_str()) == key;
            (is_table || is_checkpoint) && !is_itself
        })
    }

    /// True if a version conflicts with complete versions.
    pub fn is_blocked(
        &self,
        table: &str,
        round: Option<u32>,
        key: &str,
        checkpoint: Option<&str>,
    ) -> bool {
        self.displaced(table, round, Some(key), checkpoint)
            .any(|other| other.complete)
    }

    /// Archives the unfinished versions that conflict with this one. Returns false if a complete
    /// one conflicts.
    fn make_way(
        &mut self,
        made: &TableVersion,
        checkpoint: Option<&str>,
    ) -> Result<bool, StoreError> {
        if self.is_blocked(&made.table, made.round, &made.key, checkpoint) {
            return Ok(false);
        }
        let displaced = self.displaced(&made.table, made.round, Some(&made.key), checkpoint);
        let displaced: Vec<_> = displaced
            .map(|other| (other.table.clone(), other.round))
            .collect();
        for (table, round) in displaced {
            self.archive(&table, round)?;
        }
        Ok(true)
    }

    /// Moves a superseded table into `.cache/<key>`, where readers do not look.
    pub fn archive(&mut self, table: &str, round: Option<u32>) -> Result<(), StoreError> {
        let Some(made) = self.manifest.find(table, round).cloned() else {
            return Ok(());
        };
        self.archive_staged(table, round)?;
        let archived = relocated_below_cache(made);
        self.commit(Event::Park(archived.clone()))?;
        self.move_archived(&archived)
    }

    /// Archives a staged version in its present state.
    pub fn archive_staged(&mut self, table: &str, round: Option<u32>) -> Result<(), StoreError> {
        if self.manifest.staged(table, round).is_none() {
            return Ok(());
        }
        let table = table.to_owned();
        self.commit(Event::ParkStaged { table, round })
    }

    /// Restores the archived version with this key, if there is one: as a staged version if it
    /// conflicts with complete ones, else as the current version.
    pub fn restore(
        &mut self,
        table: &str,
        round: Option<u32>,
        key: &str,
        checkpoint: Option<&str>,
    ) -> Result<bool, StoreError> {
        let archived = self.manifest.archived.iter().map(|archived| &archived.made);
        let mut found = archived.filter(|made| made.is(table, round) && made.key == key);
        let Some(made) = found.next().cloned() else {
            return Ok(false);
        };
        let written = made.checkpoint.as_ref();
        let written = written.map(|one| in_place(&one.folder, &made).to_owned());
        if self.make_way(&made, written.as_deref().or(checkpoint))? {
            let made = placed(made);
            self.commit(Event::Unpark(made.clone()))?;
            self.settle(&made, false)?;
        } else {
            self.commit(Event::Stage(made))?;
        }
        Ok(true)
    }

    /// Makes the staged version of a table current if it is complete, and archives the versions
    /// that it displaces.
    pub fn replace_by_staged(&mut self, table: &str, round: Option<u32>) -> Result<(), StoreError> {
        let staged = self.manifest.staged(table, round);
        let Some(new) = staged.filter(|made| made.complete).cloned() else {
            return Ok(());
        };
        let new = placed(new);
        let checkpoint = new.checkpoint.as_ref().map(|one| one.folder.as_str());
        let displaced = self.displaced(table, round, None, checkpoint).cloned();
        let displaced = displaced.map(relocated_below_cache);
        let (old, others): (Vec<TableVersion>, Vec<TableVersion>) =
            displaced.partition(|made| made.is(table, round));
        let old = old.into_iter().next();
        for other in &others {
            self.archive_staged(&other.table, other.round)?;
        }
        self.commit(Event::Replace {
            old: old.clone(),
            new: new.clone(),
            others: others.clone(),
        })?;
        for other in &others {
            self.move_archived(other)?;
        }
        self.settle(&new, false)?;
        old.map_or(Ok(()), |old| self.move_archived(&old))
    }

    /// True if committed moves of current versions have not been performed.
    pub(super) fn is_unsettled(&self) -> bool {
        let complete = self.manifest.made.iter().filter(|made| made.complete);
        complete.into_iter().any(|made| {
            let below = self.root.join(below_cache(made));
            // After the exchange of the folders, the version before lies below this one's key.
            let folder = self.table_folder(&made.table, made.round);
            below.exists()
                && (below.join(folder).exists()
                    || places(made).any(|name| below.join(name).exists()))
        })
    }

    /// Finishes committed moves that a crash may have interrupted.
    pub(super) fn finish_moves(&self) -> Result<(), StoreError> {
        let archived = || self.manifest.archived.iter().map(|archived| &archived.made);
        let has_current =
            |made: &TableVersion| self.manifest.find(&made.table, made.round).is_some();
        // Displaced tables are moved first, in the same order as when they were replaced.
        for made in archived().filter(|made| !has_current(made)) {
            self.move_archived(made)?;
        }
        for made in &self.manifest.made {
            self.settle(made, true)?;
        }
        for made in archived() {
            self.move_archived(made)?;
        }
        Ok(())
    }

    /// Moves the files of a current version from `.cache/<key>` to their final paths. Files of the
    /// previous version, if present, are moved to `.cache` under its own key. With `again`, some of
    /// the moves may have been performed before a crash; then hashes tell the versions apart.
    fn settle(&self, made: &TableVersion, again: bool) -> Result<(), StoreError> {
        let below = below_cache(made);
        if !self.root.join(&below).exists() {
            return Ok(());
        }
        let folder = self.table_folder(&made.table, made.round);
        let files: Vec<_> = made.files().map(name_bytes_sha256).collect();
        self.settle_folder(made, &folder, &files, again)?;
        if let Some(checkpoint) = &made.checkpoint {
            let name_bytes_sha256 = |(name, bytes): (&String, &u64)| {
                let sha256 = checkpoint.sha256.get(name).cloned();
                (format!("{}/{name}", checkpoint.folder), *bytes, sha256)
            };
            let files: Vec<_> = checkpoint.files.iter().map(name_bytes_sha256).collect();
            self.settle_folder(made, &checkpoint.folder, &files, again)?;
        }
        self.settle_beside(made)
    }

    fn settle_folder(
        &self,
        made: &TableVersion,
        folder: &str,
        files: &[(String, u64, Option<String>)],
        again: bool,
    ) -> Result<(), StoreError> {
        let place = self.root.join(folder);
        let staged = self.root.join(below_cache(made)).join(folder);
        if !staged.exists() {
            return Ok(());
        }
        if !(again && self.holds(files)?) {
            create_folder(place.parent().expect("a folder below the root"))?;
            if !place.exists() {
                fs::rename(&staged, &place).map_err(StoreError::io("move", &staged))?;
            } else if !exchange(&staged, &place)? {
                // This file system cannot swap folders, so the previous version is moved away
                // first.
                if let Some(archived) = self.free_place(folder) {
                    rename_into(&place, &archived)?;
                    rename_into(&staged, &place)?;
                } else {
                    merge(&staged, &place)?;
                }
            }
        }
        if staged.exists()
            && let Some(archived) = self.free_place(folder)
        {
            rename_into(&staged, &archived)?;
        }
        sync_folder(place.parent().expect("a folder below the root"))
    }

    /// Returns the target path of a folder in the most recently archived version that lists it and
    /// does not have it yet.
    fn free_place(&self, folder: &str) -> Option<PathBuf> {
        let mut versions = self
            .manifest
            .archived
            .iter()
            .rev()
            .map(|archived| &archived.made);
        versions.find_map(|other| {
            let archived = format!("{}{folder}", below_cache(other));
            let lists = places(other).any(|name| Path::new(name).starts_with(&archived));
            let archived = self.root.join(archived);
            (lists && !archived.exists()).then_some(archived)
        })
    }

    /// Rejects and telemetry are in folders shared by several tables, so each file is replaced by
    /// its own rename.
    fn settle_beside(&self, made: &TableVersion) -> Result<(), StoreError> {
        let below = below_cache(made);
        let new: Vec<&FileRecord> = made.rejects().chain(made.telemetry()).collect();
        if !new
            .iter()
            .any(|file| self.root.join(&below).join(&file.file).exists())
        {
            return Ok(());
        }
        for archived in &self.manifest.archived {
            let before = &archived.made;
            if !before.is(&made.table, made.round) {
                continue;
            }
            for file in before.rejects().chain(before.telemetry()) {
                let name = in_place(&file.file, before);
                let of_before = (name.to_owned(), file.bytes, Some(file.sha256.clone()));
                let archived = self.root.join(&file.file);
                if !archived.exists() && self.holds(&[of_before])? {
                    create_folder(archived.parent().expect("a file in a folder"))?;
                    let place = self.root.join(name);
                    if fs::hard_link(&place, &archived).is_err() {
                        fs::rename(&place, &archived).map_err(StoreError::io("move", &place))?;
                    }
                }
            }
        }
        for file in new {
            let staged = self.root.join(&below).join(&file.file);
            if staged.exists() {
                let place = self.root.join(&file.file);
                create_folder(place.parent().expect("a file in a folder"))?;
                fs::rename(&staged, &place).map_err(StoreError::io("move", &staged))?;
            }
        }
        Ok(())
    }

    /// True if these files exist at their paths and match their checksums.
    fn holds(&self, files: &[(String, u64, Option<String>)]) -> Result<bool, StoreError> {
        for (name, bytes, sha256) in files {
            let path = self.root.join(name);
            match fs::metadata(&path) {
                Ok(metadata) if metadata.len() == *bytes => {}
                _ => return Ok(false),
            }
            if let Some(sha256) = sha256
                && hash_file(&path)? != *sha256
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Moves the files of an archived version away from paths that no current version uses.
    fn move_archived(&self, archived: &TableVersion) -> Result<(), StoreError> {
        let current: HashSet<&str> = self.manifest.made.iter().flat_map(places).collect();
        for name in places(archived) {
            let before = in_place(name, archived);
            let (from, to) = (self.root.join(before), self.root.join(name));
            if before == name || current.contains(before) || !from.exists() {
                continue;
            }
            if to.exists() {
                // It is already there as a link.
                if from.is_file() {
                    fs::remove_file(&from).map_err(StoreError::io("remove", &from))?;
                }
                continue;
            }
            rename_into(&from, &to)?;
            if let Some(folder) = from.parent() {
                // Removes the folder if it is empty.
                let _ = fs::remove_dir(folder);
            }
        }
        Ok(())
    }

    /// Moves the checkpoint and the compacted rows of a version that became complete from
    /// `.cache/<key>` to their final paths. `made` is the version before completion, which still
    /// lists the parts.
    pub(super) fn put_in_place(
        &self,
        made: &TableVersion,
        checkpoint: Option<&CheckpointRecord>,
    ) -> Result<(), StoreError> {
        if let Some(checkpoint) = checkpoint {
            let written = self.root.join(below_cache(made)).join(&checkpoint.folder);
            let place = self.root.join(&checkpoint.folder);
            if place.exists() {
                // A leftover of a process that was killed before it could commit.
                fs::remove_dir_all(&place).map_err(StoreError::io("replace", &place))?;
            }
            rename_into(&written, &place)?;
        }
        let folder = self.table_folder(&made.table, made.round);
        let staged = self.root.join(below_cache(made)).join(&folder);
        if !staged.exists() {
            return Ok(());
        }
        let place = self.root.join(&folder);
        if !exchange(&staged, &place)? {
            return merge(&staged, &place);
        }
        let parts: HashSet<&str> = made.files().map(|file| file.file.as_str()).collect();
        for entry in fs::read_dir(&staged).map_err(StoreError::io("read", &staged))? {
            let entry = entry.map_err(StoreError::io("read", &staged))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_part = parts.contains(format!("{folder}/{name}").as_str());
            let back = place.join(entry.file_name());
            // Other files are not ours, unless they are leftovers of a lost version.
            if !is_part && !back.exists() {
                fs::rename(entry.path(), &back).map_err(StoreError::io("move", &back))?;
            }
        }
        fs::remove_dir_all(&staged).map_err(StoreError::io("remove", &staged))?;
        sync_folder(&place)
    }
}

fn name_bytes_sha256(file: &FileRecord) -> (String, u64, Option<String>) {
    (file.file.clone(), file.bytes, Some(file.sha256.clone()))
}

/// Swaps two folders atomically. Returns false if the file system does not support it.
fn exchange(one: &Path, other: &Path) -> Result<bool, StoreError> {
    match renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(false),
        Err(error) => Err(StoreError::io("move", one)(io::Error::from(error))),
    }
}

/// Moves the contents of a folder into an existing one, and removes the folder.
fn merge(from: &Path, to: &Path) -> Result<(), StoreError> {
    for entry in fs::read_dir(from).map_err(StoreError::io("read", from))? {
        let entry = entry.map_err(StoreError::io("read", from))?;
        let target = to.join(entry.file_name());
        fs::rename(entry.path(), target).map_err(StoreError::io("move", &entry.path()))?;
    }
    fs::remove_dir(from).map_err(StoreError::io("remove", from))?;
    sync_folder(to)
}

fn rename_into(from: &Path, to: &Path) -> Result<(), StoreError> {
    let folder = to.parent().expect("a path below the root");
    create_folder(folder)?;
    fs::rename(from, to).map_err(StoreError::io("move", from))?;
    sync_folder(folder)
}
