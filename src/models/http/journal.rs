//! The calls of a run, a line each.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::models::ModelError;

/// A call that was replied to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Call {
    /// The judge, by its name in the pipeline.
    pub judge: String,
    /// SHA-256 of what was asked: model, text, pictures, how the reply is drawn.
    pub hash: String,
    /// What it was about, in words.
    pub about: String,
    pub model: String,
    /// How often it was asked before without a readable reply.
    pub attempt: u32,
    pub reply: String,
    pub prompt_tokens: u64,
    pub reply_tokens: u64,
    pub milliseconds: u64,
    /// When it was replied to, in seconds since 1970.
    pub at: u64,
}

/// The calls of a run.
pub struct Journal {
    path: PathBuf,
    file: File,
    pub replies: HashMap<String, String>,
    /// Tokens read and written so far.
    pub tokens: [u64; 2],
}

impl Journal {
    /// Opens the journal, and begins one where there is none. A line that was cut off is none.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let failed = |error: std::io::Error| ModelError::Weights {
            path: path.to_owned(),
            problem: format!("the journal of calls: {error}"),
        };
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(failed)?;
        }
        let mut options = OpenOptions::new();
        let file = options.create(true).append(true).read(true).open(path);
        let file = file.map_err(failed)?;
        let mut journal = Self {
            path: path.to_owned(),
            replies: HashMap::new(),
            tokens: [0; 2],
            file,
        };
        let mut whole = 0;
        let mut lines = BufReader::new(File::open(path).map_err(failed)?);
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line).map_err(failed)? > 0 {
            if line.last() != Some(&b'\n') {
                break;
            }
            whole += line.len() as u64;
            if let Ok(call) = serde_json::from_slice::<Call>(&line) {
                journal.know(call);
            }
            line.clear();
        }
        journal.file.set_len(whole).map_err(failed)?;
        Ok(journal)
    }

    fn know(&mut self, call: Call) {
        self.tokens[0] += call.prompt_tokens;
        self.tokens[1] += call.reply_tokens;
        self.replies.insert(call.hash, call.reply);
    }

    /// Adds a call, and waits until it is on the disk.
    pub fn write(&mut self, call: Call) -> Result<(), ModelError> {
        let mut line = serde_json::to_vec(&call).expect("text and numbers are valid JSON");
        line.push(b'\n');
        let written = self.file.write_all(&line);
        let written = written.and_then(|()| self.file.sync_data());
        written.map_err(|error| ModelError::Weights {
            path: self.path.clone(),
            problem: format!("the journal of calls: {error}"),
        })?;
        self.know(call);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_forgets_only_what_was_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("calls/judge.jsonl");
        let call = |hash: &str| Call {
            judge: "j".to_owned(),
            hash: hash.to_owned(),
            about: "p".to_owned(),
            model: "m".to_owned(),
            attempt: 0,
            reply: "7 ü\n".to_owned(),
            prompt_tokens: 10,
            reply_tokens: 2,
            milliseconds: 1,
            at: 0,
        };
        let mut journal = Journal::open(&path).unwrap();
        journal.write(call("a")).unwrap();
        journal.write(call("b")).unwrap();
        let text = fs::read(&path).unwrap();
        fs::write(&path, &text[..text.len() - 3]).unwrap();
        let mut again = Journal::open(&path).unwrap();
        assert_eq!((again.replies.len(), again.tokens), (1, [10, 2]));
        assert_eq!(again.replies["a"], "7 ü\n");
        again.write(call("c")).unwrap();
        let last = Journal::open(&path).unwrap();
        assert_eq!((last.replies.len(), last.tokens), (2, [20, 4]));
    }
}
