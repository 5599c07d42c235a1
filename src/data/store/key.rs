//! Keys of tables and rows: hashes of all their key inputs.

use serde_json::Value;
use sha2::{Digest, Sha256};

/// Length of a key in hex characters: 128 bits, so that a collision among a trillion rows is very
/// unlikely.
const KEY_CHARS: usize = 32;

/// A hash builder for keys. Each part is hashed with its length, so `("ab", "c")` and `("a", "bc")`
/// differ.
#[derive(Clone)]
pub struct Key(Sha256);

impl Key {
    /// Starts a key for the given purpose; keys of different purposes never collide.
    pub fn new(purpose: &str) -> Self {
        Self(Sha256::new()).with(purpose)
    }

    /// Adds a part to the key.
    #[must_use]
    pub fn with(mut self, part: impl AsRef<[u8]>) -> Self {
        let part = part.as_ref();
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
        self
    }

    /// Adds a JSON value to the key; the order of an object's fields does not matter.
    #[must_use]
    pub fn with_json(self, value: &Value) -> Self {
        self.with(sorted(value).to_string())
    }

    /// Returns the key as a hex string.
    pub fn finish(self) -> String {
        hex(&self.0.finalize()[..KEY_CHARS / 2])
    }

    /// Returns the key as a number, for seeds.
    pub fn finish_u64(self) -> u64 {
        let digest = self.0.finalize();
        u64::from_le_bytes(
            digest[..8]
                .try_into()
                .expect("eight bytes of a longer digest"),
        )
    }
}

/// Returns the SHA-256 of `bytes`, in hex.
pub fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |four: u8| char::from(DIGITS[usize::from(four)]);
    bytes
        .iter()
        .flat_map(|byte| [digit(byte >> 4), digit(byte & 15)])
        .collect()
}

fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let mut entries: Vec<_> = fields.iter().collect();
            entries.sort_by_key(|(name, _)| name.as_str());
            Value::Object(
                entries
                    .into_iter()
                    .map(|(name, field)| (name.clone(), sorted(field)))
                    .collect(),
            )
        }
        Value::Array(items) => Value::Array(items.iter().map(sorted).collect()),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_cut_between_parts_matters() {
        let key = |parts: [&str; 2]| Key::new("t").with(parts[0]).with(parts[1]).finish();
        assert_ne!(key(["ab", "c"]), key(["a", "bc"]));
        assert_eq!(key(["ab", "c"]).len(), KEY_CHARS);
    }

    #[test]
    fn the_order_of_fields_does_not_matter() {
        let key = |value| Key::new("t").with_json(&value).finish();
        assert_eq!(
            key(json!({"a": 1, "b": {"c": 2, "d": 3}})),
            key(json!({"b": {"d": 3, "c": 2}, "a": 1}))
        );
        assert_ne!(key(json!({"a": 1})), key(json!({"a": 1.5})));
    }
}
