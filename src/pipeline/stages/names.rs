//! The names of a source's columns: those that are read under other names, and those that are kept.

use std::borrow::Cow;
use std::collections::BTreeMap;

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
        let is_own = !columns.any(|(field, of)| field.0 == column || of == column);
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
    fn only_fields_of_records_can_be_named() {
        let told = FieldName::try_from("qestion".to_owned()).unwrap_err();
        assert!(
            told.starts_with("`qestion` is not a field of records"),
            "{told}"
        );
    }
}
