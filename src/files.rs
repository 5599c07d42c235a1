//! Reading the files that a user names: regular files and nothing else. Opening a FIFO blocks until
//! something writes to it, and a device may never end. And files that the program itself adds lines to.

pub mod lines;

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;

/// Opens a regular file for reading. Anything else is an error that says what it is.
pub fn open(path: &Path) -> io::Result<File> {
    // Opening a device can already change its state, so it is looked at first; what took its place in
    // between is refused below, without waiting for it.
    regular(&path.metadata()?)?;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    regular(&file.metadata()?)?;
    Ok(file)
}

/// The content of a regular file.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = open(path)?;
    let mut bytes = Vec::with_capacity(file.metadata()?.len() as usize);
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The content of a regular file of UTF-8 text.
pub fn read_to_string(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    open(path)?.read_to_string(&mut text)?;
    Ok(text)
}

/// The kind of a file that is neither regular nor a directory, with its article: `a FIFO`.
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
        let missing = read(&folder.path().join("missing")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }
}
