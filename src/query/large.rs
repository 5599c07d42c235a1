//! Rejection of queries that would exhaust memory, before they run.
//!
//! Some read too many tables: DataFusion inlines common table expressions, so a chain in which each
//! reads the one before it twice doubles with each link. Others ask for one value of billions of
//! bytes in a literal.

use std::collections::HashMap;
use std::ops::ControlFlow;

use datafusion::sql::parser::Statement;
use datafusion::sql::sqlparser::ast::{
    Expr, Function, FunctionArg, FunctionArgExpr, FunctionArguments, ObjectName, Query, Visit as _,
    Visitor,
};

use super::interface::QueryError;

/// The maximum number of tables that a query may read.
const TABLES_MAX: u64 = 2_000;

/// Functions whose result is as long as one of their arguments.
const MAKE_LONG: [&str; 9] = [
    "approx_percentile_cont",
    "approx_percentile_cont_with_weight",
    "repeat",
    "lpad",
    "rpad",
    "generate_series",
    "range",
    "array_repeat",
    "list_repeat",
];

/// The maximum length requested from such a function.
const LENGTH_MAX: f64 = 10_000_000.0;

/// Rejects a query that reads too many tables or requests a value that is too long.
pub fn refuse_large(statement: &Statement) -> Result<(), QueryError> {
    let statement = match statement {
        Statement::Statement(statement) => statement,
        Statement::Explain(explain) => return refuse_large(&explain.statement),
        // These are rejected as a whole: queries are read-only.
        Statement::CreateExternalTable(_) | Statement::CopyTo(_) | Statement::Reset(_) => {
            return Ok(());
        }
    };
    let mut count = Count {
        open: vec![Level::default()],
    };
    if let ControlFlow::Break(message) = statement.visit(&mut count) {
        return Err(QueryError::Other(message));
    }
    let tables = count.open[0].tables;
    if tables <= TABLES_MAX {
        return Ok(());
    }
    Err(QueryError::Other(format!(
        "the query reads {tables} tables once its `with` clauses are inlined, the maximum is {TABLES_MAX}: \
         read each of them once, or build it as a table in an `sql` stage"
    )))
}

/// Returns the error message for a call whose result is too long.
fn too_long(function: &Function) -> Option<String> {
    let name = function.name.to_string().to_lowercase();
    let FunctionArguments::List(list) = &function.args else {
        return None;
    };
    if !MAKE_LONG.contains(&name.trim_matches('"')) {
        return None;
    }
    let length = |argument: &FunctionArg| match argument {
        FunctionArg::Unnamed(FunctionArgExpr::Expr(Expr::Value(value))) => {
            value.to_string().parse::<f64>().ok()
        }
        _ => None,
    };
    let mut lengths = list.args.iter().filter_map(length);
    let length = lengths.find(|length| *length > LENGTH_MAX)?;
    Some(format!(
        "`{name}` requests a value of {length} characters or items, the maximum is {LENGTH_MAX}"
    ))
}

/// The enclosing queries, innermost last.
struct Count {
    open: Vec<Level>,
}

#[derive(Default)]
struct Level {
    /// The tables read so far.
    tables: u64,
    /// The number of tables that each visible common table expression reads.
    known: HashMap<String, u64>,
    /// The common table expressions of this query not yet visited, the next one last.
    to_come: Vec<(*const Query, String)>,
}

impl Visitor for Count {
    type Break = String;

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<String> {
        let known = self.open.last().expect("the statement").known.clone();
        let tables = query.with.iter().flat_map(|with| &with.cte_tables).rev();
        let to_come = tables.map(|cte| {
            let name = cte.alias.name.value.to_lowercase();
            (std::ptr::from_ref(&*cte.query), name)
        });
        self.open.push(Level {
            tables: 0,
            known,
            to_come: to_come.collect(),
        });
        ControlFlow::Continue(())
    }

    fn post_visit_query(&mut self, query: &Query) -> ControlFlow<String> {
        let done = self.open.pop().expect("it was opened");
        let around = self.open.last_mut().expect("the statement");
        if around
            .to_come
            .last()
            .is_some_and(|(next, _)| *next == std::ptr::from_ref(query))
            && let Some((_, name)) = around.to_come.pop()
        {
            around.known.insert(name, done.tables.max(1));
        } else {
            around.tables = around.tables.saturating_add(done.tables);
        }
        ControlFlow::Continue(())
    }

    fn pre_visit_expr(&mut self, expression: &Expr) -> ControlFlow<String> {
        match expression {
            Expr::Function(function) => {
                too_long(function).map_or(ControlFlow::Continue(()), ControlFlow::Break)
            }
            _ => ControlFlow::Continue(()),
        }
    }

    fn pre_visit_relation(&mut self, name: &ObjectName) -> ControlFlow<String> {
        let level = self.open.last_mut().expect("the statement");
        let known = level.known.get(&name.to_string().to_lowercase());
        level.tables = level.tables.saturating_add(known.copied().unwrap_or(1));
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    use datafusion::prelude::SessionContext;

    use super::*;

    fn is_refused(sql: &str) -> bool {
        let state = SessionContext::new().state();
        let statement = state.sql_to_statement(sql, &datafusion::config::Dialect::Generic);
        refuse_large(&statement.unwrap()).is_err()
    }

    #[test]
    fn what_doubles_is_counted_as_it_is_written_out() {
        let doubling = |levels: usize| {
            let ctes: Vec<String> = (1..=levels)
                .map(|n| {
                    format!(
                        "t{n} as (select * from t{0} union all select * from t{0})",
                        n - 1
                    )
                })
                .collect();
            format!("with {} select count(*) from t{levels}", ctes.join(", "))
        };
        assert!(!is_refused(&doubling(10)));
        assert!(is_refused(&doubling(11)));
        assert!(is_refused(&doubling(70)), "without overflow");
        assert!(is_refused(&format!("explain {}", doubling(25))));
        assert!(is_refused(&format!("select * from ({})", doubling(25))));
        let once = "with a as (select 1), b as (select * from a) select * from a, b";
        assert!(!is_refused(once));
        assert!(is_refused("select length(repeat('x', 2000000000))"));
        assert!(is_refused(
            "select cardinality(generate_series(1, 2000000000))"
        ));
        assert!(!is_refused(
            "select lpad('x', 20, '0'), repeat('2000000000', 2)"
        ));
        let recursive = "with recursive n as (select 1 as a union all select a + 1 from n where a < 9) select * from n";
        assert!(!is_refused(recursive));
    }
}
