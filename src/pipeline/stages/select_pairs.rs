//! The `select_pairs` stage: preference pairs by one of several strategies.

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

/// Pairs the answers to each prompt by reward, with a named strategy. Ties go to the lowest
/// candidate number; a prompt without a valid pair goes to `rejects` with the reason.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SelectPairs {
    /// The table of rewards.
    pub rewards: TableName,
    /// The table of candidates that were scored. Default: found through `rewards`.
    #[serde(default)]
    pub candidates: Option<TableName>,
    /// The table of prompts of the candidates. Default: found through `rewards`.
    #[serde(default)]
    pub prompts: Option<TableName>,
    /// The strategy that chooses which answers are paired.
    #[serde(default)]
    pub strategy: Strategy,
    /// The minimum margin between the chosen and the rejected answer, in reward after
    /// `length_penalty`. Pairs with a smaller margin are dropped; 0 keeps all.
    #[serde(default = "zero")]
    pub margin_min: NonNegative,
    /// The maximum number of pairs per prompt; those with the largest margins are kept. Default:
    /// all. Applies to the strategy `all_pairs` only.
    #[serde(default)]
    pub pairs_max: Option<NonZeroU32>,
    /// The amount subtracted from an answer's reward for each of its tokens; 0 turns it off.
    #[serde(default = "zero")]
    pub length_penalty: NonNegative,
    /// The maximum ratio of the longer answer's length to the shorter one's, in tokens. Pairs with
    /// a larger ratio are dropped. Default: no limit.
    #[serde(default)]
    pub length_ratio_max: Option<AtLeastOne>,
    /// The treatment of answers that differ only in case, whitespace and punctuation.
    #[serde(default)]
    pub near_equal: NearEqual,
    /// The treatment of answers that were cut off at `max_new_tokens`.
    #[serde(default)]
    pub truncated: Truncated,
}

/// The strategy that chooses which answers to a prompt are paired.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// The best and the worst answer: the largest margin.
    #[default]
    BestWorst,
    /// The best and the second best answer: the hardest to tell apart.
    BestSecond,
    /// The best and a randomly drawn other answer: rejects what the model typically generates.
    BestRandom,
    /// Every answer with every worse one.
    AllPairs,
}

/// The treatment of nearly identical answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NearEqual {
    /// They count as different answers.
    #[default]
    Keep,
    /// Only the best of them is kept.
    Drop,
}

/// A finite number that is at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct AtLeastOne(f64);

impl TryFrom<f64> for AtLeastOne {
    type Error = String;

    fn try_from(value: f64) -> Result<Self, String> {
        if value >= 1.0 && value.is_finite() {
            return Ok(Self(value));
        }
        Err(format!("{value} is less than 1"))
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
            let message =
                "`pairs_max` has no effect: this strategy makes at most one pair per prompt";
            let help = "remove it, or use the strategy `all_pairs`";
            return Err(StageError::at("pairs_max", message, help));
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::test_pipeline::{TestPipeline, candidate, prompt, reward, stage};
    use super::*;

    /// Selects among three answers to prompt `a`, whose rewards are 1.0, 0.5 and 0.0, and returns
    /// the pairs' texts.
    fn selected(settings: serde_json::Value) -> (Vec<[String; 2]>, Vec<(String, String)>) {
        let mut pipeline = TestPipeline::new();
        pipeline.table("prompts", &[prompt("a", "Why?")]);
        let texts = ["Good", "fair answer", "bad"];
        let candidates = (0..).zip(texts);
        let candidates: Vec<_> = candidates
            .map(|(number, text)| candidate("a", number, text))
            .collect();
        pipeline.table("candidates", &candidates);
        let rewards = (0..).zip([1.0, 0.5, 0.0]);
        let rewards: Vec<_> = rewards
            .map(|(number, worth)| reward("a", number, worth))
            .collect();
        pipeline.table("rewards", &rewards);
        let mut all =
            json!({"rewards": "rewards", "candidates": "candidates", "prompts": "prompts"});
        let given = settings.as_object().unwrap().clone();
        all.as_object_mut().unwrap().extend(given);
        let (pairs, rejects) = pipeline.map::<Pair>(&stage::<SelectPairs>(all)).unwrap();
        let texts = pairs.into_iter().map(|pair| [pair.chosen, pair.rejected]);
        (texts.collect(), rejects)
    }

    #[test]
    fn a_strategy_chooses_the_pairs() {
        for (settings, expected) in [
            (json!({}), vec![["Good", "bad"]]),
            (
                json!({"strategy": "best_second"}),
                vec![["Good", "fair answer"]],
            ),
            (
                json!({"strategy": "all_pairs"}),
                vec![
                    ["Good", "fair answer"],
                    ["Good", "bad"],
                    ["fair answer", "bad"],
                ],
            ),
            (
                json!({"strategy": "all_pairs", "pairs_max": 1}),
                vec![["Good", "bad"]],
            ),
            // The penalty of 0.25 a token leaves 0 for "Good", -2.25 and -0.75 for the others.
            (
                json!({"length_penalty": 0.25}),
                vec![["Good", "fair answer"]],
            ),
        ] {
            let (mut pairs, rejects) = selected(settings.clone());
            pairs.sort();
            let mut expected = expected;
            expected.sort_unstable();
            assert_eq!(pairs, expected, "{settings}");
            assert_eq!(rejects, []);
        }
        let (drawn, _) = selected(json!({"strategy": "best_random"}));
        assert_eq!(drawn[0][0], "Good");
        assert_eq!(selected(json!({"strategy": "best_random"})).0, drawn);
    }

    #[test]
    fn a_prompt_without_a_pair_is_rejected_and_a_setting_without_effect_is_refused() {
        let (pairs, rejects) = selected(json!({"margin_min": 2}));
        assert_eq!(pairs, Vec::<[String; 2]>::new());
        assert_eq!(rejects.len(), 1);
        assert!(rejects[0].1.contains("margin_min"), "{rejects:?}");
        let useless: SelectPairs = stage(json!({"rewards": "rewards", "pairs_max": 2}));
        assert_eq!(useless.output(&[]).unwrap_err().field, Some("pairs_max"));
        let ratio = serde_json::from_value::<AtLeastOne>(json!(0.5)).unwrap_err();
        assert_eq!(ratio.to_string(), "0.5 is less than 1");
    }
}
