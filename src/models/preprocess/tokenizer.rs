//! Tokenization of plain text with a checkpoint's tokenizer.
//!
//! Text from users and models must never turn into a special token: `<image>` or `<|im_end|>` in a
//! question is just those characters. So matching of special tokens is disabled, and special tokens
//! enter a sequence by id only. When the reference tokenizes a whole string at once, the string is
//! split at its special tokens before anything else happens (including normalization), so encoding
//! the pieces between them gives the same ids.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::Value;
use tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::metaspace::PrependScheme;

use crate::RowFault;
use crate::checkpoint::CheckpointError;
use crate::preprocess::sentencepiece;
use ovchat_io::files;

/// Maximum size of a tokenizer file, in bytes.
const FILE_MAX: u64 = 1 << 30;

/// Calls the tokenizers crate and converts panics to errors. The crate panics, for example, at a
/// regular expression that backtracks for too long.
fn caught<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    files::caught(work)?.map_err(|error| error.to_string())
}

/// Maximum factor by which a normalizer or decoder may lengthen a text, by [`growth`]; Llama's is
/// 9.
const GROWTH_MAX: f64 = 1024.0;

/// Returns an upper bound of the factor by which the steps of a normalizer or decoder in
/// `tokenizer.json` lengthen a text. Unicode's normalization forms are ignored: they lengthen a
/// text by a factor of 11 at most.
fn growth(step: &Value) -> f64 {
    let bytes = |text: &Value| text.as_str().map_or(0, str::len) as f64;
    match step["type"].as_str() {
        Some("Sequence") => {
            let steps = step["normalizers"].as_array();
            let steps = steps.or(step["decoders"].as_array());
            steps.into_iter().flatten().map(growth).product()
        }
        Some("Replace") => match &step["pattern"]["String"] {
            Value::String(pattern) if !pattern.is_empty() => {
                (bytes(&step["content"]) / pattern.len() as f64).max(1.0)
            }
            // It may match the empty string between any two bytes.
            _ => bytes(&step["content"]) + 1.0,
        },
        Some("Prepend") => bytes(&step["prepend"]).max(1.0),
        // A trie preceded by its size, and the replacement texts, each terminated by a zero.
        Some("Precompiled") => {
            let map = step["precompiled_charsmap"].as_str().unwrap_or_default();
            let map = BASE64_STANDARD.decode(map).unwrap_or_default();
            let Some((size, rest)) = map.split_first_chunk() else {
                return 1.0;
            };
            let texts = rest.get(u32::from_le_bytes(*size) as usize..);
            let texts = texts.unwrap_or_default().split(|&byte| byte == 0);
            texts.map(<[u8]>::len).max().unwrap_or(0).max(1) as f64
        }
        _ => 1.0,
    }
}

/// Returns the tokenizer without the space before the first word, if it puts one before the first
/// word of a whole text only.
fn without_first_space(tokenizer: &tokenizers::Tokenizer) -> Option<tokenizers::Tokenizer> {
    let Some(PreTokenizerWrapper::Metaspace(metaspace)) = tokenizer.get_pre_tokenizer() else {
        return None;
    };
    if metaspace.get_prepend_scheme() != PrependScheme::First {
        return None;
    }
    let mut metaspace = metaspace.clone();
    metaspace.set_prepend_scheme(PrependScheme::Never);
    let mut inner = tokenizer.clone();
    inner.with_pre_tokenizer(Some(metaspace));
    Some(inner)
}

/// A tokenizer that matches no special tokens in text.
#[derive(Debug, Clone)]
pub struct PlainTokenizer {
    path: PathBuf,
    tokenizer: tokenizers::Tokenizer,
    /// The tokenizer of text that continues another one, if it differs: without the space that
    /// Llama's puts before the first word of a text (`prepend_scheme: first`).
    inner: Option<tokenizers::Tokenizer>,
}

impl PlainTokenizer {
    /// Reads `tokenizer.json` in `folder`, or SentencePiece's `tokenizer.model` if it does not
    /// exist.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let read = |path: &Path| {
            files::read_at_most(path, FILE_MAX).map_err(|error| CheckpointError::io(path, &error))
        };
        let json = folder.join("tokenizer.json");
        let model = folder.join("tokenizer.model");
        let (path, tokenizer) = if json.exists() {
            let bytes = read(&json)?;
            let tokenizer = caught(|| tokenizers::Tokenizer::from_bytes(bytes)).map_err(|error| {
                CheckpointError::new(&json, format!("not a valid tokenizer: {error}"))
            });
            (json, tokenizer)
        } else if model.exists() {
            let tokenizer = sentencepiece::tokenizer(&read(&model)?)
                .map_err(|problem| CheckpointError::new(&model, problem));
            (model, tokenizer)
        } else {
            let problem = "file not found, and there is no tokenizer.model; write it with \
                           `AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)` of \
                           transformers";
            return Err(CheckpointError::new(&json, problem));
        };
        let mut tokenizer = tokenizer?;
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|error| CheckpointError::new(&path, error.to_string()))?;
        tokenizer.set_encode_special_tokens(true);
        let normalizer = serde_json::to_value(tokenizer.get_normalizer()).unwrap_or_default();
        let decoder = serde_json::to_value(tokenizer.get_decoder()).unwrap_or_default();
        for (name, steps) in [("normalizer", normalizer), ("decoder", decoder)] {
            let growth = growth(&steps);
            if growth > GROWTH_MAX {
                return Err(CheckpointError::new(
                    &path,
                    format!(
                        "has a {name} that can make a text {growth:.0} times as long, but at most {GROWTH_MAX} times is \
                         supported; remove its `Replace` steps"
                    ),
                ));
            }
        }
        let inner = without_first_space(&tokenizer);
        Ok(Self {
            path,
            tokenizer,
            inner,
        })
    }

    /// Returns an error about this tokenizer.
    pub fn fault(&self, problem: impl Into<String>) -> CheckpointError {
        CheckpointError::new(&self.path, problem)
    }

    /// Returns the id of a token, if it exists.
    pub fn id(&self, token: &str) -> Option<i64> {
        self.tokenizer.token_to_id(token).map(i64::from)
    }

    /// Returns the id of a required token.
    pub fn need(&self, token: &str) -> Result<i64, CheckpointError> {
        self.id(token).ok_or_else(|| {
            self.fault(format!(
                "has no token `{token}`; the tokenizer belongs to a different model"
            ))
        })
    }

    /// Returns the number of tokens, including special ones.
    pub fn len(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// Returns the special tokens that the tokenizer puts before every text: `<s>`, or nothing.
    pub fn beginning(&self) -> Result<Vec<i64>, CheckpointError> {
        let encoding = caught(|| self.tokenizer.encode_fast("", true));
        let encoding = encoding.map_err(|problem| self.fault(problem))?;
        let ids: Vec<i64> = encoding.get_ids().iter().map(|&id| i64::from(id)).collect();
        match ids[..] {
            [] => Ok(ids),
            [id] if self.id("<s>") == Some(id) => Ok(ids),
            _ => Err(self.fault("adds special tokens other than `<s>` to every text")),
        }
    }

    /// True if a space is put before every text, also one that continues another.
    pub fn prefixes_every_text(&self) -> bool {
        let mut ids = Vec::new();
        let first = self.append_inner("a", &mut ids).ok().and(ids.first());
        let first = first.and_then(|&id| self.tokenizer.id_to_token(u32::try_from(id).ok()?));
        first.is_some_and(|token| token.starts_with('\u{2581}'))
    }

    /// Appends the tokens of plain text.
    pub fn append(&self, text: &str, ids: &mut Vec<i64>) -> Result<(), RowFault> {
        self.append_with(&self.tokenizer, text, ids)
    }

    /// Appends the tokens of plain text that continues another text, after a special token or an
    /// earlier piece.
    pub fn append_inner(&self, text: &str, ids: &mut Vec<i64>) -> Result<(), RowFault> {
        self.append_with(self.inner.as_ref().unwrap_or(&self.tokenizer), text, ids)
    }

    fn append_with(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        text: &str,
        ids: &mut Vec<i64>,
    ) -> Result<(), RowFault> {
        if text.is_empty() {
            return Ok(());
        }
        let encoding = caught(|| tokenizer.encode_fast(text, false)).map_err(|error| {
            let path = self.path.display();
            RowFault(format!("cannot tokenize the text with {path}: {error}"))
        })?;
        ids.extend(encoding.get_ids().iter().map(|&id| i64::from(id)));
        Ok(())
    }

    /// Decodes tokens, skipping special tokens and ids without a token.
    pub fn decode(&self, ids: &[i64]) -> String {
        let ids: Vec<u32> = ids
            .iter()
            .filter_map(|&id| u32::try_from(id).ok())
            .collect();
        caught(|| self.tokenizer.decode(&ids, true)).unwrap_or_else(|_| self.spelled(&ids))
    }

    /// Returns the tokens as spelled in the vocabulary, for a decoder that fails on them.
    fn spelled(&self, ids: &[u32]) -> String {
        let tokens = ids.iter();
        tokens
            .filter_map(|&id| self.tokenizer.id_to_token(id))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_growth_of_a_text_is_bounded_step_by_step() {
        let replace = |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
        let doubled = replace(json!({"String": "a"}), "aa");
        for (step, expected) in [
            (Value::Null, 1.0),
            (json!({"type": "NFC"}), 1.0),
            (doubled.clone(), 2.0),
            (replace(json!({"String": "abc"}), ""), 1.0),
            (replace(json!({"Regex": "x*"}), "abc"), 4.0),
            (replace(json!({"String": ""}), "abc"), 4.0),
            (
                json!({"type": "Sequence", "normalizers": vec![doubled; 40]}),
                2_f64.powi(40),
            ),
            (json!({"type": "Prepend", "prepend": "\u{2581}"}), 3.0),
        ] {
            assert_eq!(growth(&step), expected, "{step}");
        }
        let map = [&4_u32.to_le_bytes()[..], b"trie", b"ab\0abcdef\0"].concat();
        let step =
            json!({"type": "Precompiled", "precompiled_charsmap": BASE64_STANDARD.encode(map)});
        assert_eq!(growth(&step), 6.0);
    }
}
