//! The JSON files of a checkpoint folder, read key by key, so that every error names file and key.
//!
//! These files are written by many programs and versions, contain far more than is needed here, and
//! omit whatever equals a class default. Deriving a struct would force one set of defaults on every
//! architecture, so keys are read one at a time, with the default next to the name. `null` means
//! absent, as it does in transformers.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::checkpoint::CheckpointError;
use ovchat_io::files;

/// Maximum size of a file, in bytes.
const FILE_MAX: u64 = 64 << 20;

/// Maximum length of a list of numbers.
const LIST_MAX: usize = 1000;

/// Maximum magnitude of a number.
const NUMBER_MAX: f64 = 1e12;

/// Returns the maximum of a size with this key. Together, these limits keep every product of sizes
/// within 64 bits and a network's list of tensors short; published models are far below all of
/// them.
fn most(key: &str) -> usize {
    match key {
        "num_hidden_layers" => 1000,
        "vocab_size" => 1 << 24,
        "max_position_embeddings" => 1 << 28,
        "num_attention_heads" | "num_key_value_heads" | "head_dim" => 1 << 12,
        "image_size" | "patch_size" | "size" | "crop_size" | "shortest_edge" | "height"
        | "width" => 1 << 12,
        _ => 1 << 20,
    }
}

/// A JSON object in a file: the whole file, or an object nested in it.
#[derive(Debug, Clone)]
pub struct JsonConfig {
    path: PathBuf,
    /// The keys that lead to the object, each followed by a dot; empty for the whole file.
    place: String,
    map: Map<String, Value>,
}

impl JsonConfig {
    /// Reads the file `path`, which must contain one JSON object.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let text = files::read_at_most(path, FILE_MAX)
            .map_err(|error| CheckpointError::io(path, &error))?;
        let value: Value = serde_json::from_slice(&text)
            .map_err(|error| CheckpointError::new(path, format!("invalid JSON: {error}")))?;
        let Value::Object(map) = value else {
            return Err(CheckpointError::new(path, "expected a JSON object"));
        };
        Ok(Self {
            path: path.to_owned(),
            place: String::new(),
            map,
        })
    }

    /// Returns the whole object.
    pub fn into_map(self) -> Map<String, Value> {
        self.map
    }

    /// Returns an object without keys, for a section that the file omits: every key has its
    /// default.
    pub fn empty(&self, key: &str) -> Self {
        Self {
            path: self.path.clone(),
            place: format!("{}{key}.", self.place),
            map: Map::new(),
        }
    }

    /// Returns an error about the value at `key`.
    pub fn fault(&self, key: &str, problem: impl std::fmt::Display) -> CheckpointError {
        CheckpointError::new(&self.path, format!("`{}{key}` {problem}", self.place))
    }

    /// Returns the value at `key`; `null` counts as absent.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Returns the object at `key`.
    pub fn section(&self, key: &str) -> Result<Option<Self>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self {
                path: self.path.clone(),
                place: format!("{}{key}.", self.place),
                map: map.clone(),
            })),
            Some(_) => Err(self.fault(key, "must be an object")),
        }
    }

    /// Returns the string at `key`.
    pub fn text(&self, key: &str) -> Result<Option<&str>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.fault(key, format!("must be a string, not {other}"))),
        }
    }

    /// Returns the integer at `key`, which must be above 0, if there is one.
    pub fn size(&self, key: &str) -> Result<Option<usize>, CheckpointError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        let most = most(key);
        match size.filter(|&size| size > 0) {
            Some(size) if size <= most => Ok(Some(size)),
            Some(size) => {
                Err(self.fault(key, format!("is {size}, but at most {most} is supported")))
            }
            None => Err(self.fault(key, format!("must be a positive integer, not {value}"))),
        }
    }

    /// Returns the integer at `key`, which may be negative, if there is one.
    pub fn integer(&self, key: &str) -> Result<Option<i64>, CheckpointError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let integer = value.as_i64().map(Some);
        integer.ok_or_else(|| self.fault(key, format!("must be an integer, not {value}")))
    }

    /// Returns the number at `key`, if there is one.
    pub fn number(&self, key: &str) -> Result<Option<f64>, CheckpointError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let number = value.as_f64().filter(|number| number.abs() <= NUMBER_MAX);
        number.map(Some).ok_or_else(|| {
            let problem = format!("must be a number of at most {NUMBER_MAX:e}, not {value}");
            self.fault(key, problem)
        })
    }

    /// Returns the number at `key`, which must be above 0, if there is one.
    pub fn positive(&self, key: &str) -> Result<Option<f64>, CheckpointError> {
        match self.number(key)? {
            Some(number) if number <= 0.0 => {
                Err(self.fault(key, format!("must be greater than 0, not {number}")))
            }
            number => Ok(number),
        }
    }

    /// Returns the boolean at `key`, if there is one.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, CheckpointError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let flag = value.as_bool().map(Some);
        flag.ok_or_else(|| self.fault(key, format!("must be true or false, not {value}")))
    }

    /// Returns the integers at `key`, a single one or a list. Absent is an empty list.
    pub fn integers(&self, key: &str) -> Result<Vec<i64>, CheckpointError> {
        match self.get(key) {
            Some(Value::Array(items)) if items.len() > LIST_MAX => {
                let problem = format!(
                    "has {} values, but at most {LIST_MAX} are supported",
                    items.len()
                );
                Err(self.fault(key, problem))
            }
            Some(Value::Array(items)) => items
                .iter()
                .map(Value::as_i64)
                .collect::<Option<_>>()
                .ok_or_else(|| self.fault(key, "must be an integer or a list of integers")),
            _ => Ok(self.integer(key)?.into_iter().collect()),
        }
    }

    /// Returns the three numbers (red, green, blue) at `key`, if there are any; a single number
    /// stands for all three.
    pub fn channels(&self, key: &str) -> Result<Option<[f64; 3]>, CheckpointError> {
        match self.get(key) {
            Some(Value::Array(items)) => {
                let number =
                    |value: &Value| value.as_f64().filter(|number| number.abs() <= NUMBER_MAX);
                let numbers: Option<Vec<f64>> = items.iter().take(4).map(number).collect();
                numbers
                    .and_then(|numbers| numbers.try_into().ok())
                    .map(Some)
                    .ok_or_else(|| self.fault(key, "must be three numbers"))
            }
            _ => Ok(self.number(key)?.map(|number| [number; 3])),
        }
    }

    /// Fails unless the string at `key` is absent or `expected`, the only supported value.
    pub fn only(&self, key: &str, expected: &str) -> Result<(), CheckpointError> {
        match self.text(key)? {
            Some(found) if found != expected => Err(self.fault(
                key,
                format!("is `{found}`, but only `{expected}` is supported"),
            )),
            _ => Ok(()),
        }
    }

    /// Fails unless the boolean at `key` is absent or `expected`, the only supported value.
    pub fn only_flag(&self, key: &str, expected: bool) -> Result<(), CheckpointError> {
        match self.flag(key)? {
            Some(found) if found != expected => {
                Err(self.fault(key, format!("is {found}, but only {expected} is supported")))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(text: &str) -> JsonConfig {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("config.json");
        std::fs::write(&path, text).expect("written");
        JsonConfig::open(&path).expect("an object")
    }

    #[test]
    fn a_wrong_value_is_reported_with_file_and_the_whole_key() {
        let file = section(r#"{"text_config": {"hidden_size": "many"}}"#);
        let text = file.section("text_config").unwrap().unwrap();
        let diagnostic = text.size("hidden_size").unwrap_err().to_string();
        assert!(
            diagnostic
                .contains("config.json: `text_config.hidden_size` must be a positive integer")
        );
    }

    #[test]
    fn null_is_as_good_as_absent() {
        let file = section(r#"{"rope_scaling": null}"#);
        assert_eq!(file.number("rope_scaling").unwrap(), None);
    }

    #[test]
    fn one_number_may_stand_for_a_list() {
        let file = section(r#"{"one": -2, "two": [-2, -1], "mean": 0.5}"#);
        assert_eq!(file.integers("one").unwrap(), [-2]);
        assert_eq!(file.integers("two").unwrap(), [-2, -1]);
        assert_eq!(file.channels("mean").unwrap(), Some([0.5; 3]));
        assert!(file.channels("two").is_err());
    }

    #[test]
    fn a_file_that_is_not_json_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, "{").unwrap();
        let diagnostic = JsonConfig::open(&path).unwrap_err().to_string();
        assert!(diagnostic.contains("config.json: invalid JSON"));
    }
}
