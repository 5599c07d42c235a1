//! Fingerprints of the user's files: content hashes, cached so that 15 GB are not read twice.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::key::hex;
use super::{Key, StoreError, sealed};
use ovchat_io::files;

/// File metadata that detects a change without reading the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    size: u64,
    mtime_ns: i128,
    inode: u64,
}

impl Stamp {
    pub fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self {
            size: metadata.len(),
            mtime_ns: i128::from(metadata.mtime()) * 1_000_000_000
                + i128::from(metadata.mtime_nsec()),
            inode: metadata.ino(),
        })
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Known {
    stamp: Stamp,
    sha256: String,
}

/// The content of the cache file.
#[derive(Serialize, Deserialize)]
struct Remembered<F> {
    files: F,
}

/// A cache of content hashes by path. A file is read again only if its size, modification time or
/// inode changed.
pub struct Fingerprints {
    path: PathBuf,
    known: Mutex<BTreeMap<PathBuf, Known>>,
    /// True if there are hashes that have not been saved.
    is_new: AtomicBool,
}

impl Fingerprints {
    /// Reads the cache in `path`; empty if the file is missing or corrupt.
    pub fn open(path: PathBuf) -> Self {
        let text = fs::read(&path).ok();
        let text = text.filter(|text| sealed::flaw(text).is_none());
        let known: Option<Remembered<_>> = text.and_then(|text| serde_json::from_slice(&text).ok());
        let known = known.map(|remembered| remembered.files);
        Self {
            path,
            known: Mutex::new(known.unwrap_or_default()),
            is_new: AtomicBool::new(false),
        }
    }

    /// Returns the SHA-256 of a file's content, in hex.
    pub fn file(&self, path: &Path) -> Result<String, StoreError> {
        self.file_at_most(path, u64::MAX)
    }

    /// Returns the SHA-256 of a file of at most `most` bytes.
    pub fn file_at_most(&self, path: &Path, most: u64) -> Result<String, StoreError> {
        let stamp = Stamp::of(path).map_err(StoreError::io("read", path))?;
        if stamp.size > most {
            let too_large = io::Error::from(io::ErrorKind::FileTooLarge);
            return Err(StoreError::io("read", path)(too_large));
        }
        if let Some(known) = self.known.lock().expect("no panic while locked").get(path)
            && known.stamp == stamp
        {
            return Ok(known.sha256.clone());
        }
        let sha256 = hash_file(path)?;
        self.remember(path, stamp, &sha256);
        Ok(sha256)
    }

    /// Records the SHA-256 of a file that was just written.
    pub fn note(&self, path: &Path, sha256: &str) {
        if let Ok(stamp) = Stamp::of(path) {
            self.remember(path, stamp, sha256);
        }
    }

    fn remember(&self, path: &Path, stamp: Stamp, sha256: &str) {
        let sha256 = sha256.to_owned();
        let mut known = self.known.lock().expect("no panic while locked");
        let before = known.get(path);
        if before.is_none_or(|before| before.stamp != stamp || before.sha256 != sha256) {
            known.insert(path.to_owned(), Known { stamp, sha256 });
            self.is_new.store(true, Ordering::Relaxed);
        }
    }

    /// Returns the fingerprint of a folder: a hash of the names and contents of all files in it
    /// except hidden ones. For the path of a file, returns the file's hash.
    pub fn folder(&self, folder: &Path) -> Result<String, StoreError> {
        if folder.is_file() {
            return self.file(folder);
        }
        let mut files = Vec::new();
        list(folder, Path::new(""), &mut Vec::new(), &mut files)?;
        files.sort();
        let hashes: Vec<_> = files
            .par_iter()
            .map(|name| self.file(&folder.join(name)))
            .collect::<Result<_, _>>()?;
        let mut key = Key::new("folder");
        for (name, hash) in files.iter().zip(hashes) {
            key = key.with(name.to_string_lossy().as_bytes()).with(hash);
        }
        Ok(key.finish())
    }

    /// Saves new hashes for the next start. Each process writes its own temporary file, as several
    /// may save before one of them takes the run's lock; the last one wins.
    pub fn save(&self) -> Result<(), StoreError> {
        if !self.is_new.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let known = self.known.lock().expect("no panic while locked");
        let remembered = Remembered { files: &*known };
        let text = serde_json::to_vec_pretty(&remembered).expect("paths that were read serialize");
        let text = sealed::seal(&text);
        let write = || -> io::Result<()> {
            let folder = self.path.parent().unwrap_or(Path::new("."));
            let mut file = tempfile::Builder::new()
                .prefix(".new-")
                .permissions(fs::Permissions::from_mode(0o666))
                .tempfile_in(folder)?;
            file.write_all(&text)?;
            file.persist(&self.path).map(drop)?;
            Ok(())
        };
        write().map_err(StoreError::io("write", &self.path))
    }
}

/// Adds the files in a folder and its subfolders to `files`. A link to one of the folders `above`
/// is skipped, because its files are already listed.
fn list(
    root: &Path,
    below: &Path,
    above: &mut Vec<(u64, u64)>,
    files: &mut Vec<PathBuf>,
) -> Result<(), StoreError> {
    let folder = root.join(below);
    let itself = fs::metadata(&folder).map_err(StoreError::io("read", &folder))?;
    let itself = (itself.dev(), itself.ino());
    if above.contains(&itself) {
        return Ok(());
    }
    above.push(itself);
    for entry in fs::read_dir(&folder).map_err(StoreError::io("read", &folder))? {
        let entry = entry.map_err(StoreError::io("read", &folder))?;
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        let name = below.join(entry.file_name());
        if entry.path().is_dir() {
            list(root, &name, above, files)?;
        } else {
            files.push(name);
        }
    }
    above.pop();
    Ok(())
}

/// Returns the SHA-256 of a file's content, in hex.
pub fn hash_file(path: &Path) -> Result<String, StoreError> {
    let mut file = files::open(path).map_err(StoreError::io("read", path))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        if files::stopped() {
            return Err(StoreError::Stopped);
        }
        let count = file
            .read(&mut buffer)
            .map_err(StoreError::io("read", path))?;
        if count == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..count]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_file_changes_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let weights = folder.path().join("weights");
        fs::create_dir(&weights).unwrap();
        fs::write(weights.join("a"), "one").unwrap();
        let fingerprints = Fingerprints::open(folder.path().join("known.json"));
        let before = fingerprints.folder(&weights).unwrap();
        assert_eq!(fingerprints.folder(&weights).unwrap(), before);
        fs::write(weights.join("a"), "other").unwrap();
        assert_ne!(fingerprints.folder(&weights).unwrap(), before);
    }

    #[test]
    fn what_is_remembered_is_not_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a");
        fs::write(&file, "one").unwrap();
        let known = folder.path().join("known.json");
        let first = Fingerprints::open(known.clone());
        let hash = first.file(&file).unwrap();
        first.save().unwrap();
        let text = fs::read_to_string(&known).unwrap();
        let other = text.replace(&hash, "remembered");
        fs::write(&known, &other).unwrap();
        let read = || Fingerprints::open(known.clone()).file(&file).unwrap();
        assert_eq!(read(), hash, "a file that was changed is not believed");
        let rest = other.split_once(",\n").unwrap().1;
        fs::write(&known, sealed::seal(format!("{{\n{rest}").as_bytes())).unwrap();
        assert_eq!(read(), "remembered");
    }

    #[test]
    fn a_link_to_a_folder_above_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a"), "one").unwrap();
        let fingerprints = Fingerprints::open(folder.path().join(".known.json"));
        let before = fingerprints.folder(folder.path()).unwrap();
        fs::create_dir(folder.path().join("b")).unwrap();
        std::os::unix::fs::symlink("..", folder.path().join("b/up")).unwrap();
        assert_eq!(fingerprints.folder(folder.path()).unwrap(), before);
    }
}
