//! `select_extremes`: the best and the worst answer to each prompt become a pair.

use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Input, NonNegative, Query, Stage, StageError, TableName, Work};
use crate::query::Param;
use crate::store::digest;
use crate::tables::{Candidate, Pair, Prompt, Reward, Row};

/// The ranking; `{rewards}`, `{candidates}` and `{prompts}` stand for the tables.
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

impl SelectExtremes {
    fn margin_min() -> NonNegative {
        0.0.try_into().expect("0 is not negative")
    }
}

impl Stage for SelectExtremes {
    fn inputs(&self) -> Vec<Input<'_>> {
        vec![
            Input {
                field: "rewards",
                table: Some(&self.rewards),
                needs: Reward::schema(),
                kind: Reward::KIND,
            },
            Input {
                field: "candidates",
                table: self.candidates.as_ref(),
                needs: Candidate::schema(),
                kind: Candidate::KIND,
            },
            Input {
                field: "prompts",
                table: self.prompts.as_ref(),
                needs: Prompt::schema(),
                kind: Prompt::KIND,
            },
        ]
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

    fn work(&self) -> Work<'_> {
        let name =
            |table: &Option<TableName>| table.as_ref().expect("the plan found it").to_string();
        let sql = SQL
            .replace("{rewards}", self.rewards.as_str())
            .replace("{candidates}", &name(&self.candidates))
            .replace("{prompts}", &name(&self.prompts));
        let truncated = match self.truncated {
            Truncated::Keep => "keep",
            Truncated::Drop => "drop",
        };
        let params = vec![
            ("margin_min", Param::Float(self.margin_min.get())),
            ("truncated", Param::Text(truncated.to_owned())),
        ];
        Work::Query(Query {
            sql,
            params,
            sets_aside: true,
        })
    }
}
