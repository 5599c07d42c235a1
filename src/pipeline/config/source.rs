//! The text of a pipeline file, and the positions of settings in it.
//!
//! serde_yaml reports positions only in errors. So a diagnostic carries a [`KeyPath`], and
//! [`SourceText::find`] turns the path into a span by reading the text once more with a seed that
//! follows the path and fails on arrival: the error that it gets back holds the position.

use std::cell::RefCell;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::key_text::KeyText;

/// One step from a setting to a setting within it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The entry of a map; `nth` is 0 except for repeats of a duplicate key.
    Key { key: String, nth: usize },
    /// The element of a list, counted from 0.
    Index(usize),
}

/// The path of a setting in a pipeline file: `stages.rewards.score.judge`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KeyPath(Vec<Step>);

impl KeyPath {
    /// The path of the whole file.
    pub fn root() -> Self {
        Self::default()
    }

    /// The path of the entry `key`.
    #[must_use]
    pub fn key(&self, key: &str) -> Self {
        self.nth_key(key, 0)
    }

    /// The path of the setting `dotted` below this one: `ask.template`.
    #[must_use]
    pub fn below(&self, dotted: &str) -> Self {
        let keys = dotted.split('.');
        keys.fold(self.clone(), |path, key| path.key(key))
    }

    /// The path of the `nth` (from 0) of several entries with the same `key`.
    #[must_use]
    pub fn nth_key(&self, key: &str, nth: usize) -> Self {
        let key = key.to_owned();
        self.then(Step::Key { key, nth })
    }

    /// The path of the list element at `index`.
    #[must_use]
    pub fn index(&self, index: usize) -> Self {
        self.then(Step::Index(index))
    }

    /// This path extended by one step.
    #[must_use]
    pub fn then(&self, step: Step) -> Self {
        let mut steps = self.0.clone();
        steps.push(step);
        Self(steps)
    }

    /// The steps, from the file downwards.
    pub fn steps(&self) -> &[Step] {
        &self.0
    }

    /// The path of the setting that contains this one; `None` for the whole file.
    pub fn parent(&self) -> Option<Self> {
        let (_, above) = self.0.split_last()?;
        Some(Self(above.to_vec()))
    }

    /// True if this path is `other` or lies below it.
    pub fn is_in(&self, other: &Self) -> bool {
        self.0.starts_with(&other.0)
    }

    /// The innermost key: `judge`, or the empty text for the whole file.
    pub fn name(&self) -> &str {
        let mut keys = self.0.iter().rev();
        keys.find_map(|step| match step {
            Step::Key { key, .. } => Some(key.as_str()),
            Step::Index(_) => None,
        })
        .unwrap_or_default()
    }
}

impl fmt::Display for KeyPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, step) in self.0.iter().enumerate() {
            match step {
                Step::Key { key, .. } if position == 0 => f.write_str(key)?,
                Step::Key { key, .. } => write!(f, ".{key}")?,
                Step::Index(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}

/// A part of a setting: the key, left of the colon, or the value, right of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Key,
    Value,
}

/// A text that diagnostics can underline, and its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceText {
    /// The name shown in diagnostics: the path of the file as the user gave it.
    pub name: String,
    /// The text, without a byte order mark.
    pub text: String,
}

/// A piece of a source, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    pub source: Arc<SourceText>,
    pub span: Range<usize>,
}

impl fmt::Display for Span {
    /// Writes `pipeline.yaml:12`, or only the name for a setting from the command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SourceText { name, text } = &*self.source;
        let line = 1 + text[..self.span.start].matches('\n').count();
        if text.lines().nth(1).is_none() && name.starts_with("--") {
            return f.write_str(name);
        }
        write!(f, "{name}:{line}")
    }
}

impl SourceText {
    /// Creates a named text. A leading byte order mark is dropped, because YAML's positions do not
    /// count it.
    pub fn new(name: String, text: &str) -> Self {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text).to_owned();
        Self { name, text }
    }

    /// Returns the span of a setting. If the text does not contain it (a missing setting, a default
    /// value), returns the span of the nearest enclosing setting.
    pub fn find(&self, path: &KeyPath, side: Side) -> Range<usize> {
        let mut path = path.clone();
        let mut side = side;
        loop {
            let found = self.find_exactly(&path, side);
            if path == KeyPath::root() {
                let start = found.map_or(0, |span| span.start);
                return start..start;
            }
            if let Some(span) = found {
                return span;
            }
            (path, side) = around(path, side);
        }
    }

    /// Returns the text of a span.
    pub fn slice(&self, span: Range<usize>) -> &str {
        &self.text[span]
    }

    pub(super) fn find_exactly(&self, path: &KeyPath, side: Side) -> Option<Range<usize>> {
        let arrival = RefCell::new(None);
        let walk = Walk {
            steps: path.steps(),
            side,
            arrival: &arrival,
        };
        let error = walk
            .deserialize(serde_yaml::Deserializer::from_str(&self.text))
            .err()?;
        let found = arrival.into_inner()?;
        let start = error.location()?.index();
        if matches!(found, Found::Tag) {
            let length = self.text[start..].find(char::is_whitespace);
            return Some(start..start + length.unwrap_or(self.text.len() - start));
        }
        let start = start + properties(&self.text[start..]);
        let rest = &self.text[start..];
        let length = match found {
            Found::Nothing | Found::Tag => return None,
            Found::Scalar(value) => scalar(rest, value.as_deref()),
            Found::Collection => first_line(rest),
        };
        (length > 0).then_some(start..start + length)
    }
}

/// Returns the place to show for a setting that is not in the text: for an omitted value (`key:`)
/// its key, otherwise the key of the enclosing setting.
pub fn around(path: KeyPath, side: Side) -> (KeyPath, Side) {
    let is_key = matches!(path.steps().last(), Some(Step::Key { .. }));
    let path = if side == Side::Key || !is_key {
        path.parent().unwrap_or_default()
    } else {
        path
    };
    (path, Side::Key)
}

/// The node at which a walk arrived.
enum Found {
    /// An omitted value: `key:`.
    Nothing,
    /// A scalar, with its text if it is a string.
    Scalar(Option<String>),
    Collection,
    /// A YAML tag and its content.
    Tag,
}

/// Follows `steps`, and fails on arrival.
struct Walk<'a> {
    steps: &'a [Step],
    side: Side,
    arrival: &'a RefCell<Option<Found>>,
}

impl Walk<'_> {
    /// Returns the error that carries the position of the target, or any error if the walk cannot
    /// continue.
    fn stop<E: Error>(&self, found: Found) -> E {
        if self.steps.is_empty() {
            *self.arrival.borrow_mut() = Some(found);
        }
        E::custom("the walk ends here")
    }
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        Err(self.stop(Found::Scalar(None)))
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        Err(self.stop(Found::Scalar(None)))
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        Err(self.stop(Found::Scalar(None)))
    }

    fn visit_i128<E: Error>(self, _: i128) -> Result<(), E> {
        Err(self.stop(Found::Scalar(None)))
    }

    fn visit_u128<E: Error>(self, _: u128) -> Result<(), E> {
        Err(self.stop(Found::Scalar(None)))
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        Err(self.stop(Found::Scalar(None)))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        Err(self.stop(Found::Scalar(Some(text.to_owned()))))
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Err(self.stop(Found::Nothing))
    }

    fn visit_none<E: Error>(self) -> Result<(), E> {
        Err(self.stop(Found::Nothing))
    }

    fn visit_enum<A: serde::de::EnumAccess<'de>>(self, _: A) -> Result<(), A::Error> {
        Err(self.stop(Found::Tag))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let Some((Step::Index(wanted), rest)) = self.steps.split_first() else {
            return Err(self.stop(Found::Collection));
        };
        for _ in 0..*wanted {
            if list.next_element::<IgnoredAny>()?.is_none() {
                return Err(self.stop(Found::Collection));
            }
        }
        list.next_element_seed(Walk {
            steps: rest,
            ..self
        })?;
        Err(self.stop(Found::Collection))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Some((Step::Key { key, nth }, rest)) = self.steps.split_first() else {
            return Err(self.stop(Found::Collection));
        };
        let mut seen = 0;
        loop {
            let is_end = rest.is_empty() && self.side == Side::Key && seen == *nth;
            let seed = KeyText {
                refused: is_end.then_some(key),
            };
            let found = map.next_key_seed(seed).inspect_err(|_| {
                *self.arrival.borrow_mut() = Some(Found::Scalar(Some(key.clone())));
            })?;
            let Some(found) = found else {
                return Err(self.stop(Found::Collection));
            };
            let is_wanted = found.as_ref() == Some(key);
            if is_wanted && seen == *nth {
                map.next_value_seed(Walk {
                    steps: rest,
                    ..self
                })?;
                return Err(self.stop(Found::Collection));
            }
            seen += usize::from(is_wanted);
            map.next_value::<IgnoredAny>()?;
        }
    }
}

/// The length of the anchors, tags and whitespace at the start of a node.
fn properties(text: &str) -> usize {
    let mut rest = text;
    while rest.starts_with(['&', '!']) {
        let word = rest.find(char::is_whitespace).unwrap_or(rest.len());
        rest = rest[word..].trim_start();
    }
    text.len() - rest.len()
}

/// The length of the scalar at the start of `text`; `value` is its value if it is a string.
fn scalar(text: &str, value: Option<&str>) -> usize {
    if text.starts_with('"') {
        return quoted(text, |rest| rest.starts_with('\\').then_some(2));
    }
    if text.starts_with('\'') {
        return quoted(text, |rest| rest.starts_with("''").then_some(2));
    }
    if let Some(value) = value
        && !value.is_empty()
        && text.starts_with(value)
        && !value.contains('\n')
    {
        return value.len();
    }
    if value.is_some() {
        // A block scalar, or a plain one of several lines.
        return first_line(text);
    }
    let end = |c: char| c.is_whitespace() || matches!(c, ',' | ']' | '}');
    text.find(end).unwrap_or(text.len())
}

/// The length of the quoted scalar at the start of `text`. `escape` returns the length, in
/// characters, of an escape sequence at the start of its argument.
fn quoted(text: &str, escape: fn(&str) -> Option<usize>) -> usize {
    let quote = &text[..1];
    let mut at = 1;
    while at < text.len() {
        let rest = &text[at..];
        let characters = match escape(rest) {
            None if rest.starts_with(quote) => return at + 1,
            None => 1,
            Some(characters) => characters,
        };
        at += rest
            .chars()
            .take(characters)
            .map(char::len_utf8)
            .sum::<usize>();
    }
    text.len()
}

/// The length of the first line without its comment and trailing whitespace; for a flow collection,
/// the length up to its closing bracket if that is on the same line.
fn first_line(text: &str) -> usize {
    let line = text.lines().next().unwrap_or_default();
    let mut depth = 0_usize;
    let mut at = 0;
    while at < line.len() {
        let rest = &line[at..];
        match rest.as_bytes()[0] {
            b'"' | b'\'' if at == 0 || line[..at].ends_with([' ', '[', '{', ',']) => {
                at += scalar(rest, None);
                continue;
            }
            b'#' if line[..at].ends_with([' ', '\t']) => break,
            b'[' | b'{' => depth += 1,
            b']' | b'}' if depth <= 1 => return at + depth,
            b']' | b'}' => depth -= 1,
            _ => {}
        }
        at += rest.chars().next().map_or(1, char::len_utf8);
    }
    line[..at.min(line.len())].trim_end().len()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks the text that `find` underlines for the path `a.b[1].c`, written with spaces between
    /// the steps.
    #[track_caller]
    fn check(text: &str, path: &str, side: Side, expected: &str) {
        let source = SourceText::new("test.yaml".to_owned(), text);
        let mut key_path = KeyPath::root();
        for step in path.split_whitespace() {
            key_path = match step.parse() {
                Ok(index) => key_path.index(index),
                Err(_) => match step.strip_suffix('\'') {
                    Some(key) => key_path.nth_key(key, 1),
                    None => key_path.key(step),
                },
            };
        }
        let span = source.find(&key_path, side);
        assert_eq!(source.slice(span), expected, "{path} in {text:?}");
    }

    #[test]
    fn finds_keys_and_values_in_block_and_flow_maps() {
        let text = "a:\n  b: 1.5   # a comment\n  c: { d: x y, e: [1, two] }\n";
        check(text, "a b", Side::Key, "b");
        check(text, "a b", Side::Value, "1.5");
        check(text, "a c", Side::Value, "{ d: x y, e: [1, two] }");
        check(text, "a c d", Side::Value, "x y");
        check(text, "a c e", Side::Key, "e");
        check(text, "a c e 1", Side::Value, "two");
        check(text, "a", Side::Value, "b: 1.5");
    }

    #[test]
    fn finds_quoted_anchored_and_repeated_things_behind_wide_characters() {
        let text = "# größe — 図\n\"k\": &x 'it''s'\nl: *x\nl: \"a \\\" b\" # c\nü: [é, &y ø]\n";
        check(text, "k", Side::Key, "\"k\"");
        check(text, "k", Side::Value, "'it''s'");
        check(text, "l", Side::Value, "'it''s'");
        check(text, "l'", Side::Key, "l");
        check(text, "l'", Side::Value, "\"a \\\" b\"");
        check(text, "ü 1", Side::Value, "ø");
    }

    #[test]
    fn finds_the_first_line_of_values_of_several_lines() {
        let text = "a: |  # a query\n  select 1\n  from t\nb: two\n  lines\nc:\n- x\n- y: 1\n";
        check(text, "a", Side::Value, "|");
        check(text, "b", Side::Value, "two");
        check(text, "c 1 y", Side::Value, "1");
    }

    #[test]
    fn what_is_not_there_is_shown_by_what_is_around_it() {
        let text = "a:\n  b: { c: }\n";
        check(text, "a b c", Side::Value, "c");
        check(text, "a b missing", Side::Key, "b");
        check(text, "a b c deeper 7", Side::Value, "c");
        check(text, "nowhere", Side::Value, "");
        check("a: !x { b: 1 }\n", "a", Side::Value, "!x");
    }

    #[test]
    fn windows_line_ends_byte_order_marks_and_tabs_do_not_shift_spans() {
        check("\u{feff}a: 1\r\nb:\t2\t# c\r\n", "b", Side::Value, "2");
        check(
            "# \u{a0}\r\na:\r\n  - x\r\n  - y\r\n",
            "a 1",
            Side::Value,
            "y",
        );
    }

    #[test]
    fn a_path_reads_as_people_write_it() {
        let path = KeyPath::root()
            .key("stages")
            .key("a")
            .key("sql")
            .key("tables")
            .index(1);
        assert_eq!(path.to_string(), "stages.a.sql.tables[1]");
        assert_eq!(path.name(), "tables");
    }
}
