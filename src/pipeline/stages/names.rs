//! The names of a source's columns: those that are read under other names, and those that are kept.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::unread::READ;

/// A field of a record that the loading stages read, such as `question`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FieldName(String);

impl TryFrom<String> for FieldName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        if READ.contains(&name.as_str()) {
            return Ok(Self(name));
        }
        Err(format!(
            "`{name}` is not a field of records; expected one of {}",
            READ.join(", ")
        ))
    }
}

impl From<FieldName> for String {
    fn from(field: FieldName) -> Self {
        field.0
    }
}

impl JsonSchema for FieldName {
    fn schema_name() -> Cow<'static, str> {
        "FieldName".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "enum": READ})
    }
}

/// The largest number of different keys that are remembered.
const SEEN_MAX: usize = 4096;

/// Fields that are names of the same thing.
const SAME: [&[&str]; 3] = [
    &["question", "prompt", "conversations"],
    &["image", "images"],
    &["video", "videos"],
];

/// True if a column would be read as what `field` is.
fn is_same(field: &str, column: &str) -> bool {
    let both = |same: &&[&str]| same.contains(&field) && same.contains(&column);
    field == column || SAME.iter().any(both)
}

/// The names of a source's columns.
#[derive(Debug, Clone, Default)]
pub struct Names {
    /// The columns that are read as fields of other names.
    pub columns: BTreeMap<FieldName, String>,
    /// The columns whose values are kept.
    pub keep: Vec<String>,
}

impl Names {
    /// Returns the fields as which a column is read.
    pub fn fields<'n>(&'n self, column: &'n str) -> impl Iterator<Item = &'n str> {
        // A column of a field's name is passed over where another one is read as the field.
        let mut columns = self.columns.iter();
        let is_own = !columns.any(|(field, of)| is_same(&field.0, column) || of == column);
        let mapped = self.columns.iter().filter(move |(_, of)| *of == column);
        let mapped = mapped.map(|(field, _)| field.0.as_str());
        mapped.chain(Some(column).filter(|_| is_own))
    }

    /// True if the values of a column are kept.
    pub fn is_kept(&self, column: &str) -> bool {
        self.keep.iter().any(|kept| kept == column)
    }

    /// Returns the first named column that is not among the columns of a file, with the setting that
    /// names it.
    pub fn missing(&self, has: impl Fn(&str) -> bool) -> Option<(String, &str)> {
        let columns = self.columns.iter();
        let columns = columns.map(|(field, column)| (format!("columns.{}", field.0), column));
        let kept = self.keep.iter().map(|column| ("keep".to_owned(), column));
        let mut named = columns.chain(kept);
        let (setting, column) = named.find(|(_, column)| !has(column))?;
        Some((setting, column))
    }

    /// Takes the kept values out of a record, and gives its fields their names. A kept value that is
    /// no text is kept as JSON; null is not kept.
    pub fn apply(&self, record: &mut Map<String, Value>) -> Vec<(String, String)> {
        let mut kept = Vec::new();
        for name in &self.keep {
            let value = match record.get(name) {
                None | Some(Value::Null) => continue,
                Some(Value::String(text)) => text.clone(),
                Some(other) => other.to_string(),
            };
            kept.push((name.clone(), value));
        }
        if !self.columns.is_empty() || !kept.is_empty() {
            let own = std::mem::take(record);
            for (name, value) in own {
                for field in self.fields(&name) {
                    if READ.contains(&field) || !self.is_kept(&name) {
                        record.insert(field.to_owned(), value.clone());
                    }
                }
            }
        }
        kept
    }
}

/// The named columns that records had so far.
#[derive(Debug, Default)]
pub struct NamedColumns {
    /// The fields, and the kept columns.
    seen: [BTreeSet<String>; 2],
    /// The keys of the first record.
    first: Option<Vec<String>>,
}

impl NamedColumns {
    /// Counts a record whose fields have their names.
    pub fn count(&mut self, fields: &Value, kept: &[(String, String)]) {
        let Some(fields) = fields.as_object() else {
            return;
        };
        self.first
            .get_or_insert_with(|| fields.keys().cloned().collect());
        let named = [
            fields.keys().collect::<Vec<_>>(),
            kept.iter().map(|(name, _)| name).collect(),
        ];
        for (seen, names) in self.seen.iter_mut().zip(named) {
            for name in names {
                if !seen.contains(name) && seen.len() < SEEN_MAX {
                    seen.insert(name.clone());
                }
            }
        }
    }

    /// Returns a message about a named column that no record has; `None` without records.
    pub fn missing(&self, names: &Names) -> Option<String> {
        let first = self.first.as_ref()?;
        let mut fields = names.columns.iter();
        let field = fields.find(|(field, _)| !self.seen[0].contains(&field.0));
        let field = field.map(|(field, column)| (format!("columns.{}", field.0), column));
        let mut kept = names.keep.iter();
        let kept = kept.find(|column| !self.seen[1].contains(*column));
        let kept = kept.map(|column| ("keep".to_owned(), column));
        let (setting, column) = field.or(kept)?;
        Some(format!(
            "no record has a value in `{column}`, which `{setting}` names; the first has the keys {}",
            first.join(", ")
        ))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_get_their_names_and_values_are_kept() {
        let columns = json!({"question": "Question", "answer": "gpt"});
        let names = Names {
            columns: serde_json::from_value(columns).unwrap(),
            keep: ["category", "gpt", "level", "none"]
                .map(str::to_owned)
                .to_vec(),
        };
        let record = json!({"Question": "Why?", "answer": "other", "gpt": "So.", "category": "conv",
            "level": 3, "none": null, "else": 1});
        let Value::Object(mut record) = record else {
            panic!("an object")
        };
        let kept = names.apply(&mut record);
        let text = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let expected = [
            text("category", "conv"),
            text("gpt", "So."),
            text("level", "3"),
        ];
        assert_eq!(kept, expected);
        let expected = json!({"question": "Why?", "answer": "So.", "else": 1});
        assert_eq!(Value::Object(record), expected);
        assert_eq!(
            names.missing(|name| name != "gpt"),
            Some(("columns.answer".to_owned(), "gpt"))
        );
    }

    #[test]
    fn a_named_column_that_no_record_has_is_reported() {
        let names = Names {
            columns: serde_json::from_value(json!({"answer": "refrence"})).unwrap(),
            keep: vec!["category".to_owned()],
        };
        let mut seen = NamedColumns::default();
        assert_eq!(seen.missing(&names), None, "no records");
        let kept = [("category".to_owned(), "x".to_owned())];
        seen.count(&json!({"id": "1", "prompt": "P"}), &kept);
        let told = seen.missing(&names).unwrap();
        assert_eq!(
            told,
            "no record has a value in `refrence`, which `columns.answer` names; the first has the keys id, prompt"
        );
        seen.count(&json!({"answer": "A"}), &[]);
        assert_eq!(seen.missing(&names), None);
        seen.seen[1].clear();
        assert!(seen.missing(&names).unwrap().contains("`keep` names"));
    }

    #[test]
    fn a_named_column_takes_the_place_of_others_of_the_same_meaning() {
        let names = Names {
            columns: serde_json::from_value(json!({"question": "instruction"})).unwrap(),
            keep: Vec::new(),
        };
        let record = json!({"prompt": "P", "question": "Q", "conversations": [], "instruction": "I", "image": "a"});
        let Value::Object(mut record) = record else {
            panic!("an object")
        };
        names.apply(&mut record);
        assert_eq!(
            Value::Object(record),
            json!({"question": "I", "image": "a"})
        );
    }

    #[test]
    fn only_fields_of_records_can_be_named() {
        let told = FieldName::try_from("qestion".to_owned()).unwrap_err();
        assert!(
            told.starts_with("`qestion` is not a field of records"),
            "{told}"
        );
    }
}
