//! Atomic writes of files and folders.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use super::StoreError;
use ovchat_io::files;

/// Writes a file atomically: a reader sees the old content or the new one, even after a crash.
pub fn write_atomically(path: &Path, content: &[u8]) -> Result<(), StoreError> {
    let folder = files::folder_of(path);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Overwrites a leftover of a crash.
    let hidden = folder.join(format!(".new-{name}"));
    let mut file = File::create(&hidden).map_err(StoreError::io("write", path))?;
    file.write_all(content)
        .map_err(StoreError::io("write", path))?;
    file.sync_all().map_err(StoreError::io("sync", path))?;
    fs::rename(&hidden, path).map_err(StoreError::io("write", path))?;
    sync_folder(folder)
}

/// Creates a folder and its missing ancestors, synced so that they survive a power loss.
pub fn create_folder(folder: &Path) -> Result<(), StoreError> {
    files::create_folder(folder).map_err(StoreError::io("create", folder))
}

/// Syncs a folder, so that new files, renames and removals in it survive a power loss.
pub fn sync_folder(folder: &Path) -> Result<(), StoreError> {
    files::sync_folder(folder).map_err(StoreError::io("sync", folder))
}

/// Writes the folder `to` atomically: `write` fills a temporary folder, which is synced and then
/// renamed. An existing folder `to` is replaced.
pub fn write_folder<E: From<StoreError>>(
    to: &Path,
    write: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    let name = to.file_name().unwrap_or_default().to_string_lossy();
    let parent = files::folder_of(to);
    let hidden = parent.join(format!(".new-{name}"));
    for stale in [hidden.as_path(), to] {
        if stale.exists() {
            fs::remove_dir_all(stale).map_err(StoreError::io("replace", stale))?;
        }
    }
    create_folder(parent)?;
    write(&hidden)?;
    sync_all(&hidden)?;
    fs::rename(&hidden, to).map_err(StoreError::io("write", to))?;
    Ok(sync_folder(parent)?)
}

/// Syncs a folder and its contents recursively.
fn sync_all(folder: &Path) -> Result<(), StoreError> {
    for entry in fs::read_dir(folder).map_err(StoreError::io("read", folder))? {
        let path = entry.map_err(StoreError::io("read", folder))?.path();
        if path.is_dir() {
            sync_all(&path)?;
        } else {
            let synced = File::open(&path).and_then(|file| file.sync_all());
            synced.map_err(StoreError::io("sync", &path))?;
        }
    }
    sync_folder(folder)
}

/// Copies a folder and its contents into the new folder `to`, synced.
pub fn copy_folder(from: &Path, to: &Path) -> Result<(), StoreError> {
    create_folder(to)?;
    for entry in fs::read_dir(from).map_err(StoreError::io("read", from))? {
        let entry = entry.map_err(StoreError::io("read", from))?;
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target).map_err(StoreError::io("write", &target))?;
            let synced = File::open(&target).and_then(|file| file.sync_all());
            synced.map_err(StoreError::io("sync", &target))?;
        }
    }
    sync_folder(to)
}
