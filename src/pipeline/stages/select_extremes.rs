//! `select_extremes`: the best and the worst answer to each prompt become a pair.

use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::selection::{Pairs, Selection, inputs};
use super::{Input, NonNegative, Stage, StageError, StageKind, TableName};
use ovchat_data::store::digest;
use ovchat_data::tables::{Pair, Row};
use ovchat_query::Param;

/// The ranking; `{rewards}` and `{candidates}` stand for the tables.
const SQL: &str = include_str!("select_extremes.sql");

/// Pairs the answer with the highest reward (chosen) with the one with the lowest (rejected). Ties
/// go to the lowest number; a prompt whose best and worst score or read the same is dropped.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SelectExtremes {
    /// The table of rewards.
    pub rewards: TableName,
    /// The table of candidates that were scored; found through `rewards` if left out.
    #[serde(default)]
    pub candidates: Option<TableName>,
    /// The table of prompts that were answered; found through `rewards` if left out.
    #[serde(default)]
    pub prompts: Option<TableName>,
    /// Drops prompts whose best and worst reward are less than this apart; 0 keeps all.
    #[serde(default = "SelectExtremes::margin_min")]
    pub margin_min: NonNegative,
    /// Whether answers that were cut off at `max_new_tokens` take part.
    #[serde(default)]
    pub truncated: Truncated,
}

/// What becomes of answers that were cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Truncated {
    /// They take part like all others.
    #[default]
    Keep,
    /// They are left out.
    Drop,
}

impl Truncated {
    /// What the queries call it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Drop => "drop",
        }
    }
}

impl SelectExtremes {
    fn margin_min() -> NonNegative {
        0.0.try_into().expect("0 is not negative")
    }
}

impl Stage for SelectExtremes {
    fn inputs(&self) -> Vec<Input<'_>> {
        let (candidates, prompts) = (self.candidates.as_ref(), self.prompts.as_ref());
        inputs(&self.rewards, candidates, prompts)
    }

    fn find(&mut self, field: &str, table: TableName) {
        match field {
            "candidates" => self.candidates = Some(table),
            "prompts" => self.prompts = Some(table),
            _ => {}
        }
    }

    fn kind(&self) -> Option<&'static str> {
        Some(Pair::KIND)
    }

    fn output(&self, _: &[(TableName, SchemaRef)]) -> Result<SchemaRef, StageError> {
        Ok(Pair::schema())
    }

    fn version(&self) -> String {
        digest(SQL.as_bytes())
    }

    fn rows_at_most(&self, rows: &dyn Fn(&TableName) -> Option<u64>) -> Option<u64> {
        rows(self.prompts.as_ref()?)
    }

    fn work(&self) -> StageKind<'_> {
        StageKind::Rows(Box::new(Selection::new(self)))
    }
}

impl Pairs for SelectExtremes {
    fn rewards(&self) -> &TableName {
        &self.rewards
    }

    fn candidates(&self) -> &TableName {
        self.candidates
            .as_ref()
            .expect("the plan found the candidates")
    }

    fn prompts(&self) -> &TableName {
        self.prompts.as_ref().expect("the plan found the prompts")
    }

    fn sql(&self) -> String {
        SQL.to_owned()
    }

    fn params(&self, _: u64) -> Vec<(&'static str, Param)> {
        vec![
            ("margin_min", Param::Float(self.margin_min.get())),
            ("truncated", Param::Text(self.truncated.word().to_owned())),
        ]
    }
}
