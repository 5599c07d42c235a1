//! Rewording of serde's error messages in the terms of a pipeline file.

use std::borrow::Cow;

use super::pipeline::ROUNDS;
use super::source::Side;
use super::suggest::{listed, suggest};

/// The parts of a diagnostic that are derived from one of serde's messages.
#[derive(Debug, PartialEq, Eq)]
pub struct Words {
    pub code: &'static str,
    pub message: String,
    /// The similar word to suggest.
    pub suggest: Option<String>,
    pub help: Option<String>,
    /// The setting to underline.
    pub subject: Subject,
}

/// The subject of one of serde's messages.
#[derive(Debug, PartialEq, Eq)]
pub enum Subject {
    /// The setting at the path.
    Here(Side),
    /// A key in the setting at the path that is not allowed there.
    Extra(String),
    /// A required key that is missing from the setting at the path.
    Missing(String),
}

/// The help for a list in place of a map.
pub const WITHOUT_DASHES: &str =
    "remove the dashes (`- `) or brackets, and write a name before each entry: `name: …`";

/// The start of the help of [`reword`] for a quoted value where another type is expected.
const TAKE_QUOTES_OFF: &str = "remove the quotes: ";

impl Words {
    /// True if the help is to remove quotes.
    pub fn takes_quotes_off(&self) -> bool {
        let help = self.help.as_ref();
        help.is_some_and(|help| help.starts_with(TAKE_QUOTES_OFF))
    }
}

/// Rewords serde's message `raw` about the setting `name`, whose value is written as `shown`.
pub fn reword(raw: &str, name: &str, shown: Option<&str>) -> Words {
    if let Some((found, expected)) = named(raw, "unknown field `") {
        return unknown("config::unknown_field", "field", found, expected);
    }
    if let Some((found, expected)) = named(raw, "unknown variant `") {
        let words = unknown("config::unknown_word", "value", found, expected);
        return Words {
            subject: Subject::Here(Side::Value),
            ..words
        };
    }
    if let Some((field, _)) = named(raw, "missing field `") {
        return Words {
            code: "config::missing_field",
            message: format!("missing field `{field}`"),
            suggest: None,
            help: None,
            subject: Subject::Missing(field.to_owned()),
        };
    }
    let mismatch = raw
        .strip_prefix("invalid type: ")
        .or(raw.strip_prefix("invalid value: "));
    if let Some((found, expected)) = mismatch.and_then(|rest| rest.rsplit_once(", expected ")) {
        let expected = noun(expected);
        if found == "unit value" {
            let message = format!("missing value: expected {expected}");
            return wrong_type(message, None);
        }
        if found.starts_with("string ")
            && let Some(shown) = shown.filter(|shown| is_unquoted(shown, &expected))
        {
            let message = format!("expected {expected}, got the string `\"{shown}\"`");
            let help = format!("{TAKE_QUOTES_OFF}`{shown}`");
            return wrong_type(message, Some(help));
        }
        let more = match (found, shown) {
            ("sequence", _) if expected.starts_with("a map") => Some(WITHOUT_DASHES.to_owned()),
            (_, Some("0")) if expected == ROUNDS => Some(
                "set `rounds` to 1 or more; to evaluate models without training them, set `rounds: 1` \
                 and remove the `train_…` stages"
                    .to_owned(),
            ),
            _ => None,
        };
        let shown = shown.map(short);
        let found = match (found, shown.as_deref()) {
            ("sequence" | "map", _) => {
                let found = if found == "map" { "map" } else { "list" };
                let message = format!("`{name}` must be {expected}, not a {found}");
                return wrong_type(message, more);
            }
            (_, Some(shown)) => format!("`{shown}`"),
            (found, None) => found.to_owned(),
        };
        let can_be_quoted = expected == "a string";
        let help = can_be_quoted.then(|| {
            format!(
                "quote the value to make it a string: `\"{}\"`",
                found.trim_matches('`')
            )
        });
        return wrong_type(format!("expected {expected}, got {found}"), more.or(help));
    }
    Words {
        code: "config::wrong_value",
        message: raw.to_owned(),
        suggest: None,
        help: None,
        subject: Subject::Here(Side::Value),
    }
}

/// Characters of the user's text that a message repeats.
const LETTERS_MAX: usize = 200;

/// The user's text for a message; a long one is truncated.
pub fn short(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(LETTERS_MAX) {
        Some((end, _)) => format!("{}… ({} characters)", &text[..end], text.chars().count()).into(),
        None => text.into(),
    }
}

fn wrong_type(message: String, help: Option<String>) -> Words {
    Words {
        code: "config::wrong_type",
        message,
        suggest: None,
        help,
        subject: Subject::Here(Side::Value),
    }
}

/// The backquoted word after `prefix`, and the rest of the message.
fn named<'a>(raw: &'a str, prefix: &str) -> Option<(&'a str, &'a str)> {
    raw.strip_prefix(prefix)?.split_once('`')
}

/// A word that is not among those that serde lists in `expected`.
fn unknown(code: &'static str, noun: &str, found: &str, expected: &str) -> Words {
    let known: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
    let suggested = suggest(found, known.iter().copied());
    // Next to a good suggestion, the whole list is only noise.
    let shown = if suggested.is_some() && known.len() > 4 {
        4
    } else {
        known.len()
    };
    let list = listed(known[..shown].iter().copied());
    let more = if shown < known.len() { ", …" } else { "" };
    let choice = match known.len() {
        0 => "; no fields are allowed here".to_owned(),
        1 => format!(", expected {list}"),
        _ => format!(", expected one of {list}{more}"),
    };
    Words {
        code,
        message: format!("unknown {noun} `{}`{choice}", short(found)),
        suggest: suggested.map(str::to_owned),
        help: None,
        subject: Subject::Extra(found.to_owned()),
    }
}

/// True if a quoted text would be a valid value without its quotes.
fn is_unquoted(text: &str, expected: &str) -> bool {
    let whole = text.parse::<i64>();
    match expected {
        "a number" => text.parse::<f64>().is_ok_and(f64::is_finite),
        "an integer" => whole.is_ok(),
        "a non-negative integer" => whole.is_ok_and(|whole| whole >= 0),
        "a positive integer" | ROUNDS => whole.is_ok_and(|whole| whole >= 1),
        "`true` or `false`" => ["true", "false"].contains(&text),
        _ => false,
    }
}

/// The name of an expected type in words, where serde gives the Rust type.
fn noun(expected: &str) -> String {
    match expected {
        "f64" | "f32" => "a number".to_owned(),
        "u8" | "u16" | "u32" | "u64" | "usize" => "a non-negative integer".to_owned(),
        "i8" | "i16" | "i32" | "i64" | "isize" => "an integer".to_owned(),
        "a string" | "path string" | "string or map" => "a string".to_owned(),
        "a boolean" => "`true` or `false`".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a map" => "a map of settings".to_owned(),
        other if other.starts_with("a nonzero u") => "a positive integer".to_owned(),
        other if other.starts_with("struct ") => {
            "a map of settings: `{ setting: value }`".to_owned()
        }
        other if other.starts_with("enum ") || other.contains("single-key") => {
            "one of the allowed values".to_owned()
        }
        other => other.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(raw: &str, shown: &str, message: &str, suggest: Option<&str>) {
        let words = reword(raw, "setting", Some(shown));
        assert_eq!(words.message, message);
        assert_eq!(words.suggest.as_deref(), suggest);
    }

    #[test]
    fn messages_name_what_was_written_and_what_is_wanted() {
        check(
            "invalid type: string \"abc\", expected f64",
            "abc",
            "expected a number, got `abc`",
            None,
        );
        check(
            "invalid value: integer `0`, expected a nonzero u32",
            "0",
            "expected a positive integer, got `0`",
            None,
        );
        check(
            "invalid type: unit value, expected f64",
            "~",
            "missing value: expected a number",
            None,
        );
        check("missing field `model`", "", "missing field `model`", None);
        check("-1 is not above 0", "-1", "-1 is not above 0", None);
    }

    #[test]
    fn a_number_in_quotes_is_told_to_be_a_text() {
        let words = reword(
            "invalid type: string \"0.7\", expected f64",
            "top_p",
            Some("0.7"),
        );
        assert_eq!(words.message, "expected a number, got the string `\"0.7\"`");
        assert_eq!(words.help.as_deref(), Some("remove the quotes: `0.7`"));
        let words = reword(
            "invalid type: string \"true\", expected a boolean",
            "group_by_length",
            Some("true"),
        );
        assert_eq!(
            words.message,
            "expected `true` or `false`, got the string `\"true\"`"
        );
        // Removing the quotes would not help.
        check(
            "invalid type: string \"-3\", expected u32",
            "-3",
            "expected a non-negative integer, got `-3`",
            None,
        );
        check(
            "invalid type: string \"0\", expected a nonzero u32",
            "0",
            "expected a positive integer, got `0`",
            None,
        );
    }

    #[test]
    fn lists_and_zero_rounds_are_told_the_way_out() {
        let words = reword(
            "invalid type: sequence, expected struct Sample",
            "sample",
            None,
        );
        assert_eq!(
            words.message,
            "`sample` must be a map of settings: `{ setting: value }`, not a list"
        );
        assert_eq!(words.help.as_deref(), Some(WITHOUT_DASHES));
        let words = reword("invalid type: map, expected a sequence", "rewards", None);
        assert_eq!(words.message, "`rewards` must be a list, not a map");
        let raw = format!("invalid value: integer `0`, expected {ROUNDS}");
        let help = reword(&raw, "rounds", Some("0")).help.unwrap();
        assert!(help.contains("`rounds: 1`"), "{help}");
    }

    #[test]
    fn a_misspelt_word_is_guessed_and_the_list_kept_short() {
        check(
            "unknown field `temprature`, expected one of `prompts`, `model`, `count`, `temperature`, `top_p`",
            "",
            "unknown field `temprature`, expected one of `prompts`, `model`, `count`, `temperature`, …",
            Some("temperature"),
        );
        check(
            "unknown variant `float`, expected one of `auto`, `float32`",
            "",
            "unknown value `float`, expected one of `auto`, `float32`",
            None,
        );
    }
}
