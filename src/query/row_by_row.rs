//! Detection of expressions whose value depends on which other rows are in the same part.

use std::ops::ControlFlow;

use datafusion::prelude::SessionContext;
use datafusion::sql::parser::Statement;
use datafusion::sql::sqlparser::ast::{Expr, Function, Ident, Visit as _, Visitor, WindowType};

use super::apart::apart;

/// Returns the problem with a query that is computed part by part, each part with complete groups
/// of one `group` column. `None` if each row's value depends only on its group, or if the query
/// cannot be parsed.
pub fn reach_beyond(sql: &str, group: &str) -> Option<String> {
    let search = async || {
        let state = SessionContext::new_with_config(super::config()).state();
        let Statement::Statement(statement) = super::parse(&state, sql)? else {
            return Ok(None);
        };
        Ok(match statement.visit(&mut Search { group }) {
            ControlFlow::Break(problem) => Some(problem),
            ControlFlow::Continue(()) => None,
        })
    };
    apart(search).ok().flatten()
}

struct Search<'g> {
    group: &'g str,
}

impl Search<'_> {
    fn of_function(&self, function: &Function) -> Option<String> {
        let name = function.name.to_string().to_lowercase();
        if name == "unnest" {
            return Some("`unnest` turns one row into several".to_owned());
        }
        let is_group = |expression: &Expr| {
            let is_named = |name: &Ident| name.value.eq_ignore_ascii_case(self.group);
            match expression {
                Expr::Identifier(name) => is_named(name),
                Expr::CompoundIdentifier(names) => names.last().is_some_and(is_named),
                _ => false,
            }
        };
        match &function.over {
            Some(WindowType::WindowSpec(window)) if window.partition_by.iter().any(is_group) => {
                None
            }
            Some(_) => Some(format!(
                "`{name}(…) over` only sees the rows of a part: use `over (partition by {} …)`",
                self.group
            )),
            None => None,
        }
    }
}

impl Visitor for Search<'_> {
    type Break = String;

    fn pre_visit_expr(&mut self, expression: &Expr) -> ControlFlow<String> {
        let found = match expression {
            Expr::Function(function) => self.of_function(function),
            Expr::Subquery(_) | Expr::Exists { .. } | Expr::InSubquery { .. } => {
                Some("a subquery only sees the rows of a part".to_owned())
            }
            _ => None,
        };
        found.map_or(ControlFlow::Continue(()), ControlFlow::Break)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_that_see_other_groups_are_found() {
        let found =
            |expression: &str| reach_beyond(&format!("select ({expression}) from t"), "prompt_id");
        for (expression, words) in [
            ("count(*) over ()", "partition by prompt_id"),
            (
                "rank() over (order by length(text))",
                "partition by prompt_id",
            ),
            ("(select count(*) from t)", "a subquery"),
            (
                "case when text in (select text from t) then 1 else 0 end",
                "a subquery",
            ),
            ("unnest([0, 1])", "into several"),
        ] {
            let problem = found(expression);
            assert!(
                problem
                    .as_ref()
                    .is_some_and(|problem| problem.contains(words)),
                "{expression}: {problem:?}"
            );
        }
        for expression in [
            "length(text) - avg(length(text)) over (partition by prompt_id)",
            "rank() over (partition by answers.prompt_id order by candidate)",
            "case when text = answer then 1 else 0 end",
        ] {
            assert_eq!(found(expression), None, "{expression}");
        }
    }
}
