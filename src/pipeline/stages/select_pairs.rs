//! `select_pairs`: pairs of answers by one of several strategies.

use std::num::NonZeroU32;

use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::selection::{Pairs, Selection, inputs};
use super::{Input, NonNegative, Stage, StageError, StageKind, TableName, Truncated};
use ovchat_data::store::digest;
use ovchat_data::tables::{Pair, Row};
use ovchat_query::Param;

const SCORED: &str = include_str!("select_pairs/scored.sql");
const JUDGED: &str = include_str!("select_pairs/judged.sql");

/// Pairs answers to a prompt by their rewards, in a way that is named. Ties go to the lowest number; a
/// prompt that makes no pair is set aside with the reason.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SelectPairs {
    /// The table of rewards.
    pub rewards: TableName,
    /// The table of candidates that were scored; found through `rewards` if left out.
    #[serde(default)]
    pub candidates: Option<TableName>,
    /// The table of prompts that were answered; found through `rewards` if left out.
    #[serde(default)]
    pub prompts: Option<TableName>,
    /// Which answers meet.
    #[serde(default)]
    pub strategy: Strategy,
    /// Drops pairs whose answers are worth less than this apart; 0 keeps all.
    #[serde(default = "zero")]
    pub margin_min: NonNegative,
    /// Pairs that a prompt makes at most, those with the largest margins. Left out: all that the strategy
    /// finds.
    #[serde(default)]
    pub pairs_max: Option<NonZeroU32>,
    /// What an answer is worth less for each of its tokens.
    #[serde(default = "zero")]
    pub length_penalty: NonNegative,
    /// Drops pairs of which one answer has more than this many times the tokens of the other. Left out:
    /// any lengths.
    #[serde(default)]
    pub length_ratio_max: Option<AtLeastOne>,
    /// Whether answers that differ in case, spaces and punctuation only count as different.
    #[serde(default)]
    pub near_equal: NearEqual,
    /// Whether answers that were cut off at `max_new_tokens` take part.
    #[serde(default)]
    pub truncated: Truncated,
}

/// Which answers to a prompt meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// The best and the worst: the largest margin.
    #[default]
    BestWorst,
    /// The best and the next best: the hardest to tell apart.
    BestSecond,
    /// The best and another one, drawn at random: what the model usually says.
    BestRandom,
    /// Each with every worse one.
    AllPairs,
}

/// What becomes of answers that nearly read the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NearEqual {
    /// They are different answers.
    #[default]
    Keep,
    /// The best of them stands for all.
    Drop,
}

/// A number that is 1 or more.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct AtLeastOne(f64);

impl TryFrom<f64> for AtLeastOne {
    type Error = String;

    fn try_from(value: f64) -> Result<Self, String> {
        if value >= 1.0 && value.is_finite() {
            return Ok(Self(value));
        }
        Err(format!("{value} is not 1 or more"))
    }
}

impl From<AtLeastOne> for f64 {
    fn from(value: AtLeastOne) -> Self {
        value.0
    }
}

impl JsonSchema for AtLeastOne {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "AtLeastOne".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "number", "minimum": 1})
    }
}

fn zero() -> NonNegative {
    0.0.try_into().expect("0 is not negative")
}

impl Strategy {
    fn sql(self) -> &'static str {
        match self {
            Self::BestWorst => include_str!("select_pairs/best_worst.sql"),
            Self::BestSecond => include_str!("select_pairs/best_second.sql"),
            Self::BestRandom => include_str!("select_pairs/best_random.sql"),
            Self::AllPairs => include_str!("select_pairs/all_pairs.sql"),
        }
    }
}

impl Stage for SelectPairs {
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
        if self.pairs_max.is_some() && self.strategy != Strategy::AllPairs {
            return Err(StageError {
                field: Some("pairs_max"),
                message: "this strategy makes one pair a prompt in any case".to_owned(),
                help: Some("leave it out, or use the strategy `all_pairs`".to_owned()),
            });
        }
        Ok(Pair::schema())
    }

    fn draws(&self) -> bool {
        self.strategy == Strategy::BestRandom
    }

    fn version(&self) -> String {
        digest(self.sql().as_bytes())
    }

    fn rows_at_most(&self, rows: &dyn Fn(&TableName) -> Option<u64>) -> Option<u64> {
        let of_prompt = match (self.strategy, self.pairs_max) {
            (Strategy::AllPairs, most) => u64::from(most?.get()),
            _ => 1,
        };
        Some(rows(self.prompts.as_ref()?)? * of_prompt)
    }

    fn work(&self) -> StageKind<'_> {
        StageKind::Rows(Box::new(Selection::new(self)))
    }
}

impl Pairs for SelectPairs {
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
        [SCORED, self.strategy.sql(), JUDGED].concat()
    }

    fn params(&self, seed: u64) -> Vec<(&'static str, Param)> {
        let near_equal = match self.near_equal {
            NearEqual::Keep => "keep",
            NearEqual::Drop => "drop",
        };
        vec![
            ("margin_min", Param::Float(self.margin_min.get())),
            ("length_penalty", Param::Float(self.length_penalty.get())),
            (
                "length_ratio_max",
                Param::Float(self.length_ratio_max.map_or(0.0, f64::from)),
            ),
            (
                "pairs_max",
                Param::Float(self.pairs_max.map_or(0.0, |most| most.get().into())),
            ),
            ("near_equal", Param::Text(near_equal.to_owned())),
            ("truncated", Param::Text(self.truncated.word().to_owned())),
            ("seed", Param::Text(seed.to_string())),
        ]
    }
}
