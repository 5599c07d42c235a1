//! Reading files that a user names, appending to line files, and durable folders. Only regular
//! files are read: opening a FIFO blocks until a writer appears, and a device may never end.

mod caught;
pub mod lines;

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

pub use caught::caught;

/// Opens a regular file for reading. For anything else, the error names the kind of file.
pub fn open(path: &Path) -> io::Result<File> {
    // Opening a device can change its state, so the metadata is checked first. If the file is
    // replaced in between, the second check rejects the new one; `O_NONBLOCK` keeps the open from
    // blocking.
    regular(&path.metadata()?)?;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    regular(&file.metadata()?)?;
    Ok(file)
}

/// Reads a regular file.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    read_at_most(path, FILE_MAX)
}

/// Reads a regular file of at most `most` bytes.
pub fn read_at_most(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut file = open(path)?;
    let too_large = || {
        let problem = format!("it is larger than {} MB", most >> 20);
        io::Error::new(io::ErrorKind::FileTooLarge, problem)
    };
    let length = file.metadata()?.len();
    if length > most {
        return Err(too_large());
    }
    let mut bytes = Vec::with_capacity(length.min(PIECE) as usize);
    // Some files, such as those in /proc, are longer than their reported size.
    while file.by_ref().take(PIECE).read_to_end(&mut bytes)? > 0 {
        if bytes.len() as u64 > most {
            return Err(too_large());
        }
        if bytes.len() as u64 >= PIECE && stopped() {
            return Err(stop());
        }
    }
    Ok(bytes)
}

/// Reads a regular file as UTF-8 text.
pub fn read_to_string(path: &Path) -> io::Result<String> {
    let bytes = read_at_most(path, TEXT_MAX)?;
    String::from_utf8(bytes).map_err(|_| {
        let problem = "stream did not contain valid UTF-8";
        io::Error::new(io::ErrorKind::InvalidData, problem)
    })
}

/// The maximum size in bytes of a file that is read as a whole, such as an image or a list.
const FILE_MAX: u64 = 4 << 30;

/// The maximum size in bytes of a hand-written text file: a pipeline, a template, a query.
pub const TEXT_MAX: u64 = 64 << 20;

/// Bytes read between two checks of the stop flag.
const PIECE: u64 = 8 << 20;

static STOP: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Registers the flag that interrupts reads of large files, here and wherever [`stopped`] is
/// checked. Only the first registered flag is used.
pub fn stop_when(flag: Arc<AtomicBool>) {
    let _ = STOP.set(flag);
}

/// True if a stop was requested.
pub fn stopped() -> bool {
    STOP.get().is_some_and(|flag| flag.load(Ordering::Relaxed))
}

fn stop() -> io::Error {
    io::Error::other("interrupted")
}

/// A reader of a regular file that fails once a stop is requested.
pub struct Stream(File);

impl Stream {
    pub fn open(path: &Path) -> io::Result<Self> {
        open(path).map(Self)
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if stopped() {
            return Err(stop());
        }
        self.0.read(buffer)
    }
}

/// The kind of a file that is neither a regular file nor a folder, with its article: `a FIFO`.
pub fn special(metadata: &Metadata) -> Option<&'static str> {
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_dir() {
        None
    } else if kind.is_fifo() {
        Some("a FIFO")
    } else if kind.is_socket() {
        Some("a socket")
    } else {
        Some("a device")
    }
}

/// Returns the folder that contains a file.
pub fn folder_of(path: &Path) -> &Path {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new("."))
}

/// Creates a folder and its missing ancestors, synced so that they survive a power loss.
pub fn create_folder(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let above = folder_of(folder);
    create_folder(above)?;
    match fs::create_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => sync_folder(above),
    }
}

/// Syncs a folder, so that new files, renames and removals in it survive a power loss.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

fn regular(metadata: &Metadata) -> io::Result<()> {
    let kind = match special(metadata) {
        Some(kind) => kind,
        None if metadata.is_dir() => "a directory",
        None => return Ok(()),
    };
    let problem = format!("it is {kind}, not a regular file");
    Err(io::Error::new(io::ErrorKind::InvalidInput, problem))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_are_opened_and_nothing_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status();
        assert!(made.unwrap().success());
        let text = folder.path().join("text");
        std::fs::write(&text, "words").unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&text, &link).unwrap();
        assert_eq!(read_to_string(&link).unwrap(), "words");
        assert_eq!(read(&text).unwrap(), b"words");
        for (path, problem) in [
            (fifo.as_path(), "it is a FIFO, not a regular file"),
            (Path::new("/dev/zero"), "it is a device, not a regular file"),
            (folder.path(), "it is a directory, not a regular file"),
        ] {
            assert_eq!(read(path).unwrap_err().to_string(), problem);
            assert_eq!(open(path).unwrap_err().to_string(), problem);
        }
        assert_eq!(read_at_most(&text, 5).unwrap(), b"words");
        let large = read_at_most(&text, 4).unwrap_err();
        assert_eq!(large.kind(), io::ErrorKind::FileTooLarge);
        // Its reported size is 0.
        assert!(
            !read_to_string(Path::new("/proc/self/status"))
                .unwrap()
                .is_empty()
        );
        let missing = read(&folder.path().join("missing")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }
}
