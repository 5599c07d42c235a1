//! serde's messages in the words of people who write pipelines.

use std::borrow::Cow;

use super::pipeline::ROUNDS;
use super::source::Side;
use super::suggest::suggest;

/// A complaint in the making: what a message of serde comes to.
#[derive(Debug, PartialEq, Eq)]
pub struct Words {
    pub code: &'static str,
    pub message: String,
    /// The word that was probably meant.
    pub suggest: Option<String>,
    pub help: Option<String>,
    /// What to underline.
    pub subject: Subject,
}

/// What a message of serde is about.
#[derive(Debug, PartialEq, Eq)]
pub enum Subject {
    /// The setting at the path.
    Here(Side),
    /// A key in the setting at the path, which should not be there.
    Extra(String),
    /// A key in the setting at the path, which should be there.
    Missing(String),
}

/// The way out where a list stands in place of a map.
pub const WITHOUT_DASHES: &str =
    "take the dashes (`- `) or brackets away: a map has a name before each entry, `name: …`";

/// How [`reword`] begins to tell that a text stands where something else is wanted.
const TAKE_QUOTES_OFF: &str = "take the quotes off: ";

impl Words {
    /// Whether the way out is to take quotes off.
    pub fn takes_quotes_off(&self) -> bool {
        let help = self.help.as_ref();
        help.is_some_and(|help| help.starts_with(TAKE_QUOTES_OFF))
    }
}

/// Says what the message `raw` means for the setting `name` of which `shown` is the written value.
pub fn reword(raw: &str, name: &str, shown: Option<&str>) -> Words {
    if let Some((found, expected)) = named(raw, "unknown field `") {
        return unknown("config::unknown_field", "field", found, expected);
    }
    if let Some((found, expected)) = named(raw, "unknown variant `") {
        let words = unknown("config::unknown_word", "word", found, expected);
        return Words {
            subject: Subject::Here(Side::Value),
            ..words
        };
    }
    if let Some((field, _)) = named(raw, "missing field `") {
        return Words {
            code: "config::missing_field",
            message: format!("`{field}` is missing"),
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
            let message = format!("a value is missing: it must be {expected}");
            return wrong_type(message, None);
        }
        if found.starts_with("string ")
            && let Some(shown) = shown.filter(|shown| is_unquoted(shown, &expected))
        {
            let message = format!("`\"{shown}\"` is a text, not {expected}");
            let help = format!("{TAKE_QUOTES_OFF}`{shown}`");
            return wrong_type(message, Some(help));
        }
        let more = match (found, shown) {
            ("sequence", _) if expected.starts_with("a map") => Some(WITHOUT_DASHES.to_owned()),
            (_, Some("0")) if expected == ROUNDS => Some(
                "a pipeline has 1 round or more; to evaluate models without training them, write \
                 `rounds: 1` and take the `train_…` stages out"
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
        let can_be_quoted = expected == "a text";
        let help = can_be_quoted
            .then(|| format!("write `\"{}\"` to mean a text", found.trim_matches('`')));
        return wrong_type(format!("{found} is not {expected}"), more.or(help));
    }
    Words {
        code: "config::wrong_value",
        message: raw.to_owned(),
        suggest: None,
        help: None,
        subject: Subject::Here(Side::Value),
    }
}

/// Letters of somebody's text that a message repeats.
const LETTERS_MAX: usize = 200;

/// Somebody's text for a message: the beginning of a long one.
pub fn short(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(LETTERS_MAX) {
        Some((end, _)) => format!("{}… ({} letters)", &text[..end], text.chars().count()).into(),
        None => text.into(),
    }
}

/// Names joined for a message: "`a`, `b`".
pub fn listed<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let quoted: Vec<_> = names.into_iter().map(|name| format!("`{name}`")).collect();
    quoted.join(", ")
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

/// A word that isn't one of those that serde lists in `expected`.
fn unknown(code: &'static str, noun: &str, found: &str, expected: &str) -> Words {
    let known: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
    let suggested = suggest(found, known.iter().copied());
    // With a good guess the whole list is only noise.
    let shown = if suggested.is_some() && known.len() > 4 {
        4
    } else {
        known.len()
    };
    let list = listed(known[..shown].iter().copied());
    let more = if shown < known.len() { ", …" } else { "" };
    let choice = match known.len() {
        0 => "; there are none here".to_owned(),
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

/// Whether a text would be what is expected without its quotes.
fn is_unquoted(text: &str, expected: &str) -> bool {
    let whole = text.parse::<i64>();
    match expected {
        "a number" => text.parse::<f64>().is_ok_and(f64::is_finite),
        "a whole number" => whole.is_ok(),
        "a whole number, 0 or more" => whole.is_ok_and(|whole| whole >= 0),
        "a whole number, 1 or more" | ROUNDS => whole.is_ok_and(|whole| whole >= 1),
        "`true` or `false`" => ["true", "false"].contains(&text),
        _ => false,
    }
}

/// What serde calls by a Rust type, in words.
fn noun(expected: &str) -> String {
    match expected {
        "f64" | "f32" => "a number".to_owned(),
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or more".to_owned(),
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number".to_owned(),
        "a string" | "path string" | "string or map" => "a text".to_owned(),
        "a boolean" => "`true` or `false`".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a map" => "a map of settings".to_owned(),
        other if other.starts_with("a nonzero u") => "a whole number, 1 or more".to_owned(),
        other if other.starts_with("struct ") => {
            "a map of settings: `{ setting: value }`".to_owned()
        }
        other if other.starts_with("enum ") || other.contains("single-key") => {
            "one of the words that stand here".to_owned()
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
            "`abc` is not a number",
            None,
        );
        check(
            "invalid value: integer `0`, expected a nonzero u32",
            "0",
            "`0` is not a whole number, 1 or more",
            None,
        );
        check(
            "invalid type: unit value, expected f64",
            "~",
            "a value is missing: it must be a number",
            None,
        );
        check("missing field `model`", "", "`model` is missing", None);
        check("-1 is not above 0", "-1", "-1 is not above 0", None);
    }

    #[test]
    fn a_number_in_quotes_is_told_to_be_a_text() {
        let words = reword(
            "invalid type: string \"0.7\", expected f64",
            "top_p",
            Some("0.7"),
        );
        assert_eq!(words.message, "`\"0.7\"` is a text, not a number");
        assert_eq!(words.help.as_deref(), Some("take the quotes off: `0.7`"));
        let words = reword(
            "invalid type: string \"true\", expected a boolean",
            "group_by_length",
            Some("true"),
        );
        assert_eq!(words.message, "`\"true\"` is a text, not `true` or `false`");
        // Without quotes it would be no better.
        check(
            "invalid type: string \"-3\", expected u32",
            "-3",
            "`-3` is not a whole number, 0 or more",
            None,
        );
        check(
            "invalid type: string \"0\", expected a nonzero u32",
            "0",
            "`0` is not a whole number, 1 or more",
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
            "unknown word `float`, expected one of `auto`, `float32`",
            None,
        );
    }
}
