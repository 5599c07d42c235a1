//! What is wrong with a query, in the words of people who write pipelines.

use datafusion::common::{Column, SchemaError};
use datafusion::error::DataFusionError;
use datafusion::logical_expr::LogicalPlan;
use datafusion::sql::parser::Statement;
use datafusion::sql::sqlparser::ast::Statement as Sql;

use super::{MEMORY_BYTES, Param, QueryError};

/// Which statements may stand where a query is expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowed {
    /// Those that give the rows of a table.
    Queries,
    /// These, and those that show what there is and how it is computed.
    Looks,
}

/// Refuses a statement that is no query.
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

/// The refusal of a statement, named by the keywords that it begins with.
fn refusal(statement: &str, allowed: Allowed) -> QueryError {
    let is_keyword = |word: &&str| word.chars().all(|c| c.is_ascii_uppercase());
    let words = statement.split_whitespace().take_while(is_keyword).take(2);
    let name = words.collect::<Vec<_>>().join(" ").to_lowercase();
    let more = match allowed {
        Allowed::Queries => "",
        Allowed::Looks => "; `--format parquet` writes its rows to a file",
    };
    QueryError(format!(
        "`{name}` is not supported: write a query, which begins with `select` or `with`{more}"
    ))
}

/// Refuses a `$name` that has no value here.
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
    Err(QueryError(if known.is_empty() {
        format!(
            "there is no `{name}` here: `rounds.stop_when` has `$round`, and other queries have no such names"
        )
    } else {
        format!("there is no `{name}` here, only {}", known.join(", "))
    }))
}

/// DataFusion's words, without the layers that only its developers need.
#[expect(
    clippy::needless_pass_by_value,
    reason = "it is used as a function on errors"
)]
pub fn error(error: DataFusionError) -> QueryError {
    QueryError(match error.find_root() {
        // As a value in Rust's notation otherwise.
        DataFusionError::SQL(error, _) => {
            let text = error.to_string();
            text.strip_prefix("sql parser error: ")
                .unwrap_or(&text)
                .to_owned()
        }
        DataFusionError::SchemaError(problem, _)
            if let SchemaError::FieldNotFound {
                field,
                valid_fields,
            } = &**problem =>
        {
            no_column(field, valid_fields, &problem.to_string())
        }
        DataFusionError::ResourcesExhausted(_) => format!(
            "the query needs more than the {} MB that it may use: join or group fewer rows, or fewer and \
             smaller columns",
            MEMORY_BYTES >> 20
        ),
        DataFusionError::Internal(problem) => {
            let problem = problem.split(DataFusionError::BACK_TRACE_SEP).next();
            format!(
                "DataFusion can't compute this query: {}; write it in another way",
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
                no_table(table)
            } else if let Some(message) = wrong_arguments(text) {
                message
            } else if text.contains("OuterReferenceColumn") {
                "a subquery here can't read columns of the tables around it: join them, or write `unnest` \
                 under `select`"
                    .to_owned()
            } else if text.contains("are supported in tuples") {
                "several values in parentheses are not supported here: write one expression"
                    .to_owned()
            } else {
                let text = text.replace("This feature is not implemented: ", "not supported: ");
                text.split(BUG).next().unwrap_or_default().to_owned()
            }
        }
    })
}

/// Columns that are listed.
const COLUMNS_SHOWN: usize = 12;

/// The message about a column that is not there; `told` is DataFusion's, whose guess is kept.
fn no_column(column: &Column, columns: &[Column], told: &str) -> String {
    let there_is_none = format!("there is no column `{}`", column.quoted_flat_name());
    let mut others = columns.iter();
    if let Some(other) = others.find(|other| other.name.eq_ignore_ascii_case(&column.name))
        && other.name != column.name
    {
        let name = &other.name;
        return format!("{there_is_none}; capitals count in quotes only: write \"{name}\"");
    }
    let suggest = told
        .split_once("Did you mean '")
        .and_then(|(_, rest)| rest.split_once("'?"));
    if let Some((suggest, _)) = suggest {
        return format!("{there_is_none}; did you mean `{suggest}`?");
    }
    if columns.is_empty() {
        return there_is_none;
    }
    let names: Vec<String> = columns.iter().map(Column::quoted_flat_name).collect();
    let more = if names.len() > COLUMNS_SHOWN {
        ", …"
    } else {
        ""
    };
    let shown = names[..names.len().min(COLUMNS_SHOWN)].join(", ");
    format!("{there_is_none}; the columns are {shown}{more}")
}

/// The message about a table that is not there.
pub fn no_table(table: &str) -> String {
    format!("there is no table `{table}`")
}

/// What DataFusion asks its users to do about its own mistakes.
const BUG: &str = "\nThis issue was likely caused by a bug";

/// Forms of a function that are listed.
const FORMS_SHOWN: usize = 4;

/// The message about a function that does not take such arguments.
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
        format!("; there is {shown}{more}")
    };
    Some(format!("there is no function {call}{there}"))
}

/// The table that a query names and that is not there, in DataFusion's message about it.
fn unknown_table(text: &str) -> Option<&str> {
    let name = text.strip_prefix("table '")?.strip_suffix("' not found")?;
    Some(name.strip_prefix("datafusion.public.").unwrap_or(name))
}
