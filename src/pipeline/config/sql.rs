//! Diagnostics for SQL that cannot be planned.

use super::diagnostic::{At, Diagnostic};
use super::piece::{Piece, offset_of};
use super::suggest::{listed, suggest};
use ovchat_query::no_table;

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
        Some(offset) => diagnostic.piece(Piece::new(written, offset)),
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

#[cfg(test)]
mod tests {
    use super::*;

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
