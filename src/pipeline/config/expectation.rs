//! What a pipeline expects of its tables.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::diagnostic::{At, Diagnostic};
use super::source::KeyPath;
use crate::stages::TableName;

/// What must be true of a table as soon as it is there: a query that finds no rows, or a number that
/// keeps within bounds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Expectation {
    /// The table. The query and the value may also read the others that are there by then, each as it
    /// is in the round.
    pub table: TableName,
    /// A query that must find no rows; those that it finds are shown.
    #[serde(default)]
    pub query: Option<String>,
    /// An expression over all rows of the table that gives one number, such as `avg(reward)`, for the two
    /// bounds. No number (null, or no row) is not as expected.
    #[serde(default)]
    pub value: Option<String>,
    /// The least that the value may be.
    #[serde(default)]
    pub at_least: Option<f64>,
    /// The most that the value may be.
    #[serde(default)]
    pub at_most: Option<f64>,
    /// What happens when it is not so.
    #[serde(default)]
    pub otherwise: Otherwise,
}

/// What happens when something is not as expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Otherwise {
    /// The run stops; what is made stays.
    #[default]
    Stop,
    /// The run says so and goes on.
    Warn,
}

impl Expectation {
    /// The query that answers it: the rows that should not be there, or the value.
    pub fn sql(&self) -> String {
        match (&self.query, &self.value) {
            (Some(query), _) => query.clone(),
            (None, value) => format!(
                // A comment may end it.
                "select cast({}\n as double) as value from {}",
                value.as_deref().unwrap_or("null"),
                self.table
            ),
        }
    }

    /// The query of the value as what it is, a number or not.
    pub fn sql_as_it_is(&self) -> String {
        let value = self.value.as_deref().unwrap_or("null");
        format!("select {value}\n as value from {}", self.table)
    }

    /// The setting that holds the SQL.
    pub fn field(&self) -> &'static str {
        if self.query.is_some() {
            "query"
        } else {
            "value"
        }
    }

    /// What is wrong with a value, in words.
    pub fn judge(&self, value: Option<f64>) -> Option<String> {
        let Some(value) = value else {
            return Some("it gave no value (no rows, or null)".to_owned());
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

    /// What its settings say against each other.
    pub fn check(&self, path: &KeyPath) -> Option<Diagnostic> {
        let complain = |at: At, message: &str, help: &str| {
            Some(Diagnostic::new("config::expectation", at, message.to_owned()).help(help))
        };
        let mut bounds = [("at_least", self.at_least), ("at_most", self.at_most)].into_iter();
        let is_endless = |bound: Option<f64>| bound.is_some_and(|bound| !bound.is_finite());
        if let Some((name, _)) = bounds.find(|(_, bound)| is_endless(*bound)) {
            return complain(
                At::value(path.key(name)),
                "the bound is not a finite number",
                "write a number, or leave the bound out",
            );
        }
        let has_bound = self.at_least.is_some() || self.at_most.is_some();
        match (&self.query, &self.value) {
            (Some(_), Some(_)) => complain(
                At::key(path.key("value")),
                "both `query` and `value` are given",
                "make two expectations of them",
            ),
            (None, None) => complain(
                At::key(path.clone()),
                "neither `query` nor `value` is given",
                "write a `query` that must find no rows, or a `value` with `at_least` or `at_most`",
            ),
            (Some(_), None) if has_bound => complain(
                At::key(path.clone()),
                "a `query` has no bounds: it must find no rows",
                "give a `value` in its place, such as `avg(reward)`",
            ),
            (None, Some(_)) if !has_bound => complain(
                At::key(path.key("value")),
                "the value may be anything",
                "say `at_least` or `at_most`",
            ),
            (None, Some(_))
                if let (Some(least), Some(most)) = (self.at_least, self.at_most)
                    && least > most =>
            {
                complain(
                    At::value(path.key("at_least")),
                    &format!("no value is at least {least} and at most {most}"),
                    "swap the bounds, or leave one of them out",
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
        assert_eq!(words(None), "it gave no value (no rows, or null)");
    }
}
