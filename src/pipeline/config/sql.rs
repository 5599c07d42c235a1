//! Diagnostics for SQL, and their places in the pipeline file.
//!
//! The parser counts lines and columns in a text that YAML has unindented, unfolded or unquoted.
//! Apart from escapes in double quotes, YAML only changes whitespace, so the n-th non-whitespace
//! character of the query is the n-th non-whitespace character of the scalar in the file.

use std::ops::Range;

use super::diagnostic::{At, Diagnostic};
use super::serde_messages::listed;
use super::suggest::suggest;
use ovchat_query::no_table;

/// A piece of a query: the query as read by YAML, and the position of the piece in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    query: String,
    /// The start of the piece, in bytes.
    offset: usize,
    /// The line and column of the piece, counted from 1.
    position: (usize, usize),
}

/// The diagnostic for a query that cannot be planned. `error` is DataFusion's message about
/// `planned`, which contains `written`, the text of the setting; `tables` are the tables that it
/// may read.
pub fn unplanned<'a>(
    code: &'static str,
    at: At,
    error: &str,
    written: &str,
    planned: &str,
    tables: impl Iterator<Item = &'a str>,
) -> Diagnostic {
    let (message, found) = syntax_error(error, planned);
    let start = planned.find(written);
    let offset = match (found, start) {
        (Some(found), Some(start)) => Some(found.saturating_sub(start).min(written.len())),
        (None, _) => unknown_name(error).and_then(|name| word(written, name)),
        (Some(_), None) => None,
    };
    let diagnostic = Diagnostic::new(code, at, message);
    let tables: Vec<&str> = tables.collect();
    let diagnostic = match tables_there(error, &tables) {
        Some((suggest, help)) => diagnostic.suggest(suggest).help(help),
        None => diagnostic,
    };
    match offset {
        None => diagnostic,
        Some(offset) => diagnostic.piece(Piece {
            query: written.to_owned(),
            offset,
            position: position(written, offset),
        }),
    }
}

/// Returns the help for an error about an unknown table: a suggestion, and a list of all tables.
pub fn tables_there<'a>(error: &str, tables: &[&'a str]) -> Option<(Option<&'a str>, String)> {
    let table = unknown_table(error)?;
    let suggested = suggest(table, tables.iter().copied());
    let all = format!("available tables: {}", listed(tables.iter().copied()));
    (!tables.is_empty()).then_some((suggested, all))
}

/// Returns the parser's message in words and its byte offset in the query; any other error is
/// returned unchanged.
fn syntax_error(error: &str, query: &str) -> (String, Option<usize>) {
    let (words, offset) = match error.rsplit_once(" at Line: ") {
        Some((words, place)) => {
            let numbers = place.split_once(", Column: ");
            let numbers =
                numbers.and_then(|(line, column)| Some((line.parse().ok()?, column.parse().ok()?)));
            let Some((line, column)) = numbers else {
                return (error.to_owned(), None);
            };
            (words, offset_of(query, line, column))
        }
        None if error.ends_with(", found: EOF") => (error, query.trim_end().len()),
        None => return (error.to_owned(), None),
    };
    let words = match words
        .strip_prefix("Expected: ")
        .and_then(|rest| rest.rsplit_once(", found: "))
    {
        Some((expected, "EOF")) => format!("the query ends where {expected} was expected"),
        Some((expected, found)) => format!("expected {expected}, found `{found}`"),
        None => words.to_owned(),
    };
    (format!("SQL syntax error: {words}"), Some(offset))
}

/// Returns the unknown table that an error names.
fn unknown_table(error: &str) -> Option<&str> {
    let name = error.split('`').nth(1)?;
    (error == no_table(name)).then_some(name)
}

/// Returns the unknown table, parameter or column that an error names.
fn unknown_name(error: &str) -> Option<&str> {
    if let Some(rest) = error.strip_prefix("there is no `$") {
        return rest.split('`').next();
    }
    if let Some(table) = unknown_table(error) {
        return Some(table);
    }
    let rest = error.strip_prefix("there is no column `")?;
    rest.split('`').next()
}

/// Returns the offset of the first occurrence of a name in a query as a whole word.
fn word(query: &str, name: &str) -> Option<usize> {
    let is_in_a_word = |c: char| c.is_alphanumeric() || c == '_' || c == '.';
    let mut found = query.match_indices(name);
    let found = found.find(|(start, name)| {
        !query[..*start].ends_with(is_in_a_word)
            && !query[start + name.len()..].starts_with(|c| is_in_a_word(c) && c != '.')
    });
    found.map(|(start, _)| start)
}

/// Returns the byte offset of a line and column, counted from 1.
fn offset_of(text: &str, line: usize, column: usize) -> usize {
    let lines = text.split_inclusive('\n').take(line.saturating_sub(1));
    let start: usize = lines.map(str::len).sum();
    let rest = text[start..].chars().take(column.saturating_sub(1));
    start + rest.map(char::len_utf8).sum::<usize>()
}

/// Returns the line and column of a byte offset, counted from 1.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = &text[..offset];
    let line = before.rfind('\n').map_or(0, |newline| newline + 1);
    (
        1 + before.matches('\n').count(),
        1 + before[line..].chars().count(),
    )
}

impl Piece {
    /// Finds the piece in a text that starts with the scalar of the query: the word, number or
    /// symbol at the offset, or the last one if the query ends there. Returns `None` if the scalar
    /// does not spell the query character by character, as with a reference or an escape in it.
    pub fn find(&self, scalar: &str) -> Option<Range<usize>> {
        let word = |c: char| c.is_alphanumeric() || c == '_';
        let target = match self.query[self.offset..].find(|c: char| !c.is_whitespace()) {
            Some(more) => self.offset + more,
            None => self.query.trim_end().char_indices().next_back()?.0,
        };
        let rest = &self.query[target..];
        let length = match rest.find(|c| !word(c)) {
            Some(0) => rest.chars().next()?.len_utf8(),
            Some(length) => length,
            None => rest.len(),
        };
        let end = target + length;
        // Back to the start of the word.
        let before = self.query[..target].trim_end_matches(word).len();
        let target = if rest.starts_with(word) {
            before
        } else {
            target
        };

        let (mut at, quote) = match scalar.chars().next()? {
            '|' | '>' => (scalar.find('\n')?, None),
            quote @ ('"' | '\'') => (1, Some(quote)),
            _ => (0, None),
        };
        let mut start = None;
        for (offset, wanted) in self.query[..end].char_indices() {
            if wanted.is_whitespace() {
                continue;
            }
            let more = scalar[at..].find(|c: char| !c.is_whitespace())?;
            at += more;
            if !scalar[at..].starts_with(wanted) || (quote == Some('"') && wanted == '\\') {
                return None;
            }
            if offset == target {
                start = Some(at);
            }
            at += wanted.len_utf8();
            // A single quote is doubled within single quotes.
            at += usize::from(quote == Some('\'') && wanted == '\'');
        }
        Some(start?..at)
    }

    /// The position of the piece, in words.
    pub fn words(&self) -> String {
        let (line, column) = self.position;
        format!("line {line}, column {column} of the query")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks the text underlined in `scalar`, the source of `query`, for a piece at a line and
    /// column.
    #[track_caller]
    fn check(scalar: &str, query: &str, line: usize, column: usize, expected: Option<&str>) {
        let offset = offset_of(query, line, column);
        assert_eq!(position(query, offset), (line, column));
        let query = query.to_owned();
        let piece = Piece {
            query,
            offset,
            position: (line, column),
        };
        let found = piece.find(scalar).map(|span| &scalar[span]);
        assert_eq!(found, expected, "{scalar:?}");
    }

    #[test]
    fn a_piece_is_found_in_every_style_of_scalar() {
        check(
            "select a form t # c",
            "select a form t",
            1,
            10,
            Some("form"),
        );
        check(
            "\"select a form t\"",
            "select a form t",
            1,
            10,
            Some("form"),
        );
        check(
            "|  # why\n    select a\n      form t\n  next: 1",
            "select a\n  form t\n",
            2,
            3,
            Some("form"),
        );
        check(
            ">-\n    select größe\n    form t",
            "select größe form t",
            1,
            14,
            Some("form"),
        );
        check(
            "'select ''x'' form t'",
            "select 'x' form t",
            1,
            12,
            Some("form"),
        );
        check("select (a\n  form t)", "select (a form t)", 1, 8, Some("("));
        // At the end of the query, the last word is underlined.
        check(
            "|\n    select a from\n",
            "select a from\n",
            1,
            14,
            Some("from"),
        );
    }

    #[test]
    fn what_the_file_does_not_say_letter_by_letter_is_not_found() {
        check("\"select ${k} form t\"", "select 5 form t", 1, 10, None);
        check("\"select \\u0061 form t\"", "select a form t", 1, 10, None);
    }

    #[test]
    fn errors_of_the_parser_are_told_in_words_with_their_place() {
        let query = "select a\nform t where";
        let (words, offset) = syntax_error(
            "Expected: end of statement, found: form at Line: 2, Column: 1",
            query,
        );
        assert_eq!(
            words,
            "SQL syntax error: expected end of statement, found `form`"
        );
        assert_eq!(offset, Some(9));
        let (words, offset) = syntax_error("Expected: an expression, found: EOF", query);
        assert_eq!(
            words,
            "SQL syntax error: the query ends where an expression was expected"
        );
        assert_eq!(offset, Some(query.len()));
        let plain = "table 't' not found";
        assert_eq!(syntax_error(plain, query), (plain.to_owned(), None));
        assert_eq!(
            unknown_name("there is no column `c.txt`; did you mean `c.text`?"),
            Some("c.txt")
        );
        assert_eq!(unknown_name("there is no table `rewads`"), Some("rewads"));
        assert_eq!(unknown_name("there is no `$k` here"), Some("k"));
        assert_eq!(word("select texts, text from t", "text"), Some(14));
    }
}
