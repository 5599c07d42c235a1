//! Storage of labels and labeling tasks.
//!
//! `human_labels/<table>-round-2.json` is the labeling task that a run waits for, and
//! `human_labels/<table>-round-2.jsonl` contains its labels, one per line, each synced. The last
//! line with an ID is used, so that retracting a label also appends a line. The writer holds
//! `human_labels/<table>-round-2.lock`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Lock, StoreError, create_folder, write_atomically};
use ovchat_io::files::lines::{self, LineFile};

/// The name of the labels folder within a run.
pub const LABELS: &str = "human_labels";

/// The largest number in a label. All programs can represent it exactly and increment it.
pub const NUMBER_MAX: u64 = 1 << 53;

/// A labeling task: the candidates of a round to be compared by annotators.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelTask {
    /// The table that waits for the labels.
    pub table: String,
    pub round: Option<u32>,
    pub candidates: String,
    /// The round of the candidates, if they have one.
    pub candidates_round: Option<u32>,
    pub prompts: String,
    pub prompts_round: Option<u32>,
    /// Reward tables; candidates on which they disagree most are shown first.
    pub rewards: Vec<String>,
    /// The number of labels wanted.
    pub wanted: u64,
}

/// The verdict of an annotator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LabelVerdict {
    Left,
    Right,
    Tie,
    BothBad,
    /// Left to another annotator.
    Skip,
    /// The label was retracted.
    Undone,
}

/// A label: an annotator's verdict on two responses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelLine {
    /// The number of the label within its labeling task.
    pub id: u64,
    pub prompt_id: String,
    /// The two candidates, and the SHA-256 of their texts.
    pub left: i32,
    pub right: i32,
    pub left_digest: String,
    pub right_digest: String,
    pub said: LabelVerdict,
    /// The name of the annotator.
    pub by: String,
    /// The time of the label, in seconds since the Unix epoch.
    pub at: u64,
    /// The time that the annotator took, in milliseconds.
    pub milliseconds: u64,
}

/// The files of a labeling task.
#[derive(Debug, Clone)]
pub struct LabelFiles {
    folder: PathBuf,
    stem: String,
}

impl LabelFiles {
    /// Returns the files of a table in a round, in the run folder `root`.
    pub fn new(root: &Path, table: &str, round: Option<u32>) -> Self {
        let round = round.map_or_else(String::new, |round| format!("-round-{round}"));
        Self {
            folder: root.join(LABELS),
            stem: format!("{table}{round}"),
        }
    }

    /// Returns all labeling tasks of a run.
    pub fn tasks(root: &Path) -> Vec<LabelTask> {
        let entries = fs::read_dir(root.join(LABELS)).into_iter().flatten();
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let mut paths: Vec<PathBuf> = paths
            .filter(|path| path.extension() == Some("json".as_ref()))
            .collect();
        paths.sort();
        let read = |path: &PathBuf| serde_json::from_slice(&fs::read(path).ok()?).ok();
        paths.iter().filter_map(read).collect()
    }

    /// Returns the path of the label file.
    pub fn path(&self) -> PathBuf {
        self.folder.join(format!("{}.jsonl", self.stem))
    }

    /// Writes the labeling task.
    pub fn ask(&self, task: &LabelTask) -> Result<(), StoreError> {
        create_folder(&self.folder)?;
        let text = serde_json::to_vec_pretty(task).expect("names and numbers serialize");
        write_atomically(&self.folder.join(format!("{}.json", self.stem)), &text)
    }

    /// Reads the labels that are in effect, in the order of their IDs, and the number of corrupt
    /// lines, which are truncated or were written by another program.
    pub fn read(&self) -> Result<(Vec<LabelLine>, usize), StoreError> {
        LabelLine::read(&self.path())
    }

    /// Opens the label file for writing. The error names the process that already has it open.
    pub fn write(&self) -> Result<LabelWriter, StoreError> {
        create_folder(&self.folder)?;
        let path = self.path();
        let lock = Lock::of_task(&self.folder.join(format!("{}.lock", self.stem)), &self.stem)?;
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
    /// Reads a label file, see [`LabelFiles::read`].
    pub fn read(path: &Path) -> Result<(Vec<Self>, usize), StoreError> {
        let mut words = BTreeMap::new();
        let corrupt = lines::each(path, |line| take(&mut words, line));
        let corrupt = corrupt.map_err(StoreError::io("read", path))?;
        Ok((counting(&words), corrupt))
    }
}

/// Adds a line as the latest one for its ID. Returns true if it is a valid label.
fn take(words: &mut BTreeMap<u64, LabelLine>, line: &[u8]) -> bool {
    let label = serde_json::from_slice::<LabelLine>(line).ok();
    let label = label.filter(|label| {
        let numbers = [label.id, label.at, label.milliseconds];
        numbers.iter().all(|number| *number <= NUMBER_MAX)
    });
    label.map(|label| words.insert(label.id, label)).is_some()
}

/// Returns the labels that were not retracted.
fn counting(words: &BTreeMap<u64, LabelLine>) -> Vec<LabelLine> {
    let counts = |label: &&LabelLine| label.said != LabelVerdict::Undone;
    words.values().filter(counts).cloned().collect()
}

/// A writer of labels, which holds the lock of the labeling task.
pub struct LabelWriter {
    /// The labels in effect when the file was opened, in the order of their IDs.
    pub labels: Vec<LabelLine>,
    /// An ID that is unused, also by retracted labels.
    pub next_id: u64,
    /// A note about corrupt lines that were set aside.
    pub note: Option<String>,
    path: PathBuf,
    file: LineFile,
    _lock: Lock,
}

impl LabelWriter {
    /// Appends a label and syncs it to disk.
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
        let line = serde_json::to_vec(label).expect("names and numbers serialize");
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
        // Truncated inside a multi-byte character of a name.
        let mut text = fs::read(files.path()).unwrap();
        text.extend(b"{\"id\": 2, \"by\": \"\xc3");
        fs::write(files.path(), text).unwrap();
        assert_eq!(files.read().unwrap().1, 1);
        let mut writer = files.write().unwrap();
        assert!(writer.note.is_some());
        writer.add(&label(3, LabelVerdict::Right)).unwrap();
        let (labels, corrupt) = files.read().unwrap();
        let said: Vec<_> = labels.iter().map(|label| (label.id, label.said)).collect();
        assert_eq!(
            (&said[..], corrupt),
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
