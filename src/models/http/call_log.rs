//! The calls of a run, a line each.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::ModelError;
use ovchat_io::files::lines::LineFile;
use ovchat_io::files::{create_folder, folder_of};

/// The most tokens that a call is believed to have read or written.
pub const TOKENS_MAX: u64 = 1_000_000_000;

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

impl Call {
    /// Whether its numbers can be. The table `calls` has them as signed integers.
    fn is_plausible(&self) -> bool {
        let times = [self.milliseconds, self.at];
        [self.prompt_tokens, self.reply_tokens]
            .iter()
            .all(|tokens| *tokens <= TOKENS_MAX)
            && times.iter().all(|time| i64::try_from(*time).is_ok())
            && i32::try_from(self.attempt).is_ok()
    }
}

/// The calls of a run.
pub struct CallLog {
    path: PathBuf,
    file: LineFile,
    known: LoggedCalls,
    /// What was set aside when it was opened, in words.
    pub note: Option<String>,
}

/// What the journal says.
#[derive(Default)]
struct LoggedCalls {
    replies: HashMap<String, String>,
    /// Tokens read and written so far.
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
    /// Opens the journal, and begins one where there is none. Lines that are no calls, the last one where
    /// it was cut off among them, are set aside.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let failed = |error: std::io::Error| ModelError::Weights {
            path: path.to_owned(),
            problem: format!("the journal of calls: {error}"),
        };
        create_folder(folder_of(path)).map_err(failed)?;
        let mut known = LoggedCalls::default();
        let (file, note) = LineFile::open(path, |line| {
            let call = serde_json::from_slice::<Call>(line).ok();
            let call = call.filter(Call::is_plausible);
            call.map(|call| known.take(call)).is_some()
        })
        .map_err(failed)?;
        let note = note.map(|note| format!("{note}; what they asked is asked again"));
        Ok(Self {
            path: path.to_owned(),
            file,
            known,
            note,
        })
    }

    /// The reply to what has this hash.
    pub fn reply(&self, hash: &str) -> Option<&String> {
        self.known.replies.get(hash)
    }

    pub fn is_empty(&self) -> bool {
        self.known.replies.is_empty()
    }

    /// Tokens read and written so far.
    pub fn tokens(&self) -> [u64; 2] {
        self.known.tokens
    }

    /// Adds a call, and waits until it is on the disk.
    pub fn write(&mut self, call: Call) -> Result<(), ModelError> {
        let line = serde_json::to_vec(&call).expect("text and numbers are valid JSON");
        let written = self.file.append(&line);
        written.map_err(|error| ModelError::Weights {
            path: self.path.clone(),
            problem: format!("the journal of calls: {error}"),
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
        assert!(again.note.is_some(), "one was cut off");
        assert_eq!((again.known.replies.len(), again.tokens()), (1, [10, 2]));
        assert_eq!(again.reply("a").unwrap(), "7 ü\n");
        again.write(call("c")).unwrap();
        // Numbers that can't be, and would stop every later start.
        let mut poisoned = fs::read_to_string(&path).unwrap();
        let line = serde_json::to_string(&call("d")).unwrap();
        let line = line.replace(
            "\"prompt_tokens\":10",
            "\"prompt_tokens\":18446744073709551615",
        );
        poisoned.insert_str(0, &(line + "\nnonsense\n"));
        fs::write(&path, poisoned).unwrap();
        let last = CallLog::open(&path).unwrap();
        assert!(last.note.is_some_and(|note| note.contains("2 lines were")));
        assert_eq!((last.known.replies.len(), last.known.tokens), (2, [20, 4]));
        assert_eq!(CallLog::open(&path).unwrap().note, None);
    }
}
