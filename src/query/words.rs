//! Error messages of queries, in terms of pipelines.

use datafusion::common::{Column, SchemaError};
use datafusion::error::DataFusionError;
use datafusion::logical_expr::LogicalPlan;
use datafusion::sql::parser::Statement;
use datafusion::sql::sqlparser::ast::Statement as Sql;

use super::interface::{Param, QueryError};

/// The statements that are allowed in place of a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowed {
    /// Statements that return the rows of a table.
    Queries,
    /// Queries, and statements that show tables, settings and plans.
    Looks,
}

/// Rejects a statement that is not a query.
pub fn refuse_others(statement: &Statement, allowed: Allowed) -> Result<(), QueryError> {
    let looks = match statement {
        Statement::Explain(explain) => return refuse_shown(&explain.statement, allowed),
        Statement::Statement(statement) => match &**statement {
            Sql::Query(_) => return Ok(()),
            Sql::Explain { .. }
            | Sql::ExplainTable { .. }
            | Sql::ShowTables { .. }
            | Sql::ShowColumns { .. }
            | Sql::ShowVariable { .. }
            | Sql::ShowFunctions { .. } => true,
            _ => false,
        },
        Statement::CreateExternalTable(_) | Statement::CopyTo(_) | Statement::Reset(_) => false,
    };
    if looks && allowed == Allowed::Looks {
        return Ok(());
    }
    Err(refusal(&statement.to_string(), allowed))
}

fn refuse_shown(statement: &Statement, allowed: Allowed) -> Result<(), QueryError> {
    match allowed {
        Allowed::Looks => refuse_others(statement, allowed),
        Allowed::Queries => Err(refusal("EXPLAIN", allowed)),
    }
}

/// Returns the error for a statement, named by its leading keywords.
fn refusal(statement: &str, allowed: Allowed) -> QueryError {
    let is_keyword = |word: &&str| word.chars().all(|c| c.is_ascii_uppercase());
    let words = statement.split_whitespace().take_while(is_keyword).take(2);
    let name = words.collect::<Vec<_>>().join(" ").to_lowercase();
    let more = match allowed {
        Allowed::Queries => "",
        Allowed::Looks => "; to write its rows to a file, use `--format parquet`",
    };
    QueryError::Other(format!(
        "`{name}` is not supported: write a query that begins with `select` or `with`{more}"
    ))
}

/// Rejects a `$name` that has no value.
pub fn refuse_unknown_params(
    plan: &LogicalPlan,
    params: &[(&str, Param)],
) -> Result<(), QueryError> {
    let names = plan.get_parameter_names().map_err(error)?;
    let is_known = |name: &&String| {
        let name = name.trim_start_matches('$');
        params.iter().any(|(known, _)| *known == name)
    };
    let mut unknown: Vec<&String> = names.iter().filter(|name| !is_known(name)).collect();
    unknown.sort();
    let Some(name) = unknown.first() else {
        return Ok(());
    };
    let known: Vec<String> = params
        .iter()
        .map(|(name, _)| format!("`${name}`"))
        .collect();
    Err(QueryError::NoParameter {
        name: name.trim_start_matches('$').to_owned(),
        advice: if known.is_empty() {
            ": only `rounds.stop_when` has a parameter, `$round`".to_owned()
        } else {
            format!(", only {}", known.join(", "))
        },
    })
}

/// Converts an error of DataFusion, without the layers that only its developers need.
#[expect(
    clippy::needless_pass_by_value,
    reason = "it is used as a function on errors"
)]
pub fn error(error: DataFusionError) -> QueryError {
    let message = match error.find_root() {
        // Its `Display` adds the error in Rust's debug notation.
        DataFusionError::SQL(error, _) => {
            let text = error.to_string();
            return syntax_error(text.strip_prefix("sql parser error: ").unwrap_or(&text));
        }
        DataFusionError::SchemaError(problem, _)
            if let SchemaError::FieldNotFound {
                field,
                valid_fields,
            } = &**problem =>
        {
            return QueryError::NoColumn {
                name: field.quoted_flat_name(),
                advice: columns_there(field, valid_fields, &problem.to_string()),
            };
        }
        DataFusionError::ResourcesExhausted(_) => {
            "the query exceeds its memory limit: join or group fewer rows, or fewer and smaller columns"
                .to_owned()
        }
        DataFusionError::Internal(problem) => {
            let problem = problem.split(DataFusionError::BACK_TRACE_SEP).next();
            format!(
                "DataFusion cannot run this query: {}; rewrite the query",
                problem.unwrap_or_default().trim_end_matches('.')
            )
        }
        root => {
            let text = root.strip_backtrace();
            let prefixes = [
                "Error during planning: ",
                "Schema error: ",
                "Execution error: ",
            ];
            let text = prefixes.iter().fold(text.as_str(), |text, prefix| {
                text.strip_prefix(prefix).unwrap_or(text)
            });
            if let Some(table) = unknown_table(text) {
                return QueryError::NoTable(table.to_owned());
            }
            if let Some(message) = wrong_arguments(text) {
                message
            } else if text.contains("OuterReferenceColumn") {
                "a subquery here cannot read columns of the outer tables: join them, or put `unnest` \
                 in the `select` list"
                    .to_owned()
            } else if text.contains("are supported in tuples") {
                "tuples are not supported here: write one expression".to_owned()
            } else {
                let text = text.replace("This feature is not implemented: ", "not supported: ");
                let text = text.split(BUG).next().unwrap_or_default();
                match text.contains("No space left on device") {
                    true => format!("{text}: the folder of temporary files is full; set TMPDIR to another one"),
                    false => text.to_owned(),
                }
            }
        }
    };
    QueryError::Other(message)
}

/// Reads the parser's message, which ends with the place in words.
fn syntax_error(text: &str) -> QueryError {
    let message = text.to_owned();
    let (rest, place) = match text.rsplit_once(" at Line: ") {
        Some((rest, place)) => {
            let numbers = place.split_once(", Column: ");
            let numbers =
                numbers.and_then(|(line, column)| Some((line.parse().ok()?, column.parse().ok()?)));
            if numbers.is_none() {
                return QueryError::Other(message);
            }
            (rest, numbers)
        }
        None if text.ends_with(", found: EOF") => (text, None),
        None => return QueryError::Other(message),
    };
    let problem = match rest
        .strip_prefix("Expected: ")
        .and_then(|rest| rest.rsplit_once(", found: "))
    {
        Some((expected, "EOF")) => format!("the query ends where {expected} was expected"),
        Some((expected, found)) => format!("expected {expected}, found `{found}`"),
        None => rest.to_owned(),
    };
    QueryError::Syntax {
        message,
        problem,
        place,
    }
}

/// The maximum number of columns to list.
const COLUMNS_SHOWN: usize = 12;

/// Returns the advice on an unknown column; `told` is DataFusion's message, whose suggestion is
/// kept.
fn columns_there(column: &Column, columns: &[Column], told: &str) -> String {
    let mut others = columns.iter();
    if let Some(other) = others.find(|other| other.name.eq_ignore_ascii_case(&column.name))
        && other.name != column.name
    {
        let name = &other.name;
        return format!("; names without quotes are lower-cased: write \"{name}\"");
    }
    let suggest = told
        .split_once("Did you mean '")
        .and_then(|(_, rest)| rest.split_once("'?"));
    if let Some((suggest, _)) = suggest {
        return format!("; did you mean `{suggest}`?");
    }
    if columns.is_empty() {
        return String::new();
    }
    let names: Vec<String> = columns.iter().map(Column::quoted_flat_name).collect();
    let more = if names.len() > COLUMNS_SHOWN {
        ", …"
    } else {
        ""
    };
    let shown = names[..names.len().min(COLUMNS_SHOWN)].join(", ");
    format!("; the columns are {shown}{more}")
}

/// The start of DataFusion's request to report a bug.
const BUG: &str = "\nThis issue was likely caused by a bug";

/// The maximum number of function signatures to list.
const FORMS_SHOWN: usize = 4;

/// Returns the message for a function call with unsupported argument types.
fn wrong_arguments(text: &str) -> Option<String> {
    let (_, rest) = text.split_once("No function matches the given name and argument types '")?;
    let (call, rest) = rest.split_once('\'')?;
    let forms = rest
        .split_once("Candidate functions:")
        .map_or("", |(_, forms)| forms);
    let forms: Vec<&str> = forms
        .lines()
        .map(str::trim)
        .filter(|form| !form.is_empty())
        .collect();
    let more = if forms.len() > FORMS_SHOWN {
        ", …"
    } else {
        ""
    };
    let shown = forms[..forms.len().min(FORMS_SHOWN)].join(", ");
    let there = if shown.is_empty() {
        String::new()
    } else {
        format!("; the signatures are {shown}{more}")
    };
    Some(format!("there is no function {call}{there}"))
}

/// Returns the unknown table named in DataFusion's message.
fn unknown_table(text: &str) -> Option<&str> {
    let name = text.strip_prefix("table '")?.strip_suffix("' not found")?;
    Some(name.strip_prefix("datafusion.public.").unwrap_or(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_of_a_syntax_error_is_read_from_the_parsers_message() {
        let error = |text: &str| match syntax_error(text) {
            QueryError::Syntax { problem, place, .. } => (problem, place),
            other => (other.to_string(), Some((0, 0))),
        };
        assert_eq!(
            error("Expected: end of statement, found: form at Line: 2, Column: 1"),
            (
                "expected end of statement, found `form`".to_owned(),
                Some((2, 1))
            )
        );
        assert_eq!(
            error("Expected: an expression, found: EOF"),
            (
                "the query ends where an expression was expected".to_owned(),
                None
            )
        );
        let other = "recursion limit exceeded";
        assert_eq!(error(other), (other.to_owned(), Some((0, 0))));
    }
}
