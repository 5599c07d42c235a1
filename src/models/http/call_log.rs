//! The call log of a judge: one line of JSON per call to an endpoint.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::ModelError;
use ovchat_io::files::lines::LineFile;
use ovchat_io::files::{create_folder, folder_of};

/// Maximum plausible number of tokens of a call.
pub const TOKENS_MAX: u64 = 1_000_000_000;

/// A call that was answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Call {
    /// The name of the judge in the pipeline.
    pub judge: String,
    /// SHA-256 of the request: model, text, images and sampling settings.
    pub hash: String,
    /// The id of the prompt.
    pub about: String,
    pub model: String,
    /// Earlier attempts whose replies were not readable.
    pub attempt: u32,
    pub reply: String,
    pub prompt_tokens: u64,
    pub reply_tokens: u64,
    pub milliseconds: u64,
    /// Time of the reply, in seconds since 1970.
    pub at: u64,
}

impl Call {
    /// True if the numbers are plausible. The table `calls` stores them as signed integers.
    fn is_plausible(&self) -> bool {
        let times = [self.milliseconds, self.at];
        [self.prompt_tokens, self.reply_tokens]
            .iter()
            .all(|tokens| *tokens <= TOKENS_MAX)
            && times.iter().all(|time| i64::try_from(*time).is_ok())
            && i32::try_from(self.attempt).is_ok()
    }
}

/// The call log of one judge and run.
pub struct CallLog {
    path: PathBuf,
    file: LineFile,
    known: LoggedCalls,
    /// A note on lines that were skipped when the log was opened.
    pub note: Option<String>,
}

/// The contents of the log in memory.
#[derive(Default)]
struct LoggedCalls {
    replies: HashMap<String, String>,
    /// Prompt and reply tokens so far.
    tokens: [u64; 2],
}

impl LoggedCalls {
    fn take(&mut self, call: Call) {
        let [read, written] = &mut self.tokens;
        *read = read.saturating_add(call.prompt_tokens);
        *written = written.saturating_add(call.reply_tokens);
        self.replies.insert(call.hash, call.reply);
    }
}

impl CallLog {
    /// Opens the call log, creating it if it does not exist. Lines that are not valid calls, such
    /// as a truncated last line, are moved aside.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let failed = |error: std::io::Error| ModelError::Weights {
            path: path.to_owned(),
            problem: format!("cannot open the call log: {error}"),
        };
        create_folder(folder_of(path)).map_err(failed)?;
        let mut known = LoggedCalls::default();
        let (file, note) = LineFile::open(path, |line| {
            let call = serde_json::from_slice::<Call>(line).ok();
            let call = call.filter(Call::is_plausible);
            call.map(|call| known.take(call)).is_some()
        })
        .map_err(failed)?;
        let note = note.map(|note| format!("{note}; their requests are sent again"));
        Ok(Self {
            path: path.to_owned(),
            file,
            known,
            note,
        })
    }

    /// Returns the reply to the request with this hash.
    pub fn reply(&self, hash: &str) -> Option<&String> {
        self.known.replies.get(hash)
    }

    pub fn is_empty(&self) -> bool {
        self.known.replies.is_empty()
    }

    /// Returns the numbers of prompt and reply tokens so far.
    pub fn tokens(&self) -> [u64; 2] {
        self.known.tokens
    }

    /// Appends a call and syncs it to disk.
    pub fn write(&mut self, call: Call) -> Result<(), ModelError> {
        let line = serde_json::to_vec(&call).expect("text and numbers are valid JSON");
        let written = self.file.append(&line);
        written.map_err(|error| ModelError::Weights {
            path: self.path.clone(),
            problem: format!("cannot write the call log: {error}"),
        })?;
        self.known.take(call);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

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
        let mut journal = CallLog::open(&path).unwrap();
        journal.write(call("a")).unwrap();
        journal.write(call("b")).unwrap();
        let text = fs::read(&path).unwrap();
        fs::write(&path, &text[..text.len() - 3]).unwrap();
        let mut again = CallLog::open(&path).unwrap();
        assert!(again.note.is_some(), "one line was truncated");
        assert_eq!((again.known.replies.len(), again.tokens()), (1, [10, 2]));
        assert_eq!(again.reply("a").unwrap(), "7 ü\n");
        again.write(call("c")).unwrap();
        // Implausible numbers that would make every later start fail.
        let mut poisoned = fs::read_to_string(&path).unwrap();
        let line = serde_json::to_string(&call("d")).unwrap();
        let line = line.replace(
            "\"prompt_tokens\":10",
            "\"prompt_tokens\":18446744073709551615",
        );
        poisoned.insert_str(0, &(line + "\nnonsense\n"));
        fs::write(&path, poisoned).unwrap();
        let last = CallLog::open(&path).unwrap();
        assert!(
            last.note
                .is_some_and(|note| note.contains("moved 2 corrupt lines"))
        );
        assert_eq!((last.known.replies.len(), last.known.tokens), (2, [20, 4]));
        assert_eq!(CallLog::open(&path).unwrap().note, None);
    }
}
