//! A checkpoint's tokenizer, used for plain text only.
//!
//! What people and models wrote must never turn into a token that means something to the program:
//! the text `<image>` or `<|im_end|>` in a question is those characters. So matching of special
//! tokens is off, and special tokens enter a sequence by their ids only. A whole string that the
//! reference tokenizes at once falls apart at its special tokens before anything else happens
//! (normalization included), so encoding the pieces between them gives the same ids.

use std::path::{Path, PathBuf};

use super::{PrepError, sentencepiece};
use crate::files;
use crate::models::RowFault;

/// The bytes that a tokenizer's file may have.
const FILE_MAX: u64 = 1 << 30;

/// What the tokenizers crate gives or says. It panics where it should not: at a regular expression that
/// backtracks for too long, for one.
fn caught<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    files::caught(work)?.map_err(|error| error.to_string())
}

/// A tokenizer that knows no special tokens in text.
#[derive(Debug, Clone)]
pub struct PlainTokenizer {
    path: PathBuf,
    tokenizer: tokenizers::Tokenizer,
}

impl PlainTokenizer {
    /// Reads `tokenizer.json` in `folder` or, where there is none, SentencePiece's `tokenizer.model`.
    pub fn open(folder: &Path) -> Result<Self, PrepError> {
        let read = |path: &Path| {
            files::read_at_most(path, FILE_MAX).map_err(|error| PrepError::io(path, &error))
        };
        let json = folder.join("tokenizer.json");
        let model = folder.join("tokenizer.model");
        let (path, tokenizer) = if json.exists() {
            let bytes = read(&json)?;
            let tokenizer = caught(|| tokenizers::Tokenizer::from_bytes(bytes))
                .map_err(|error| PrepError::new(&json, format!("is not a tokenizer: {error}")));
            (json, tokenizer)
        } else if model.exists() {
            let tokenizer = sentencepiece::tokenizer(&read(&model)?)
                .map_err(|problem| PrepError::new(&model, problem));
            (model, tokenizer)
        } else {
            let problem = "is missing, and there is no tokenizer.model; \
                           `AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)` of \
                           transformers writes it";
            return Err(PrepError::new(&json, problem));
        };
        let mut tokenizer = tokenizer?;
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|error| PrepError::new(&path, error.to_string()))?;
        tokenizer.set_encode_special_tokens(true);
        Ok(Self { path, tokenizer })
    }

    /// The complaint that the tokenizer is not what it must be.
    pub fn fault(&self, problem: impl Into<String>) -> PrepError {
        PrepError::new(&self.path, problem)
    }

    /// The id of a token, if there is such a token.
    pub fn id(&self, token: &str) -> Option<i64> {
        self.tokenizer.token_to_id(token).map(i64::from)
    }

    /// The id of a token that must be there.
    pub fn need(&self, token: &str) -> Result<i64, PrepError> {
        self.id(token).ok_or_else(|| {
            self.fault(format!(
                "has no token `{token}`; it belongs to another model"
            ))
        })
    }

    /// How many tokens there are, special ones included.
    pub fn len(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// Appends the tokens of plain text.
    pub fn append(&self, text: &str, ids: &mut Vec<i64>) -> Result<(), RowFault> {
        if text.is_empty() {
            return Ok(());
        }
        let encoding = caught(|| self.tokenizer.encode_fast(text, false)).map_err(|error| {
            let path = self.path.display();
            RowFault(format!("its text can't be tokenized by {path}: {error}"))
        })?;
        ids.extend(encoding.get_ids().iter().map(|&id| i64::from(id)));
        Ok(())
    }

    /// The text of tokens, without special tokens and without ids that no token has.
    pub fn decode(&self, ids: &[i64]) -> String {
        let ids: Vec<u32> = ids
            .iter()
            .filter_map(|&id| u32::try_from(id).ok())
            .collect();
        caught(|| self.tokenizer.decode(&ids, true)).unwrap_or_else(|_| self.spelled(&ids))
    }

    /// Tokens as the vocabulary spells them, for a decoder that fails at them.
    fn spelled(&self, ids: &[u32]) -> String {
        let tokens = ids.iter();
        tokens
            .filter_map(|&id| self.tokenizer.id_to_token(id))
            .collect()
    }
}
