//! Diagnostics for SQL that cannot be planned.

use super::diagnostic::{At, Diagnostic};
use super::piece::{Piece, offset_of};
use super::suggest::{listed, suggest};
use ovchat_query::QueryError;

/// The diagnostic for a query that cannot be planned. `error` is about `planned`, which contains
/// `written`, the text of the setting; `tables` are the tables that it may read.
pub fn unplanned<'a>(
    code: &'static str,
    at: At,
    error: &QueryError,
    written: &str,
    planned: &str,
    tables: impl Iterator<Item = &'a str>,
) -> Diagnostic {
    let (message, offset) = match error {
        QueryError::Syntax { problem, place, .. } => {
            let found = match *place {
                Some((line, column)) => offset_of(planned, line, column),
                None => planned.trim_end().len(),
            };
            let start = planned.find(written);
            let offset = start.map(|start| found.saturating_sub(start).min(written.len()));
            (format!("SQL syntax error: {problem}"), offset)
        }
        other => {
            let offset = other.unknown_name().and_then(|name| word(written, name));
            (other.to_string(), offset)
        }
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
pub fn tables_there<'a>(
    error: &QueryError,
    tables: &[&'a str],
) -> Option<(Option<&'a str>, String)> {
    let QueryError::NoTable(table) = error else {
        return None;
    };
    let suggested = suggest(table, tables.iter().copied());
    let all = format!("available tables: {}", listed(tables.iter().copied()));
    (!tables.is_empty()).then_some((suggested, all))
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
    fn a_name_is_found_as_a_whole_word() {
        assert_eq!(word("select texts, text from t", "text"), Some(14));
        assert_eq!(word("select c.text from c", "text"), None);
    }
}
