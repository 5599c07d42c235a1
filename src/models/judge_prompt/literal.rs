//! JSON objects and Python dicts in the replies of judges.

use std::collections::HashMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A value of an object.
#[derive(Debug, Clone, PartialEq)]
pub enum Literal {
    Number(f64),
    Text(String),
    Bool(bool),
    /// Null, or a list or object, whose contents do not matter.
    Other,
}

/// Maximum nesting of lists and objects.
const DEPTH_MAX: usize = 64;

/// The syntax of an object.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Syntax {
    /// JSON or Python, with the slips of models: single quotes, a comma at the end, lines in strings.
    #[default]
    Any,
    /// JSON (RFC 8259), as Python's `json.loads` reads it.
    Json,
    /// A dict of literals, as Python's `ast.literal_eval` reads it.
    Python,
}

/// Returns the entries of a text that is one JSON object or one Python dict of literals, with
/// nothing but white space around it. Of equal keys, the last one counts.
pub fn object(text: &str, syntax: Syntax) -> Option<HashMap<String, Literal>> {
    if syntax == Syntax::Json {
        let object: Map<String, Value> = serde_json::from_str(text).ok()?;
        return Some(
            object
                .into_iter()
                .map(|(key, value)| (key, value.into()))
                .collect(),
        );
    }
    let is_python = syntax == Syntax::Python;
    let rest = text.trim();
    let mut parser = Parser { rest, is_python };
    let object = parser.object(0)?;
    parser.skip();
    parser.rest.is_empty().then_some(object)
}

impl From<Value> for Literal {
    fn from(value: Value) -> Self {
        match value {
            Value::Bool(flag) => Self::Bool(flag),
            Value::String(text) => Self::Text(text),
            Value::Number(number) => number.as_f64().map_or(Self::Other, Self::Number),
            Value::Null | Value::Array(_) | Value::Object(_) => Self::Other,
        }
    }
}

struct Parser<'t> {
    rest: &'t str,
    is_python: bool,
}

impl Parser<'_> {
    /// Skips white space, and comments of Python.
    fn skip(&mut self) {
        self.rest = self.rest.trim_start();
        while self.is_python && self.rest.starts_with('#') {
            let end = self.rest.find('\n').unwrap_or(self.rest.len());
            self.rest = self.rest[end..].trim_start();
        }
    }

    /// Skips white space and one character, if it is the next one.
    fn take(&mut self, wanted: char) -> bool {
        self.skip();
        let rest = self.rest.strip_prefix(wanted);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn object(&mut self, depth: usize) -> Option<HashMap<String, Literal>> {
        if !self.take('{') || depth > DEPTH_MAX {
            return None;
        }
        let mut entries = HashMap::new();
        while !self.take('}') {
            let key = match self.value(depth)? {
                Literal::Text(key) => key,
                // A key that is no string cannot be asked for.
                _ => String::new(),
            };
            if !self.take(':') {
                return None;
            }
            entries.insert(key, self.value(depth)?);
            if !self.take(',') && !self.rest.starts_with('}') {
                return None;
            }
        }
        Some(entries)
    }

    /// A list, a tuple, or a value in parentheses.
    fn list(&mut self, [open, close]: [char; 2], depth: usize) -> Option<Literal> {
        if !self.take(open) || depth > DEPTH_MAX {
            return None;
        }
        let mut only = None;
        let mut has_comma = false;
        while !self.take(close) {
            let value = self.value(depth)?;
            only = Some(value).filter(|_| !has_comma);
            let comma = self.take(',');
            if !comma && !self.rest.starts_with(close) {
                return None;
            }
            has_comma |= comma;
        }
        let is_value = open == '(' && !has_comma;
        Some(only.filter(|_| is_value).unwrap_or(Literal::Other))
    }

    fn value(&mut self, depth: usize) -> Option<Literal> {
        self.skip();
        match self.rest.chars().next()? {
            '{' => self.object(depth + 1).map(|_| Literal::Other),
            '[' => self.list(['[', ']'], depth + 1),
            '(' => self.list(['(', ')'], depth + 1),
            quote @ ('"' | '\'') => self.text(quote).map(Literal::Text),
            _ => self.word(),
        }
    }

    fn word(&mut self) -> Option<Literal> {
        let is_end = |c: char| c.is_whitespace() || ",:]})#".contains(c);
        let end = self.rest.find(is_end).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        Some(match word {
            "true" | "false" | "null" if self.is_python => return None,
            "true" | "True" => Literal::Bool(true),
            "false" | "False" => Literal::Bool(false),
            "null" | "None" => Literal::Other,
            word => {
                if self.is_python && has_leading_zero(word) {
                    return None;
                }
                let is_number = word.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c));
                Literal::Number(word.parse().ok().filter(|_| is_number)?)
            }
        })
    }

    fn text(&mut self, quote: char) -> Option<String> {
        let mut text = String::new();
        let mut characters = self.rest[1..].char_indices();
        while let Some((at, character)) = characters.next() {
            match character {
                character if character == quote => {
                    self.rest = &self.rest[1 + at + quote.len_utf8()..];
                    return Some(text);
                }
                '\\' => text.push(match characters.next()?.1 {
                    'n' => '\n',
                    't' => '\t',
                    'r' => '\r',
                    'u' => {
                        let digits: String = characters.by_ref().take(4).map(|(_, c)| c).collect();
                        let code = u32::from_str_radix(&digits, 16).ok()?;
                        char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
                    }
                    other => other,
                }),
                // A string of Python ends with its line; models write JSON strings over several.
                '\n' if self.is_python || quote == '\'' => return None,
                other => text.push(other),
            }
        }
        None
    }
}

/// True for an integer such as `04`, which Python refuses.
fn has_leading_zero(word: &str) -> bool {
    let digits = word.trim_start_matches(['+', '-']);
    let is_integer = digits.bytes().all(|byte| byte.is_ascii_digit());
    is_integer
        && digits.len() > 1
        && digits.starts_with('0')
        && digits.bytes().any(|byte| byte != b'0')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_and_python_are_read_and_nothing_else() {
        let score = |text: &str| object(text, Syntax::Any)?.remove("score");
        let four = Some(Literal::Number(4.0));
        for text in [
            "{'score': 4}",
            "{\"score\": 4.0}",
            " {'score':4,}\n",
            "{'why': 'it\\'s, \"so\"', 'score': 4, 'list': [1, (2,), {}], 'n': None, 't': True}",
            "{\"a\": \"\\u00fc}\", \"score\": 4}",
        ] {
            assert_eq!(score(text), four, "{text}");
        }
        assert_eq!(score("{'score': '4'}"), Some(Literal::Text("4".to_owned())));
        for text in [
            "",
            "4",
            "{'score' 4}",
            "{'score': 4",
            "{'score': 4} and more",
            "{'score': four}",
            "{'score': nan}",
            "{'score': 4 5}",
            "{'score': 'four}",
            "score: 4",
        ] {
            assert_eq!(score(text), None, "{text}");
        }
        let deep = format!("{{'a': {}1{}}}", "[".repeat(100), "]".repeat(100));
        assert_eq!(object(&deep, Syntax::Any), None);
    }

    /// The expected values are those of `json.loads` and `ast.literal_eval` of Python 3.11.
    #[test]
    fn strict_syntaxes_are_those_of_python() {
        let read = |text: &str, syntax| match object(text, syntax)?.remove("score")? {
            Literal::Number(number) => Some(number),
            Literal::Bool(flag) => Some(f64::from(u8::from(flag))),
            _ => None,
        };
        for (text, json, python) in [
            ("{\"score\": 4}", Some(4.0), Some(4.0)),
            (" {\"score\": 4.5e0}\n", Some(4.5), Some(4.5)),
            ("{'score': 4}", None, Some(4.0)),
            ("{\"score\": 4,}", None, Some(4.0)),
            ("{\"score\": +7}", None, Some(7.0)),
            ("{\"score\": 07}", None, None),
            ("{\"score\": 00}", None, Some(0.0)),
            ("{\"score\": 7.}", None, Some(7.0)),
            ("{\"score\": (4)}", None, Some(4.0)),
            ("{\"score\": (4,)}", None, None),
            ("{\"score\": 4} # good", None, Some(4.0)),
            ("{\"score\": 4, # good\n \"b\": 1}", None, Some(4.0)),
            ("{\"why\": \"a\nb\", \"score\": 4}", None, None),
            ("{\"why\": \"\\q\", \"score\": 4}", None, Some(4.0)),
            ("{\"score\": true}", Some(1.0), None),
            ("{\"score\": True}", None, Some(1.0)),
            ("{\"a\": null, \"score\": 4}", Some(4.0), None),
            ("{\"score\": 4} and", None, None),
        ] {
            assert_eq!(read(text, Syntax::Json), json, "{text} as JSON");
            assert_eq!(read(text, Syntax::Python), python, "{text} as Python");
        }
    }
}
