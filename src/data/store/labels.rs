//! What people said of answers, and what they are asked.
//!
//! `human_labels/<table>-round-2.json` says what a run waits for, `human_labels/<table>-round-2.jsonl` holds what was
//! said, a line a label, synced one by one. The last line with an id counts, so that taking a label back
//! is a line, too. Who writes them holds `human_labels/<table>-round-2.lock`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Lock, StoreError, create_folder, write_atomically};
use ovchat_io::files::lines::{self, LineFile};

/// The folder, in that of a run.
pub const LABELS: &str = "human_labels";

/// The largest number in a label: every program can read it, and count on.
pub const NUMBER_MAX: u64 = 1 << 53;

/// What people are asked about the candidates of a round.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelTask {
    /// The table that waits.
    pub table: String,
    pub round: Option<u32>,
    pub candidates: String,
    /// The round of the candidates, where they have one.
    pub candidates_round: Option<u32>,
    pub prompts: String,
    pub prompts_round: Option<u32>,
    /// Tables of rewards: those about which they disagree most are asked first.
    pub rewards: Vec<String>,
    /// Labels that are wanted.
    pub wanted: u64,
}

/// What somebody said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LabelVerdict {
    Left,
    Right,
    Tie,
    BothBad,
    /// Somebody else may say.
    Skip,
    /// It was taken back.
    Undone,
}

/// A label: two answers side by side, and what somebody said of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelLine {
    /// Its number among those of the survey.
    pub id: u64,
    pub prompt_id: String,
    /// The candidates that were shown, and SHA-256 of their texts.
    pub left: i32,
    pub right: i32,
    pub left_digest: String,
    pub right_digest: String,
    pub said: LabelVerdict,
    /// Who said it.
    pub by: String,
    /// When, in seconds since 1970.
    pub at: u64,
    /// How long it took.
    pub milliseconds: u64,
}

/// The files of a survey.
#[derive(Debug, Clone)]
pub struct LabelFiles {
    folder: PathBuf,
    stem: String,
}

impl LabelFiles {
    /// Those of a table in a round, in the run's folder `root`.
    pub fn new(root: &Path, table: &str, round: Option<u32>) -> Self {
        let round = round.map_or_else(String::new, |round| format!("-round-{round}"));
        Self {
            folder: root.join(LABELS),
            stem: format!("{table}{round}"),
        }
    }

    /// Every survey of a run.
    pub fn surveys(root: &Path) -> Vec<LabelTask> {
        let entries = fs::read_dir(root.join(LABELS)).into_iter().flatten();
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let mut paths: Vec<PathBuf> = paths
            .filter(|path| path.extension() == Some("json".as_ref()))
            .collect();
        paths.sort();
        let read = |path: &PathBuf| serde_json::from_slice(&fs::read(path).ok()?).ok();
        paths.iter().filter_map(read).collect()
    }

    /// The file of labels.
    pub fn path(&self) -> PathBuf {
        self.folder.join(format!("{}.jsonl", self.stem))
    }

    /// Says what people are to be asked.
    pub fn ask(&self, task: &LabelTask) -> Result<(), StoreError> {
        create_folder(&self.folder)?;
        let text = serde_json::to_vec_pretty(task).expect("names and numbers are valid JSON");
        write_atomically(&self.folder.join(format!("{}.json", self.stem)), &text)
    }

    /// The labels that count, in the order of their ids, and how many lines are none: they were cut off, or
    /// something else has written them.
    pub fn read(&self) -> Result<(Vec<LabelLine>, usize), StoreError> {
        LabelLine::read(&self.path())
    }

    /// Opens the file of labels for the one who writes them, or says who does.
    pub fn write(&self) -> Result<LabelWriter, StoreError> {
        create_folder(&self.folder)?;
        let path = self.path();
        let lock = Lock::of_survey(&self.folder.join(format!("{}.lock", self.stem)), &self.stem)?;
        let mut words = BTreeMap::new();
        let (file, note) = LineFile::open(&path, |line| take(&mut words, line))
            .map_err(StoreError::io("write", &path))?;
        Ok(LabelWriter {
            labels: counting(&words),
            next_id: words.last_key_value().map_or(0, |(id, _)| id + 1),
            note,
            path,
            file,
            _lock: lock,
        })
    }
}

impl LabelLine {
    /// Reads a file of labels, see [`LabelFiles::read`].
    pub fn read(path: &Path) -> Result<(Vec<Self>, usize), StoreError> {
        let mut words = BTreeMap::new();
        let spoiled = lines::each(path, |line| take(&mut words, line));
        let spoiled = spoiled.map_err(StoreError::io("read", path))?;
        Ok((counting(&words), spoiled))
    }
}

/// Takes a line in, as the last word on its id. Returns whether it is a label.
fn take(words: &mut BTreeMap<u64, LabelLine>, line: &[u8]) -> bool {
    let label = serde_json::from_slice::<LabelLine>(line).ok();
    let label = label.filter(|label| {
        let numbers = [label.id, label.at, label.milliseconds];
        numbers.iter().all(|number| *number <= NUMBER_MAX)
    });
    label.map(|label| words.insert(label.id, label)).is_some()
}

/// The labels that were not taken back.
fn counting(words: &BTreeMap<u64, LabelLine>) -> Vec<LabelLine> {
    let counts = |label: &&LabelLine| label.said != LabelVerdict::Undone;
    words.values().filter(counts).cloned().collect()
}

/// The one who writes what people say.
pub struct LabelWriter {
    /// The labels that counted when it was opened, in the order of their ids.
    pub labels: Vec<LabelLine>,
    /// An id that no label has, nor one that was taken back.
    pub next_id: u64,
    /// What was set aside, in words.
    pub note: Option<String>,
    path: PathBuf,
    file: LineFile,
    _lock: Lock,
}

impl LabelWriter {
    /// Adds a label, and waits until it is on the disk.
    pub fn add(&mut self, label: &LabelLine) -> Result<(), StoreError> {
        if label.id > NUMBER_MAX {
            let problem = format!(
                "label ids are used up: a line has the id {}; remove that line",
                label.id - 1
            );
            return Err(StoreError::io("write", &self.path)(io::Error::other(
                problem,
            )));
        }
        let line = serde_json::to_vec(label).expect("names and numbers are valid JSON");
        let added = self.file.append(&line);
        added.map_err(StoreError::io("write", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_counts_and_what_was_cut_off_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let files = LabelFiles::new(folder.path(), "pairs", Some(2));
        assert!(files.read().unwrap().0.is_empty());
        let label = |id, said| LabelLine {
            id,
            prompt_id: "p".to_owned(),
            left: 0,
            right: 1,
            left_digest: "a".to_owned(),
            right_digest: "b".to_owned(),
            said,
            by: "ann".to_owned(),
            at: 0,
            milliseconds: 10,
        };
        let mut writer = files.write().unwrap();
        let refused = files.write().err().expect("one writer").to_string();
        let this = format!("process {}", std::process::id());
        assert!(refused.contains(&this), "{refused}");
        for (id, said) in [
            (0, LabelVerdict::Left),
            (1, LabelVerdict::Tie),
            (0, LabelVerdict::Undone),
        ] {
            writer.add(&label(id, said)).unwrap();
        }
        drop(writer);
        // Inside the first letter of a name.
        let mut text = fs::read(files.path()).unwrap();
        text.extend(b"{\"id\": 2, \"by\": \"\xc3");
        fs::write(files.path(), text).unwrap();
        assert_eq!(files.read().unwrap().1, 1);
        let mut writer = files.write().unwrap();
        assert!(writer.note.is_some());
        writer.add(&label(3, LabelVerdict::Right)).unwrap();
        let (labels, spoiled) = files.read().unwrap();
        let said: Vec<_> = labels.iter().map(|label| (label.id, label.said)).collect();
        assert_eq!(
            (&said[..], spoiled),
            (&[(1, LabelVerdict::Tie), (3, LabelVerdict::Right)][..], 0)
        );
        writer.add(&label(9, LabelVerdict::Undone)).unwrap();
        drop(writer);
        assert_eq!(files.write().unwrap().next_id, 10, "no id comes twice");

        // A label that the reader would not take is not acknowledged.
        let mut writer = files.write().unwrap();
        writer.add(&label(NUMBER_MAX, LabelVerdict::Left)).unwrap();
        drop(writer);
        let mut writer = files.write().unwrap();
        let refused = writer.add(&label(writer.next_id, LabelVerdict::Left));
        assert!(
            refused
                .unwrap_err()
                .to_string()
                .contains("9007199254740992")
        );
    }
}
