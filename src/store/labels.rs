//! What people said of answers, and what they are asked.
//!
//! `human_labels/<table>-round-2.json` says what a run waits for, `human_labels/<table>-round-2.jsonl` holds what was
//! said, a line a label, synced one by one. The last line with an id counts, so that taking a label back
//! is a line, too.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{StoreError, create_folder, write_atomically};

/// The folder, in that of a run.
pub const LABELS: &str = "human_labels";

/// What people are asked about the candidates of a round.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Survey {
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
pub enum Said {
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
pub struct Label {
    /// Its number among those of the survey.
    pub id: u64,
    pub prompt_id: String,
    /// The candidates that were shown, and SHA-256 of their texts.
    pub left: i32,
    pub right: i32,
    pub left_digest: String,
    pub right_digest: String,
    pub said: Said,
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
    pub fn surveys(root: &Path) -> Vec<Survey> {
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
    pub fn ask(&self, survey: &Survey) -> Result<(), StoreError> {
        create_folder(&self.folder)?;
        let text = serde_json::to_vec_pretty(survey).expect("names and numbers are valid JSON");
        write_atomically(&self.folder.join(format!("{}.json", self.stem)), &text)
    }

    /// The labels that count, in the order of their ids. A line that was cut off is none.
    pub fn read(&self) -> Result<Vec<Label>, StoreError> {
        let counts = |label: &Label| label.said != Said::Undone;
        let labels = self.last_words()?.into_values();
        Ok(labels.filter(counts).collect())
    }

    /// An id that no label has, nor one that was taken back.
    pub fn next_id(&self) -> Result<u64, StoreError> {
        let labels = self.last_words()?;
        Ok(labels.last_key_value().map_or(0, |(id, _)| id + 1))
    }

    /// The last line of each id.
    fn last_words(&self) -> Result<BTreeMap<u64, Label>, StoreError> {
        let path = self.path();
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(BTreeMap::new());
            }
            Err(error) => return Err(StoreError::io("read", &path)(error)),
        };
        let mut labels = BTreeMap::new();
        for line in BufReader::new(file).lines() {
            let line = line.map_err(StoreError::io("read", &path))?;
            if let Ok(label) = serde_json::from_str::<Label>(&line) {
                labels.insert(label.id, label);
            }
        }
        Ok(labels)
    }

    /// Adds a label, and waits until it is on the disk.
    pub fn add(&self, label: &Label) -> Result<(), StoreError> {
        let path = self.path();
        create_folder(&self.folder)?;
        let mut options = OpenOptions::new();
        let mut file = options
            .create(true)
            .append(true)
            .open(&path)
            .map_err(StoreError::io("write", &path))?;
        let mut line = serde_json::to_vec(label).expect("names and numbers are valid JSON");
        // A line that a crash cut off must not swallow this one.
        line.insert(0, b'\n');
        line.push(b'\n');
        file.write_all(&line)
            .and_then(|()| file.sync_data())
            .map_err(StoreError::io("write", &path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_counts_and_what_was_cut_off_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let files = LabelFiles::new(folder.path(), "pairs", Some(2));
        assert!(files.read().unwrap().is_empty());
        let label = |id, said| Label {
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
        files.add(&label(0, Said::Left)).unwrap();
        files.add(&label(1, Said::Tie)).unwrap();
        files.add(&label(0, Said::Undone)).unwrap();
        let mut text = fs::read(files.path()).unwrap();
        text.extend(b"\n{\"id\": 2, \"prom");
        fs::write(files.path(), text).unwrap();
        files.add(&label(3, Said::Right)).unwrap();
        let said: Vec<_> = files
            .read()
            .unwrap()
            .into_iter()
            .map(|label| (label.id, label.said))
            .collect();
        assert_eq!(said, [(1, Said::Tie), (3, Said::Right)]);
        files.add(&label(9, Said::Undone)).unwrap();
        assert_eq!(files.next_id().unwrap(), 10, "no id comes twice");
    }
}
