//! JSON objects and Python dicts in the replies of judges.

use std::collections::HashMap;

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

/// Returns the entries of a text that is one JSON object or one Python dict of literals, with
/// nothing but white space around it. Of equal keys, the last one counts.
pub fn object(text: &str) -> Option<HashMap<String, Literal>> {
    let mut parser = Parser { rest: text.trim() };
    let object = parser.object(0)?;
    parser.rest.trim().is_empty().then_some(object)
}

struct Parser<'t> {
    rest: &'t str,
}

impl Parser<'_> {
    /// Skips white space and one character, if it is the next one.
    fn take(&mut self, wanted: char) -> bool {
        self.rest = self.rest.trim_start();
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
            if !self.take(',') && !self.rest.trim_start().starts_with('}') {
                return None;
            }
        }
        Some(entries)
    }

    fn list(&mut self, [open, close]: [char; 2], depth: usize) -> Option<Literal> {
        if !self.take(open) || depth > DEPTH_MAX {
            return None;
        }
        while !self.take(close) {
            self.value(depth)?;
            if !self.take(',') && !self.rest.trim_start().starts_with(close) {
                return None;
            }
        }
        Some(Literal::Other)
    }

    fn value(&mut self, depth: usize) -> Option<Literal> {
        self.rest = self.rest.trim_start();
        match self.rest.chars().next()? {
            '{' => self.object(depth + 1).map(|_| Literal::Other),
            '[' => self.list(['[', ']'], depth + 1),
            '(' => self.list(['(', ')'], depth + 1),
            quote @ ('"' | '\'') => self.text(quote).map(Literal::Text),
            _ => self.word(),
        }
    }

    fn word(&mut self) -> Option<Literal> {
        let is_end = |c: char| c.is_whitespace() || ",:]})".contains(c);
        let end = self.rest.find(is_end).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        Some(match word {
            "true" | "True" => Literal::Bool(true),
            "false" | "False" => Literal::Bool(false),
            "null" | "None" => Literal::Other,
            word => {
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
                '\n' if quote == '\'' => return None,
                other => text.push(other),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_and_python_are_read_and_nothing_else() {
        let score = |text: &str| object(text)?.remove("score");
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
        assert_eq!(object(&deep), None);
    }
}
