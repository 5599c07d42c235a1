//! Files and folders that are there whole or not at all.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use super::StoreError;

/// Writes a file so that a reader sees the old content or the new one, also after a crash.
pub fn write_atomically(path: &Path, content: &[u8]) -> Result<(), StoreError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new()
        .prefix(".new-")
        .tempfile_in(folder)
        .map_err(StoreError::io("write", path))?;
    file.write_all(content)
        .map_err(StoreError::io("write", path))?;
    file.as_file()
        .sync_all()
        .map_err(StoreError::io("sync", path))?;
    file.persist(path)
        .map_err(|failed| StoreError::io("write", path)(failed.error))?;
    sync_folder(folder)
}

/// Makes renames and removals in a folder survive a power loss.
pub fn sync_folder(folder: &Path) -> Result<(), StoreError> {
    let synced = File::open(folder).and_then(|handle| handle.sync_all());
    synced.map_err(StoreError::io("sync", folder))
}

/// Copies a folder with everything in it into the new folder `to`, synced.
pub fn copy_folder(from: &Path, to: &Path) -> Result<(), StoreError> {
    fs::create_dir_all(to).map_err(StoreError::io("create", to))?;
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
