//! Conversion of a SentencePiece model (`tokenizer.model`) to the equivalent of a `tokenizer.json`.
//!
//! The file is a protocol buffer (google/sentencepiece, `src/sentencepiece_model.proto`), of which
//! the pieces with their scores and a few settings are read. Only what Llama uses is supported:
//! BPE, a space before the text, spaces as `▁`, no normalization. Merges are derived as in
//! transformers (`convert_slow_tokenizer.py`, `generate_merges`): wherever a piece is the
//! concatenation of two others, the pair has the rank of the piece's score.

use std::collections::HashMap;

use tokenizers::decoders::{
    DecoderWrapper, byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence as Decoders,
    strip::Strip,
};
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence};
use tokenizers::{AddedToken, Tokenizer};

/// The character that represents a space.
const SPACE: &str = "▁";

// Kinds of pieces (`SentencePiece.Type`).
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const BYTE: u64 = 6;

/// `TrainerSpec.ModelType`.
const BPE_MODEL: u64 = 2;

/// An entry of the vocabulary.
#[derive(Debug, Clone, PartialEq)]
struct Piece {
    text: String,
    score: f32,
    kind: u64,
}

/// The parts of a model that are used.
#[derive(Debug, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "named as in the file")]
struct Model {
    /// The pieces, by id.
    pieces: Vec<Piece>,
    kind: u64,
    /// True if the model has compiled normalization rules; there are none for "identity".
    charsmap: bool,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
}

/// Builds the tokenizer of a SentencePiece model. Fails, with a message, if the bytes are not such
/// a model or if it tokenizes differently from Llama's.
pub(super) fn tokenizer(bytes: &[u8]) -> Result<Tokenizer, String> {
    let model = Model::read(bytes)?;
    model.like_llama()?;
    let vocab: Vocab = model.vocab()?.into_iter().collect();
    let unknown = model.pieces.iter().find(|piece| piece.kind == UNKNOWN);
    let mut bpe = BPE::builder()
        .vocab_and_merges(vocab, model.merges())
        .fuse_unk(true)
        .byte_fallback(model.pieces.iter().any(|piece| piece.kind == BYTE));
    if let Some(unknown) = unknown {
        bpe = bpe.unk_token(unknown.text.clone());
    }
    let mut tokenizer = Tokenizer::new(bpe.build().map_err(|error| error.to_string())?);
    let spaces = |from: &str, to: &str| Replace::new(from, to).map_err(|error| error.to_string());
    tokenizer
        .with_normalizer(Some(Sequence::new(vec![
            NormalizerWrapper::Prepend(Prepend::new(SPACE.to_owned())),
            NormalizerWrapper::Replace(spaces(" ", SPACE)?),
        ])))
        .map_err(|error| error.to_string())?
        .with_decoder(Some(Decoders::new(vec![
            DecoderWrapper::Replace(spaces(SPACE, " ")?),
            DecoderWrapper::ByteFallback(ByteFallback::new()),
            DecoderWrapper::Fuse(Fuse::new()),
            DecoderWrapper::Strip(Strip::new(' ', 1, 0)),
        ])));
    let special = |piece: &&Piece| matches!(piece.kind, UNKNOWN | CONTROL);
    let special: Vec<AddedToken> = model
        .pieces
        .iter()
        .filter(special)
        .map(|piece| AddedToken::from(piece.text.clone(), true).normalized(false))
        .collect();
    tokenizer
        .add_special_tokens(special)
        .map_err(|error| error.to_string())?;
    Ok(tokenizer)
}

impl Model {
    fn read(bytes: &[u8]) -> Result<Self, String> {
        let mut model = Self {
            pieces: Vec::new(),
            kind: 1,
            charsmap: false,
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
        };
        for field in Fields::of(bytes) {
            match field? {
                (1, Value::Bytes(piece)) => model.pieces.push(Piece::read(piece)?),
                (2, Value::Bytes(trainer)) => {
                    for field in Fields::of(trainer) {
                        if let (3, Value::Number(kind)) = field? {
                            model.kind = kind;
                        }
                    }
                }
                (3, Value::Bytes(normalizer)) => {
                    for field in Fields::of(normalizer) {
                        match field? {
                            (2, Value::Bytes(map)) => model.charsmap = !map.is_empty(),
                            (3, Value::Number(flag)) => model.add_dummy_prefix = flag != 0,
                            (4, Value::Number(flag)) => model.remove_extra_whitespaces = flag != 0,
                            (5, Value::Number(flag)) => model.escape_whitespaces = flag != 0,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        if model.pieces.is_empty() {
            return Err("contains no pieces".to_owned());
        }
        Ok(model)
    }

    /// Rejects models that differ from Llama's tokenizer.
    fn like_llama(&self) -> Result<(), String> {
        let refused = [
            (self.kind != BPE_MODEL, "is not a BPE model"),
            (self.charsmap, "normalizes text"),
            (!self.add_dummy_prefix, "adds no space before a text"),
            (self.remove_extra_whitespaces, "removes repeated spaces"),
            (!self.escape_whitespaces, "does not escape spaces"),
            (
                self.pieces.iter().any(|piece| piece.kind == USER_DEFINED),
                "contains user-defined pieces",
            ),
        ];
        match refused.into_iter().find(|(applies, _)| *applies) {
            None => Ok(()),
            Some((_, problem)) => Err(format!(
                "{problem}, unlike Llama's; write a tokenizer.json next to it with transformers: \
                 `AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)`"
            )),
        }
    }

    /// Returns the id of each piece.
    fn vocab(&self) -> Result<HashMap<String, u32>, String> {
        let mut ids = HashMap::with_capacity(self.pieces.len());
        for (id, piece) in self.pieces.iter().enumerate() {
            if ids.insert(piece.text.clone(), id as u32).is_some() {
                return Err(format!("contains the piece `{}` twice", piece.text));
            }
        }
        Ok(ids)
    }

    /// Returns the pairs of pieces that make a piece, highest score first.
    fn merges(&self) -> Merges {
        let known = (0..).zip(&self.pieces);
        let ids: HashMap<&str, usize> =
            known.map(|(id, piece)| (piece.text.as_str(), id)).collect();
        let mut pairs = Vec::new();
        for piece in &self.pieces {
            let first = pairs.len();
            for (at, _) in piece.text.char_indices().skip(1) {
                let (left, right) = piece.text.split_at(at);
                if let (Some(&one), Some(&two)) = (ids.get(left), ids.get(right)) {
                    pairs.push((piece.score, one, two, left, right));
                }
            }
            pairs[first..].sort_by_key(|&(_, one, two, ..)| (one, two));
        }
        // Both sorts are stable; this one is Python's with `reverse=True`, which keeps the order of
        // equal items.
        let order = |&(score, _, _, left, right): &(f32, usize, usize, &str, &str)| {
            (score, left.chars().count(), right.chars().count())
        };
        pairs.sort_by(|one, other| {
            let (one, other) = (order(one), order(other));
            other
                .0
                .total_cmp(&one.0)
                .then(other.1.cmp(&one.1))
                .then(other.2.cmp(&one.2))
        });
        let pairs = pairs.into_iter();
        pairs
            .map(|(.., left, right)| (left.to_owned(), right.to_owned()))
            .collect()
    }
}

impl Piece {
    fn read(bytes: &[u8]) -> Result<Self, String> {
        let mut piece = Self {
            text: String::new(),
            score: 0.0,
            kind: 1,
        };
        for field in Fields::of(bytes) {
            match field? {
                (1, Value::Bytes(text)) => {
                    let text = std::str::from_utf8(text).map_err(|_| "a piece is not UTF-8")?;
                    text.clone_into(&mut piece.text);
                }
                (2, Value::Fixed(bits)) => piece.score = f32::from_bits(bits),
                (3, Value::Number(kind)) => piece.kind = kind,
                _ => {}
            }
        }
        Ok(piece)
    }
}

/// The fields of a message, with their numbers (protobuf.dev, *Encoding*).
struct Fields<'a> {
    rest: &'a [u8],
}

#[derive(Debug)]
enum Value<'a> {
    Number(u64),
    /// A 32-bit value.
    Fixed(u32),
    Bytes(&'a [u8]),
    /// A 64-bit value, which is not needed here.
    Wide,
}

impl<'a> Fields<'a> {
    fn of(message: &'a [u8]) -> Self {
        Self { rest: message }
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(damaged())
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or_else(damaged)?;
        self.rest = rest;
        Ok(taken)
    }

    fn field(&mut self) -> Result<(u64, Value<'a>), String> {
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Value::Number(self.varint()?),
            1 => self.take(8).map(|_| Value::Wide)?,
            2 => {
                let length = usize::try_from(self.varint()?).map_err(|_| damaged())?;
                Value::Bytes(self.take(length)?)
            }
            5 => {
                let bytes = self.take(4)?.try_into().expect("four bytes");
                Value::Fixed(u32::from_le_bytes(bytes))
            }
            _ => return Err(damaged()),
        };
        Ok((key >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Value<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}

fn damaged() -> String {
    "not a SentencePiece model, or corrupt".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(fields: &[(u8, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (number, content) in fields {
            bytes.extend([number << 3 | 2, content.len() as u8]);
            bytes.extend(*content);
        }
        bytes
    }

    fn piece(text: &str, score: f32, kind: u8) -> Vec<u8> {
        let mut bytes = message(&[(1, text.as_bytes())]);
        bytes.push(2 << 3 | 5);
        bytes.extend(score.to_le_bytes());
        bytes.extend([3 << 3, kind]);
        bytes
    }

    /// Returns a model like Llama's, with bytes for `\n` only; `trainer` and `normalizer` are
    /// encoded.
    fn model(trainer: &[u8], normalizer: &[u8]) -> Vec<u8> {
        let pieces = [
            piece("<unk>", 0.0, 2),
            piece("<s>", 0.0, 3),
            piece("</s>", 0.0, 3),
            piece("<0x0A>", 0.0, 6),
            piece("ab", -1.0, 1),
            piece("▁ab", -2.0, 1),
            piece("▁", -3.0, 1),
            piece("a", -4.0, 1),
            piece("b", -5.0, 1),
        ];
        let mut fields: Vec<(u8, &[u8])> =
            pieces.iter().map(|piece| (1, piece.as_slice())).collect();
        fields.extend([(2, trainer), (3, normalizer)]);
        message(&fields)
    }

    const BPE: &[u8] = &[3 << 3, 2];
    const NOTHING_REMOVED: &[u8] = &[4 << 3, 0];

    #[test]
    fn text_is_cut_into_pieces_bytes_and_unknowns_and_put_together_again() {
        let tokenizer = tokenizer(&model(BPE, NOTHING_REMOVED)).unwrap();
        let ids = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        assert_eq!(ids("ab"), [5]);
        assert_eq!(ids(" ab"), [6, 5]);
        assert_eq!(ids("ba\n"), [6, 8, 7, 3]);
        assert_eq!(ids("acca"), [6, 7, 0, 7]);
        assert_eq!(tokenizer.decode(&[5, 6, 7, 3], true).unwrap(), "ab a\n");
    }

    #[test]
    fn models_unlike_llamas_are_refused() {
        let diagnostic =
            |trainer: &[u8], normalizer: &[u8]| tokenizer(&model(trainer, normalizer)).unwrap_err();
        assert!(diagnostic(&[3 << 3, 1], NOTHING_REMOVED).contains("is not a BPE model"));
        assert!(diagnostic(BPE, &[]).contains("removes repeated spaces"));
        assert!(diagnostic(BPE, &[4 << 3, 0, 3 << 3, 0]).contains("adds no space before a text"));
    }

    #[test]
    fn bytes_that_are_no_model_are_an_error_and_never_a_panic() {
        let whole = model(BPE, NOTHING_REMOVED);
        for length in 0..whole.len() {
            // Truncated between two fields, the rest may still be a model.
            let _ = tokenizer(&whole[..length]);
        }
        assert!(
            tokenizer(b"hello, world")
                .unwrap_err()
                .contains("SentencePiece")
        );
        assert_eq!(tokenizer(b"").unwrap_err(), "contains no pieces");
    }
}
