//! How the store fails. Every error names its path.

use std::io;
use std::path::{Path, PathBuf};

use crate::tables::Misfit;

/// Reading or writing a run went wrong.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot {action} {}: {}", path.display(), plain(source))]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// The file is not the Parquet that was written.
    #[error("{} can't be read as Parquet: {problem}", path.display())]
    Parquet { path: PathBuf, problem: String },
    /// The file is not the one that was written.
    #[error(
        "{} is not what was written: its SHA-256 is not the manifest's; a disk or another program has changed it",
        path.display()
    )]
    Spoiled { path: PathBuf },
    #[error("{}: {misfit}", path.display())]
    Misfit { path: PathBuf, misfit: Misfit },
    /// Another process works on the run.
    #[error(
        "the run {} is in use by {holder}; wait for it, stop it, or give this run another folder with --run",
        path.display()
    )]
    Locked { path: PathBuf, holder: String },
    /// Another process takes what people say.
    #[error(
        "`{task}` is asked by {holder}; open the page that it serves, or stop it and start this one again"
    )]
    Asked { task: String, holder: String },
    /// The folder holds the run of another pipeline.
    #[error(
        "{} holds a run of the pipeline `{found}`, not of `{wanted}`; choose another folder with --run",
        path.display()
    )]
    OtherPipeline {
        path: PathBuf,
        found: String,
        wanted: String,
    },
    /// The folder holds something else than a run.
    #[error("{} is not the folder of a run: it has no manifest.json{hint}", path.display())]
    NotARun { path: PathBuf, hint: &'static str },
    /// A file of the manifest is not what was written.
    #[error("{} is damaged: {problem}", path.display())]
    Damaged { path: PathBuf, problem: String },
    /// The manifest can't be understood.
    #[error("{} can't be understood: {problem}", path.display())]
    Manifest { path: PathBuf, problem: String },
    /// A picture of the run is gone or has changed (only with `keep_images: reference`).
    #[error("picture {id}: {problem}")]
    EncodedImage { id: String, problem: String },
    /// Somebody asked to stop while a file was read.
    #[error("interrupted")]
    Stopped,
}

impl StoreError {
    /// Puts the path and what was tried to an I/O error.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

/// The system's words for what people meet most, with the way out.
fn plain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "the disk is full; free some space and run again, what was made is kept".to_owned()
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            format!("{error}; choose a folder that you may write to with --run")
        }
        _ => error.to_string(),
    }
}
