//! Files that grow by a line at a time, and are read although a crash or another program has spoiled some of
//! their lines. A line that is not sound is passed over by readers; the writer moves it, byte for byte, to a
//! file beside, before the next line is appended.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use super::{folder_of, sync_folder};

/// The ending of the file beside, which takes the spoiled lines.
const TORN: &str = "torn";

/// The ending of the file that takes the sound ones, and then the place of all.
const NEW: &str = "new";

/// The longest line; no more is held in memory of a file without line ends.
const LINE_MAX: u64 = 64 << 20;

/// The lines of a file, without their ends: those that end, and are not blank.
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

    /// The next line; `Err` holds one that was cut off or is too long.
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

    /// Hands every line that ends to `take`, which says whether it is sound. Returns how many are not, the
    /// one that was cut off among them.
    pub fn each(mut self, mut take: impl FnMut(&[u8]) -> bool) -> io::Result<usize> {
        let mut spoiled = 0;
        while let Some(line) = self.next_line()? {
            spoiled += usize::from(!line.is_ok_and(&mut take));
        }
        Ok(spoiled)
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

/// Hands the lines of a file to `take`; see [`Lines::each`]. A file that is not there has none.
pub fn each(path: &Path, take: impl FnMut(&[u8]) -> bool) -> io::Result<usize> {
    match File::open(path) {
        Ok(file) => Lines::new(BufReader::new(file)).each(take),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
}

/// A file of lines that this process alone appends to.
#[derive(Debug)]
pub struct LineFile {
    file: File,
    /// The end of its last whole line.
    end: u64,
}

impl LineFile {
    /// Opens a file, and makes one where there is none. `take` is handed every line and says whether it is
    /// sound; the others are set aside, which is told in words.
    pub fn open(
        path: &Path,
        mut take: impl FnMut(&[u8]) -> bool,
    ) -> io::Result<(Self, Option<String>)> {
        let mut options = OpenOptions::new();
        let options = options.create(true).append(true).read(true);
        let file = options.open(path)?;
        let mut spoiled: Vec<u8> = Vec::new();
        let mut count = 0;
        let mut lines = Lines::new(BufReader::new(&file));
        // The end of the sound lines before the first spoiled one.
        let mut end = 0;
        // All sound lines, where some stand behind a spoiled one.
        let new = beside(path, NEW);
        let mut sound: Option<BufWriter<File>> = None;
        while let Some(line) = lines.next_line()? {
            match line {
                Ok(line) if take(line) => {
                    if count > 0 {
                        let sound = match &mut sound {
                            Some(sound) => sound,
                            none => none.insert(prefix(path, end, &new)?),
                        };
                        sound.write_all(line)?;
                        sound.write_all(b"\n")?;
                    }
                }
                Ok(line) | Err(line) => {
                    count += 1;
                    spoiled.extend(line);
                    spoiled.push(b'\n');
                }
            }
            if count == 0 {
                end = lines.reader.stream_position()?;
            }
        }
        let aside = beside(path, TORN);
        if count > 0 {
            let mut aside = options.open(&aside)?;
            aside.write_all(&spoiled)?;
            aside.sync_data()?;
        }
        // A power loss takes no file away that is new.
        let folder = folder_of(path);
        sync_folder(folder)?;
        if count == 0 {
            return Ok((Self { file, end }, None));
        }
        let note = format!(
            "{}: {count} {} cut off or can't be read; moved to {}",
            path.display(),
            if count == 1 { "line was" } else { "lines were" },
            aside.display()
        );
        let Some(sound) = sound else {
            file.set_len(end)?;
            file.sync_data()?;
            return Ok((Self { file, end }, Some(note)));
        };
        let sound = sound.into_inner()?;
        sound.set_permissions(file.metadata()?.permissions())?;
        sound.sync_all()?;
        let end = sound.metadata()?.len();
        fs::rename(&new, path)?;
        sync_folder(folder)?;
        let file = options.open(path)?;
        Ok((Self { file, end }, Some(note)))
    }

    /// Appends a line, and waits until it is on the disk. What an append that failed has left is cut off
    /// before.
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

/// A new file that begins with so many bytes of another one. What a crash left of it is overwritten.
fn prefix(path: &Path, bytes: u64, new: &Path) -> io::Result<BufWriter<File>> {
    let mut sound = BufWriter::new(File::create(new)?);
    io::copy(&mut File::open(path)?.take(bytes), &mut sound)?;
    Ok(sound)
}

/// The file beside one of lines.
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
    fn spoiled_lines_lie_beside_and_the_next_one_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("numbers.jsonl");
        let mut aside: Vec<u8> = Vec::new();
        let cases: [(&[u8], &[u8], &[u8]); 7] = [
            (b"", b"", b""),
            (b"1\n2\n", b"1\n2\n", b""),
            // As earlier versions wrote them.
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
            // What an append that failed leaves.
            let mut broken = OpenOptions::new().append(true).open(&path).unwrap();
            broken.write_all(b"8").unwrap();
            file.append(b"99").unwrap();
            assert_eq!(
                std::fs::read(&path).unwrap(),
                [&expected[..], b"99\n"].concat()
            );
            let mut seen = 0;
            let spoiled = each(&path, |line| {
                seen += 1;
                is_number(line)
            });
            assert_eq!(spoiled.unwrap(), 0);
            assert!(seen >= 2);
        }
        assert_eq!(each(&folder.path().join("none"), |_| true).unwrap(), 0);
    }
}
