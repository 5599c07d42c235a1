//! Versions of a table: staged while they are made, current, parked once they are superseded.
//!
//! A complete version stays current until the new one is complete and accepted. Then the folders of the two
//! change places in one system call, so a glob finds the old files or the new ones, never both; a program
//! that has listed the old ones and opens them later finds them gone. A table that goes from once to each
//! round, or back, is gone for a moment. The commit comes first: renames that a crash cuts off are finished
//! when the run is opened the next time.

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
    /// The place of the version of a table that is being made, or of the current one.
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

    /// Where a table's files lie, below the root, once they are current.
    pub(super) fn table_folder(&self, table: &str, round: Option<u32>) -> String {
        table_folder(table, round, self.manifest.has_round_column())
    }

    /// Records a version that is begun. It is staged while complete versions are in its way, see
    /// [`Self::displaced`]; unfinished ones are parked.
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

    /// Records what changed about a version under way.
    pub fn record(&mut self, made: TableVersion) -> Result<(), StoreError> {
        let is_staged = self.manifest.staged(&made.table, made.round).is_some();
        self.commit(if is_staged {
            Event::Stage(made)
        } else {
            Event::Begin(made)
        })
    }

    /// The other current versions that a version of a table replaces: the one before; a version without
    /// rounds where this one has a round, or the reverse, since one folder cannot hold both; and those
    /// with a checkpoint in the folder `checkpoint`.
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

    /// True if complete versions are in the way of this one.
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

    /// Parks the unfinished versions in the way of this one. False if a complete one is in its way.
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

    /// Moves a table that was superseded into `.cache/<key>`, where readers do not look.
    pub fn archive(&mut self, table: &str, round: Option<u32>) -> Result<(), StoreError> {
        let Some(made) = self.manifest.find(table, round).cloned() else {
            return Ok(());
        };
        self.archive_staged(table, round)?;
        let parked = relocated_below_cache(made);
        self.commit(Event::Park(parked.clone()))?;
        self.move_archived(&parked)
    }

    /// Sets a staged version aside, as far as it got.
    pub fn archive_staged(&mut self, table: &str, round: Option<u32>) -> Result<(), StoreError> {
        if self.manifest.staged(table, round).is_none() {
            return Ok(());
        }
        let table = table.to_owned();
        self.commit(Event::ParkStaged { table, round })
    }

    /// Brings back the parked version with this key, if there is one: staged while complete versions are
    /// in its way, else in its place.
    pub fn restore(
        &mut self,
        table: &str,
        round: Option<u32>,
        key: &str,
        checkpoint: Option<&str>,
    ) -> Result<bool, StoreError> {
        let parked = self.manifest.parked.iter().map(|parked| &parked.made);
        let mut found = parked.filter(|made| made.is(table, round) && made.key == key);
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

    /// Makes the staged version of a table current if it is complete, and parks those that it displaces.
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

    /// True if commits have recorded moves of current versions that are not made.
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

    /// Finishes the moves that commits have recorded, and that a crash may have cut off.
    pub(super) fn finish_moves(&self) -> Result<(), StoreError> {
        let parked = || self.manifest.parked.iter().map(|parked| &parked.made);
        let has_current =
            |made: &TableVersion| self.manifest.find(&made.table, made.round).is_some();
        // Tables that others took the place of go first, as when they were replaced.
        for made in parked().filter(|made| !has_current(made)) {
            self.move_archived(made)?;
        }
        for made in &self.manifest.made {
            self.settle(made, true)?;
        }
        for made in parked() {
            self.move_archived(made)?;
        }
        Ok(())
    }

    /// Moves the files of a current version from `.cache/<key>` to their place. The files of the version
    /// before, if they are there, go to `.cache` under its own key. `again` if some of the moves may have
    /// been made before a crash: then hashes tell the versions apart.
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
                // This file system can't: the version before goes out of the way first.
                if let Some(parked) = self.free_place(folder) {
                    rename_into(&place, &parked)?;
                    rename_into(&staged, &place)?;
                } else {
                    merge(&staged, &place)?;
                }
            }
        }
        if staged.exists()
            && let Some(parked) = self.free_place(folder)
        {
            rename_into(&staged, &parked)?;
        }
        sync_folder(place.parent().expect("a folder below the root"))
    }

    /// The place of a folder in the version that was parked last with it, if it is not there yet.
    fn free_place(&self, folder: &str) -> Option<PathBuf> {
        let mut versions = self.manifest.parked.iter().rev().map(|parked| &parked.made);
        versions.find_map(|other| {
            let parked = format!("{}{folder}", below_cache(other));
            let lists = places(other).any(|name| Path::new(name).starts_with(&parked));
            let parked = self.root.join(parked);
            (lists && !parked.exists()).then_some(parked)
        })
    }

    /// Files beside the rows lie in folders of several tables: each is replaced by its own rename.
    fn settle_beside(&self, made: &TableVersion) -> Result<(), StoreError> {
        let below = below_cache(made);
        let new: Vec<&FileRecord> = made.rejects().chain(made.telemetry()).collect();
        if !new
            .iter()
            .any(|file| self.root.join(&below).join(&file.file).exists())
        {
            return Ok(());
        }
        for parked in &self.manifest.parked {
            let before = &parked.made;
            if !before.is(&made.table, made.round) {
                continue;
            }
            for file in before.rejects().chain(before.telemetry()) {
                let name = in_place(&file.file, before);
                let of_before = (name.to_owned(), file.bytes, Some(file.sha256.clone()));
                let parked = self.root.join(&file.file);
                if !parked.exists() && self.holds(&[of_before])? {
                    create_folder(parked.parent().expect("a file in a folder"))?;
                    let place = self.root.join(name);
                    if fs::hard_link(&place, &parked).is_err() {
                        fs::rename(&place, &parked).map_err(StoreError::io("move", &place))?;
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

    /// True if these files lie in their places as they were written.
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

    /// Moves the files of a parked version out of the places that no current version has.
    fn move_archived(&self, parked: &TableVersion) -> Result<(), StoreError> {
        let current: HashSet<&str> = self.manifest.made.iter().flat_map(places).collect();
        for name in places(parked) {
            let before = in_place(name, parked);
            let (from, to) = (self.root.join(before), self.root.join(name));
            if before == name || current.contains(before) || !from.exists() {
                continue;
            }
            if to.exists() {
                // A link to it is there already.
                if from.is_file() {
                    fs::remove_file(&from).map_err(StoreError::io("remove", &from))?;
                }
                continue;
            }
            rename_into(&from, &to)?;
            if let Some(folder) = from.parent() {
                // The last file leaves an empty folder; others stay.
                let _ = fs::remove_dir(folder);
            }
        }
        Ok(())
    }

    /// Moves the checkpoint and the compacted rows of a version that became complete from `.cache/<key>` to
    /// their places; `made` is the version before it was completed, and still lists the parts.
    pub(super) fn put_in_place(
        &self,
        made: &TableVersion,
        checkpoint: Option<&CheckpointRecord>,
    ) -> Result<(), StoreError> {
        if let Some(checkpoint) = checkpoint {
            let written = self.root.join(below_cache(made)).join(&checkpoint.folder);
            let place = self.root.join(&checkpoint.folder);
            if place.exists() {
                // Left by a program that was killed before it could record it.
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
            // What else lies there is not ours, unless it is what was left of a version that was lost.
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

/// Has two folders change places at once. False where the file system can't do that.
fn exchange(one: &Path, other: &Path) -> Result<bool, StoreError> {
    match renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(false),
        Err(error) => Err(StoreError::io("move", one)(io::Error::from(error))),
    }
}

/// Moves everything in one folder into another one that is there, and removes the folder.
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
