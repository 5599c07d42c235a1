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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::test_pipeline::{TestPipeline, candidate, prompt, reward, stage};
    use super::*;
    use ovchat_data::tables::{Candidate, Finish};

    /// Selects among three answers to prompt `a` with the given rewards.
    fn selected(
        settings: serde_json::Value,
        rewards: [f32; 3],
        texts: [&str; 3],
    ) -> (Vec<Pair>, Vec<(String, String)>) {
        let mut pipeline = TestPipeline::new();
        pipeline.table("prompts", &[prompt("a", "Why?")]);
        let mut candidates: Vec<Candidate> = (0..)
            .zip(texts)
            .map(|(number, text)| candidate("a", number, text))
            .collect();
        candidates[2].finish = Finish::Length;
        pipeline.table("candidates", &candidates);
        let rewards = (0..).zip(rewards);
        let rewards: Vec<_> = rewards
            .map(|(number, worth)| reward("a", number, worth))
            .collect();
        pipeline.table("rewards", &rewards);
        let mut all =
            json!({"rewards": "rewards", "candidates": "candidates", "prompts": "prompts"});
        let given = settings.as_object().unwrap().clone();
        all.as_object_mut().unwrap().extend(given);
        pipeline.map(&stage::<SelectExtremes>(all)).unwrap()
    }

    const TEXTS: [&str; 3] = ["good", "so so", "bad"];

    #[test]
    fn the_best_and_the_worst_answer_become_a_pair() {
        let (pairs, rejects) = selected(json!({}), [0.5, 0.25, -1.0], TEXTS);
        assert_eq!(rejects, []);
        let [pair] = &pairs[..] else {
            panic!("{pairs:?}")
        };
        assert_eq!((&*pair.chosen, &*pair.rejected), ("good", "bad"));
        assert_eq!(pair.margin, Some(1.5));
        assert_eq!(pair.chosen_logp, Some(-4.0));
        // Ties go to the lowest candidate number, and truncated answers may be excluded.
        let (pairs, _) = selected(json!({}), [0.5, 0.5, 0.0], TEXTS);
        assert_eq!((&*pairs[0].chosen, &*pairs[0].rejected), ("good", "bad"));
        let (pairs, _) = selected(json!({"truncated": "drop"}), [0.5, 0.25, -1.0], TEXTS);
        assert_eq!((&*pairs[0].chosen, &*pairs[0].rejected), ("good", "so so"));
    }

    #[test]
    fn a_prompt_without_a_usable_pair_is_rejected_with_the_reason() {
        for (settings, rewards, texts, expected) in [
            (
                json!({}),
                [0.5, f32::NAN, 0.0],
                TEXTS,
                "a reward is not a finite number",
            ),
            (
                json!({}),
                [0.5; 3],
                TEXTS,
                "the best and the worst answer score the same",
            ),
            (
                json!({}),
                [0.5, 0.25, 0.0],
                ["same"; 3],
                "the best and the worst answer have the same text",
            ),
            (
                json!({"margin_min": 1}),
                [0.5, 0.25, 0.0],
                TEXTS,
                "the rewards are closer than margin_min",
            ),
        ] {
            let (pairs, rejects) = selected(settings, rewards, texts);
            assert_eq!(pairs, []);
            assert_eq!(rejects, [("a".to_owned(), expected.to_owned())]);
        }
    }
}
