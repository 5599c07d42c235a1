//! Settings' value types, validated while a pipeline file is deserialized.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// Defines a newtype over a number with a valid range.
macro_rules! bounded {
    ($(#[$doc:meta])+ $name:ident, $test:expr, $must:literal, $schema:tt) => {
        $(#[$doc])+
        #[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Serialize, Deserialize)]
        #[serde(try_from = "f64", into = "f64")]
        pub struct $name(f64);

        impl $name {
            pub fn get(self) -> f64 {
                self.0
            }
        }

        impl TryFrom<f64> for $name {
            type Error = String;

            fn try_from(value: f64) -> Result<Self, String> {
                let test: fn(f64) -> bool = $test;
                if test(value) { Ok(Self(value)) } else { Err(format!("{value} is not {}", $must)) }
            }
        }

        impl From<$name> for f64 {
            fn from(value: $name) -> f64 {
                value.0
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($schema)
            }
        }
    };
}

bounded!(
    /// A sampling temperature; 0 is greedy decoding.
    Temperature, |value| (0.0..=100.0).contains(&value), "a temperature (0 to 100; 0 is greedy)",
    {"type": "number", "minimum": 0, "maximum": 100}
);
bounded!(
    /// A probability or share, above 0 and at most 1.
    Probability, |value| value > 0.0 && value <= 1.0, "above 0 and at most 1",
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
);
bounded!(
    /// A number above 0.
    Positive, |value| value > 0.0 && value.is_finite(), "above 0",
    {"type": "number", "exclusiveMinimum": 0}
);
bounded!(
    /// A number that is 0 or more.
    NonNegative, |value| value >= 0.0 && value.is_finite(), "0 or more",
    {"type": "number", "minimum": 0}
);

/// A string that ends answers; not empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StopString(String);

impl StopString {
    pub fn get(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for StopString {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text.is_empty() {
            return Err("a stop string cannot be empty".to_owned());
        }
        Ok(Self(text))
    }
}

impl From<StopString> for String {
    fn from(stop: StopString) -> Self {
        stop.0
    }
}

impl JsonSchema for StopString {
    fn schema_name() -> Cow<'static, str> {
        "StopString".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "minLength": 1})
    }
}

/// The maximum length of a name in a pipeline file, in characters. Folders are named after it, some
/// with a suffix.
pub const NAME_MAX: usize = 100;

/// Defines a name type whose values are valid SQL identifiers without quotes.
macro_rules! name {
    ($(#[$doc:meta])+ $name:ident) => {
        $(#[$doc])+
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = String;

            fn try_from(text: String) -> Result<Self, String> {
                let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
                if text.starts_with(|c: char| c.is_ascii_lowercase()) && text.chars().all(word) {
                    return Ok(Self(text));
                }
                Err(format!("`{text}` is not a valid name: use a-z, 0-9 and _, starting with a letter"))
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({"type": "string", "pattern": "^[a-z][a-z0-9_]*$", "maxLength": NAME_MAX})
            }
        }
    };
}

name!(
    /// The name of a table.
    TableName
);
name!(
    /// The name of a model.
    ModelName
);

#[cfg(test)]
mod tests {
    use serde::de::DeserializeOwned;

    use super::*;

    /// Returns the error for a JSON value, or `fine`.
    fn verdict<T: DeserializeOwned>(text: &str) -> String {
        match serde_json::from_str::<T>(text) {
            Ok(_) => "fine".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn numbers_keep_to_their_ranges() {
        for fine in ["0", "0.7", "100"] {
            assert_eq!(verdict::<Temperature>(fine), "fine");
        }
        for (found, expected) in [
            (
                verdict::<Temperature>("100.5"),
                "100.5 is not a temperature (0 to 100; 0 is greedy)",
            ),
            (
                verdict::<Probability>("0"),
                "0 is not above 0 and at most 1",
            ),
            (
                verdict::<Probability>("1.5"),
                "1.5 is not above 0 and at most 1",
            ),
            (verdict::<Positive>("0"), "0 is not above 0"),
            (verdict::<NonNegative>("-1"), "-1 is not 0 or more"),
        ] {
            assert_eq!(found, expected);
        }
        assert_eq!(verdict::<Probability>("1"), "fine");
        assert_eq!(verdict::<NonNegative>("0"), "fine");
        for value in [f64::NAN, f64::INFINITY] {
            assert!(Positive::try_from(value).is_err());
            assert!(NonNegative::try_from(value).is_err());
            assert!(Temperature::try_from(value).is_err());
        }
    }

    #[test]
    fn names_are_identifiers_of_sql() {
        for fine in ["a", "round_2", &"x".repeat(NAME_MAX)] {
            assert_eq!(verdict::<TableName>(&format!("{fine:?}")), "fine");
        }
        for wrong in ["", "2nd", "Rewards", "a-b", "a b", "größe", "_a"] {
            assert_ne!(
                verdict::<TableName>(&format!("{wrong:?}")),
                "fine",
                "{wrong}"
            );
            assert_ne!(
                verdict::<ModelName>(&format!("{wrong:?}")),
                "fine",
                "{wrong}"
            );
        }
        assert_eq!(
            verdict::<StopString>(r#""""#),
            "a stop string cannot be empty"
        );
    }
}
