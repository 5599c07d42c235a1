//! Errors of the store. Every error names its path.

use std::io;
use std::path::{Path, PathBuf};

use crate::tables::Misfit;

/// A failure to read or write a run.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot {action} {}: {}", path.display(), plain(source))]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// The file is not valid Parquet.
    #[error("cannot read {} as Parquet: {problem}", path.display())]
    Parquet { path: PathBuf, problem: String },
    /// The file does not match its checksum.
    #[error(
        "checksum mismatch: {} changed after it was written (a disk fault or another program)",
        path.display()
    )]
    Corrupt { path: PathBuf },
    #[error("{}: {misfit}", path.display())]
    Misfit { path: PathBuf, misfit: Misfit },
    /// Another process holds the lock of the run.
    #[error(
        "the run {} is in use by {holder}; wait for it, stop it, or choose another folder with --run",
        path.display()
    )]
    Locked { path: PathBuf, holder: String },
    /// Another process holds the lease of the run.
    #[error(
        "the run {} is in use by {holder}; wait for it, stop it, or choose another folder with --run; if it \
         cannot be stopped, --take-over takes the run from it",
        path.display()
    )]
    Held { path: PathBuf, holder: String },
    /// Another process has taken the lease of the run.
    #[error(
        "{} now belongs to {holder}, since this process did not renew its lease in time; nothing more is \
         committed here",
        path.display()
    )]
    Lost { path: PathBuf, holder: String },
    /// Another process is collecting labels for the table.
    #[error(
        "labels for `{task}` are already being collected by {holder}; use the page that it serves, or stop it and try again"
    )]
    Asked { task: String, holder: String },
    /// The folder contains a run of another pipeline.
    #[error(
        "{} contains a run of pipeline `{found}`, expected `{wanted}`; choose another folder with --run",
        path.display()
    )]
    OtherPipeline {
        path: PathBuf,
        found: String,
        wanted: String,
    },
    /// The folder is not a run folder.
    #[error("{} is not a run folder: manifest.json not found{hint}", path.display())]
    NotARun { path: PathBuf, hint: &'static str },
    /// A file of the manifest is corrupt.
    #[error("{} is corrupt: {problem}", path.display())]
    Damaged { path: PathBuf, problem: String },
    /// The manifest is corrupt or of an unsupported format.
    #[error("cannot load {}: {problem}", path.display())]
    Manifest { path: PathBuf, problem: String },
    /// An image of the run is missing or has changed (only with `keep_images: reference`).
    #[error("image {id}: {problem}")]
    Image { id: String, problem: String },
    /// A stop was requested while a file was read.
    #[error("interrupted")]
    Stopped,
}

impl StoreError {
    /// Adds the path and the failed action to an I/O error.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

/// Formats an I/O error, with a fix for the most common ones.
fn plain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "the disk is full; free some space and run again (finished work is kept)".to_owned()
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            format!("{error}; choose a writable folder with --run")
        }
        _ => error.to_string(),
    }
}
