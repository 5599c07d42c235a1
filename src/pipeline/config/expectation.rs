//! The expectations of a pipeline on its tables.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::diagnostic::{At, Diagnostic};
use super::source::KeyPath;
use crate::stages::TableName;

/// A condition that a table must meet as soon as it is built: a query that returns no rows, or a
/// value within bounds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Expectation {
    /// The table. The query and the value may also read other tables that are built by then, each
    /// as of the same round.
    pub table: TableName,
    /// A query that must return no rows; rows that it returns are shown as failures.
    #[serde(default)]
    pub query: Option<String>,
    /// An aggregate expression over the rows of the table that returns one number, such as
    /// `avg(reward)`, to compare with the bounds. Null or no row fails the expectation.
    #[serde(default)]
    pub value: Option<String>,
    /// The minimum of the value.
    #[serde(default)]
    pub at_least: Option<f64>,
    /// The maximum of the value.
    #[serde(default)]
    pub at_most: Option<f64>,
    /// The action if the expectation fails.
    #[serde(default)]
    pub otherwise: Otherwise,
}

/// The action if an expectation fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Otherwise {
    /// The run stops; the tables that are already built are kept.
    #[default]
    Stop,
    /// The run prints a warning and continues.
    Warn,
}

impl Expectation {
    /// Returns the query to run: it returns the rows that should not exist, or the value.
    pub fn sql(&self) -> String {
        match (&self.query, &self.value) {
            (Some(query), _) => query.clone(),
            (None, value) => format!(
                // The newline ends a trailing comment.
                "select cast({}\n as double) as value from {}",
                value.as_deref().unwrap_or("null"),
                self.table
            ),
        }
    }

    /// Returns the query of the value without the cast to a number.
    pub fn sql_as_it_is(&self) -> String {
        let value = self.value.as_deref().unwrap_or("null");
        format!("select {value}\n as value from {}", self.table)
    }

    /// The name of the setting that contains the SQL.
    pub fn field(&self) -> &'static str {
        if self.query.is_some() {
            "query"
        } else {
            "value"
        }
    }

    /// Returns the reason why a value fails the expectation, or `None` if it passes.
    pub fn judge(&self, value: Option<f64>) -> Option<String> {
        let Some(value) = value else {
            return Some("the value is null, or there are no rows".to_owned());
        };
        if let Some(least) = self
            .at_least
            .filter(|&least| value.is_nan() || value < least)
        {
            return Some(format!("{value} is below {least}"));
        }
        let most = self
            .at_most
            .filter(|&most| value.is_nan() || value > most)?;
        Some(format!("{value} is above {most}"))
    }

    /// Reports settings that contradict each other.
    pub fn check(&self, path: &KeyPath) -> Option<Diagnostic> {
        let complain = |at: At, message: &str, help: &str| {
            Some(Diagnostic::new("config::expectation", at, message.to_owned()).help(help))
        };
        let mut bounds = [("at_least", self.at_least), ("at_most", self.at_most)].into_iter();
        let is_endless = |bound: Option<f64>| bound.is_some_and(|bound| !bound.is_finite());
        if let Some((name, _)) = bounds.find(|(_, bound)| is_endless(*bound)) {
            return complain(
                At::value(path.key(name)),
                "the bound must be a finite number",
                "write a finite number, or remove the bound",
            );
        }
        let has_bound = self.at_least.is_some() || self.at_most.is_some();
        match (&self.query, &self.value) {
            (Some(_), Some(_)) => complain(
                At::key(path.key("value")),
                "`value` cannot be used together with `query`",
                "split them into two expectations",
            ),
            (None, None) => complain(
                At::key(path.clone()),
                "missing `query` or `value`",
                "add a `query` that must return no rows, or a `value` with `at_least` or `at_most`",
            ),
            (Some(_), None) if has_bound => complain(
                At::key(path.clone()),
                "`at_least` and `at_most` cannot be used together with `query`",
                "replace `query` by a `value`, such as `avg(reward)`, or remove the bounds",
            ),
            (None, Some(_)) if !has_bound => complain(
                At::key(path.key("value")),
                "`value` has no bounds",
                "add `at_least` or `at_most`",
            ),
            (None, Some(_))
                if let (Some(least), Some(most)) = (self.at_least, self.at_most)
                    && least > most =>
            {
                complain(
                    At::value(path.key("at_least")),
                    &format!("`at_least` ({least}) is greater than `at_most` ({most})"),
                    "swap the bounds, or remove one of them",
                )
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_keeps_within_its_bounds_and_is_a_number() {
        let expectation = Expectation {
            table: "rewards".to_owned().try_into().unwrap(),
            query: None,
            value: Some("avg(reward)".to_owned()),
            at_least: Some(0.5),
            at_most: Some(2.0),
            otherwise: Otherwise::Stop,
        };
        assert_eq!(
            expectation.sql(),
            "select cast(avg(reward)\n as double) as value from rewards"
        );
        let words = |value| expectation.judge(value).unwrap_or_default();
        assert_eq!(words(Some(0.5)), "");
        assert_eq!(words(Some(2.0)), "");
        assert_eq!(words(Some(0.25)), "0.25 is below 0.5");
        assert_eq!(words(Some(2.5)), "2.5 is above 2");
        assert_eq!(words(Some(f64::NAN)), "NaN is below 0.5");
        assert_eq!(words(None), "the value is null, or there are no rows");
    }
}
