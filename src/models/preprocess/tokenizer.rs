//! A checkpoint's tokenizer, used for plain text only.
//!
//! What people and models wrote must never turn into a token that means something to the program:
//! the text `<image>` or `<|im_end|>` in a question is those characters. So matching of special
//! tokens is off, and special tokens enter a sequence by their ids only. A whole string that the
//! reference tokenizes at once falls apart at its special tokens before anything else happens
//! (normalization included), so encoding the pieces between them gives the same ids.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::Value;

use crate::RowFault;
use crate::checkpoint::CheckpointError;
use crate::preprocess::sentencepiece;
use ovchat_io::files;

/// The bytes that a tokenizer's file may have.
const FILE_MAX: u64 = 1 << 30;

/// What the tokenizers crate gives or says. It panics where it should not: at a regular expression that
/// backtracks for too long, for one.
fn caught<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    files::caught(work)?.map_err(|error| error.to_string())
}

/// How much longer a normalizer or decoder may make a text, by [`growth`]; Llama's comes to 9.
const GROWTH_MAX: f64 = 1024.0;

/// An upper bound of how many times as long a text becomes by the steps of a normalizer or a decoder, as
/// `tokenizer.json` has them. Unicode's own forms are left out: they lengthen a text by 11 at most.
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
            // It may match nothing, between any two bytes.
            _ => bytes(&step["content"]) + 1.0,
        },
        Some("Prepend") => bytes(&step["prepend"]).max(1.0),
        // A trie with its size in front, and the texts that it leads to, each with a zero at its end.
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

/// A tokenizer that knows no special tokens in text.
#[derive(Debug, Clone)]
pub struct PlainTokenizer {
    path: PathBuf,
    tokenizer: tokenizers::Tokenizer,
}

impl PlainTokenizer {
    /// Reads `tokenizer.json` in `folder` or, where there is none, SentencePiece's `tokenizer.model`.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let read = |path: &Path| {
            files::read_at_most(path, FILE_MAX).map_err(|error| CheckpointError::io(path, &error))
        };
        let json = folder.join("tokenizer.json");
        let model = folder.join("tokenizer.model");
        let (path, tokenizer) = if json.exists() {
            let bytes = read(&json)?;
            let tokenizer = caught(|| tokenizers::Tokenizer::from_bytes(bytes)).map_err(|error| {
                CheckpointError::new(&json, format!("is not a tokenizer: {error}"))
            });
            (json, tokenizer)
        } else if model.exists() {
            let tokenizer = sentencepiece::tokenizer(&read(&model)?)
                .map_err(|problem| CheckpointError::new(&model, problem));
            (model, tokenizer)
        } else {
            let problem = "is missing, and there is no tokenizer.model; \
                           `AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)` of \
                           transformers writes it";
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
                        "has a {name} that can make a text {growth:.0} times as long, and {GROWTH_MAX} times is \
                         the most; take its `Replace` steps out"
                    ),
                ));
            }
        }
        Ok(Self { path, tokenizer })
    }

    /// The complaint that the tokenizer is not what it must be.
    pub fn fault(&self, problem: impl Into<String>) -> CheckpointError {
        CheckpointError::new(&self.path, problem)
    }

    /// The id of a token, if there is such a token.
    pub fn id(&self, token: &str) -> Option<i64> {
        self.tokenizer.token_to_id(token).map(i64::from)
    }

    /// The id of a token that must be there.
    pub fn need(&self, token: &str) -> Result<i64, CheckpointError> {
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
