//! Append-only files of lines that remain readable after some lines were corrupted by a crash or
//! another program. Readers skip corrupt lines; before the next append, the writer moves them, byte
//! for byte, to a `.torn` file next to the original.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use super::{folder_of, sync_folder};

/// The extension of the file that receives the corrupt lines.
const TORN: &str = "torn";

/// The extension of the temporary file that collects the valid lines and then replaces the
/// original.
const NEW: &str = "new";

/// The maximum length of a line in bytes. It bounds the memory used for a file without line ends.
const LINE_MAX: u64 = 64 << 20;

/// An iterator over the complete, non-blank lines of a file, without their line ends.
pub struct Lines<R> {
    reader: R,
    line: Vec<u8>,
}

impl<R: BufRead> Lines<R> {
    pub fn new(reader: R) -> Self {
        Self {
            reader,
            line: Vec::new(),
        }
    }

    /// Reads the next line. `Err` holds one that is truncated or too long.
    fn next_line(&mut self) -> io::Result<Option<Result<&[u8], &[u8]>>> {
        loop {
            self.line.clear();
            let mut limited = (&mut self.reader).take(LINE_MAX);
            if limited.read_until(b'\n', &mut self.line)? == 0 {
                return Ok(None);
            }
            if self.line.last() != Some(&b'\n') {
                return Ok(Some(Err(&self.line)));
            }
            if !self.line.trim_ascii().is_empty() {
                return Ok(Some(Ok(self.line.trim_ascii_end())));
            }
        }
    }

    /// Passes every complete line to `take`, which returns true for a valid one. Returns the number
    /// of invalid lines, including a truncated last line.
    pub fn each(mut self, mut take: impl FnMut(&[u8]) -> bool) -> io::Result<usize> {
        let mut corrupt = 0;
        while let Some(line) = self.next_line()? {
            corrupt += usize::from(!line.is_ok_and(&mut take));
        }
        Ok(corrupt)
    }
}

impl<R: BufRead> Iterator for Lines<R> {
    type Item = io::Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.next_line() {
                Ok(Some(Ok(line))) => return Some(Ok(line.to_vec())),
                Ok(Some(Err(_))) => {}
                Ok(None) => return None,
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// Passes the lines of a file to `take`; see [`Lines::each`]. A missing file has no lines.
pub fn each(path: &Path, take: impl FnMut(&[u8]) -> bool) -> io::Result<usize> {
    match File::open(path) {
        Ok(file) => Lines::new(BufReader::new(file)).each(take),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
}

/// A file of lines that only this process appends to.
#[derive(Debug)]
pub struct LineFile {
    file: File,
    /// Byte offset of the end of its last complete line.
    end: u64,
}

impl LineFile {
    /// Opens a file, or creates it if it is missing. `take` receives every line and returns true
    /// for a valid one. Invalid lines are moved to the `.torn` file, and the second return value is
    /// a note about them.
    pub fn open(
        path: &Path,
        mut take: impl FnMut(&[u8]) -> bool,
    ) -> io::Result<(Self, Option<String>)> {
        let mut options = OpenOptions::new();
        let options = options.create(true).append(true).read(true);
        let file = options.open(path)?;
        let mut corrupt: Vec<u8> = Vec::new();
        let mut count = 0;
        let mut lines = Lines::new(BufReader::new(&file));
        // End of the valid lines before the first corrupt one.
        let mut end = 0;
        // All valid lines, if some come after a corrupt one.
        let new = beside(path, NEW);
        let mut intact: Option<BufWriter<File>> = None;
        while let Some(line) = lines.next_line()? {
            match line {
                Ok(line) if take(line) => {
                    if count > 0 {
                        let intact = match &mut intact {
                            Some(intact) => intact,
                            none => none.insert(prefix(path, end, &new)?),
                        };
                        intact.write_all(line)?;
                        intact.write_all(b"\n")?;
                    }
                }
                Ok(line) | Err(line) => {
                    count += 1;
                    corrupt.extend(line);
                    corrupt.push(b'\n');
                }
            }
            if count == 0 {
                end = lines.reader.stream_position()?;
            }
        }
        let aside = beside(path, TORN);
        if count > 0 {
            let mut aside = options.open(&aside)?;
            aside.write_all(&corrupt)?;
            aside.sync_data()?;
        }
        // Sync the folder, so that a new file survives a power loss.
        let folder = folder_of(path);
        sync_folder(folder)?;
        if count == 0 {
            return Ok((Self { file, end }, None));
        }
        let note = format!(
            "{}: moved {count} corrupt {} to {}",
            path.display(),
            if count == 1 { "line" } else { "lines" },
            aside.display()
        );
        let Some(intact) = intact else {
            file.set_len(end)?;
            file.sync_data()?;
            return Ok((Self { file, end }, Some(note)));
        };
        let intact = intact.into_inner()?;
        intact.set_permissions(file.metadata()?.permissions())?;
        intact.sync_all()?;
        let end = intact.metadata()?.len();
        fs::rename(&new, path)?;
        sync_folder(folder)?;
        let file = options.open(path)?;
        Ok((Self { file, end }, Some(note)))
    }

    /// Appends a line and syncs it to disk. Leftovers of a failed append are truncated first.
    pub fn append(&mut self, line: &[u8]) -> io::Result<()> {
        if self.file.metadata()?.len() != self.end {
            self.file.set_len(self.end)?;
        }
        let mut whole = Vec::with_capacity(line.len() + 1);
        whole.extend(line);
        whole.push(b'\n');
        self.file.write_all(&whole)?;
        self.file.sync_data()?;
        self.end += whole.len() as u64;
        Ok(())
    }
}

/// Creates the file `new` with the first `bytes` bytes of another one. A leftover of a crash is
/// overwritten.
fn prefix(path: &Path, bytes: u64, new: &Path) -> io::Result<BufWriter<File>> {
    let mut intact = BufWriter::new(File::create(new)?);
    io::copy(&mut File::open(path)?.take(bytes), &mut intact)?;
    Ok(intact)
}

/// The path of a line file with an additional extension.
fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(ending);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_number(line: &[u8]) -> bool {
        std::str::from_utf8(line).is_ok_and(|text| text.parse::<u32>().is_ok())
    }

    #[test]
    fn corrupt_lines_lie_beside_and_the_next_one_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("numbers.jsonl");
        let mut aside: Vec<u8> = Vec::new();
        let cases: [(&[u8], &[u8], &[u8]); 7] = [
            (b"", b"", b""),
            (b"1\n2\n", b"1\n2\n", b""),
            // The format of earlier versions.
            (b"\n1\n\n2\n", b"\n1\n\n2\n", b""),
            (b"1\n2\n3", b"1\n2\n", b"3\n"),
            (b"1\n\xc3", b"1\n", b"\xc3\n"),
            (b"\xc3", b"", b"\xc3\n"),
            (
                b"1\nx\n2\n\xff\xfe\n3\n4x",
                b"1\n2\n3\n",
                b"x\n\xff\xfe\n4x\n",
            ),
        ];
        for (there, kept, moved) in cases {
            std::fs::write(&path, there).unwrap();
            let (mut file, note) = LineFile::open(&path, is_number).unwrap();
            assert_eq!(note.is_some(), !moved.is_empty(), "{note:?}");
            aside.extend(moved);
            let lies = std::fs::read(folder.path().join("numbers.jsonl.torn"));
            assert_eq!(lies.unwrap_or_default(), aside);
            let names = std::fs::read_dir(folder.path()).unwrap();
            assert_eq!(names.count(), 1 + usize::from(!aside.is_empty()));
            file.append(b"77").unwrap();
            let expected = [kept, b"77\n"].concat();
            assert_eq!(std::fs::read(&path).unwrap(), expected, "{there:?}");
            // Leftover of a failed append.
            let mut broken = OpenOptions::new().append(true).open(&path).unwrap();
            broken.write_all(b"8").unwrap();
            file.append(b"99").unwrap();
            assert_eq!(
                std::fs::read(&path).unwrap(),
                [&expected[..], b"99\n"].concat()
            );
            let mut seen = 0;
            let corrupt = each(&path, |line| {
                seen += 1;
                is_number(line)
            });
            assert_eq!(corrupt.unwrap(), 0);
            assert!(seen >= 2);
        }
        assert_eq!(each(&folder.path().join("none"), |_| true).unwrap(), 0);
    }
}
