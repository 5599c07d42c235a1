//! A piece of an SQL query, and its place in the pipeline file.
//!
//! The SQL parser counts lines and columns in a text that YAML has unindented, unfolded or
//! unquoted. Apart from escapes in double quotes, YAML only changes whitespace, so the n-th
//! non-whitespace character of the query is the n-th non-whitespace character of the scalar in the
//! file.

use std::ops::Range;

/// A piece of a query: the query as read by YAML, and the position of the piece in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    query: String,
    /// The start of the piece, in bytes.
    offset: usize,
    /// The line and column of the piece, counted from 1.
    position: (usize, usize),
}

impl Piece {
    /// Creates the piece of a query at an offset.
    pub fn new(query: &str, offset: usize) -> Self {
        Self {
            query: query.to_owned(),
            offset,
            position: position(query, offset),
        }
    }

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

/// Returns the byte offset of a line and column, counted from 1.
pub fn offset_of(text: &str, line: usize, column: usize) -> usize {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks the text underlined in `scalar`, the source of `query`, for a piece at a line and
    /// column.
    #[track_caller]
    fn check(scalar: &str, query: &str, line: usize, column: usize, expected: Option<&str>) {
        let offset = offset_of(query, line, column);
        let piece = Piece::new(query, offset);
        assert_eq!(piece.position, (line, column));
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
}
