//! The `select_extremes` stage: the best and the worst answer to each prompt as a pair.

use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::selection::{Pairs, Selection, inputs};
use super::{Input, NonNegative, Stage, StageError, StageKind, TableName};
use ovchat_data::store::digest;
use ovchat_data::tables::{Pair, Row};
use ovchat_query::Param;

/// The ranking query; `{rewards}` and `{candidates}` are replaced with the table names. The digest
/// of this file, comments included, is the stage's version: any change to it rebuilds existing
/// tables.
const SQL: &str = include_str!("select_extremes.sql");

/// Pairs the answer with the highest reward (chosen) with the answer with the lowest (rejected).
/// Ties go to the lowest candidate number. A prompt is dropped if its best and worst answers have
/// the same reward or the same text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SelectExtremes {
    /// The table of rewards.
    pub rewards: TableName,
    /// The table of candidates that were scored. Default: found through `rewards`.
    #[serde(default)]
    pub candidates: Option<TableName>,
    /// The table of prompts of the candidates. Default: found through `rewards`.
    #[serde(default)]
    pub prompts: Option<TableName>,
    /// The minimum margin between the best and the worst reward. Prompts with a smaller margin are
    /// dropped; 0 keeps all.
    #[serde(default = "SelectExtremes::margin_min")]
    pub margin_min: NonNegative,
    /// The treatment of answers that were cut off at `max_new_tokens`.
    #[serde(default)]
    pub truncated: Truncated,
}

/// The treatment of truncated answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Truncated {
    /// They are ranked like all others.
    #[default]
    Keep,
    /// They are excluded.
    Drop,
}

impl Truncated {
    /// Returns the value of the query parameter `$truncated`.
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
