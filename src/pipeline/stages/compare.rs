//! The `compare` stage: a judge's rewards for both answers of each pair.

use std::num::NonZeroU32;

use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::model_calls::scored;
use super::shown::Shown;
use super::training::prompts;
use super::{
    Failure, Input, ModelName, ModelRole, ModelState, Outcome, RowStage, Stage, StageContext,
    StageError, StageKind, TableName, Task, Use,
};
use ovchat_data::store::Key;
use ovchat_data::tables::{Comparison, Pair, Row};
use ovchat_models::{AnswerGroup, JudgeScore, RowContext, RowFault};

/// Scores both answers of each pair with a judge. The share of pairs on which it agrees with the
/// label is `select avg(cast(agrees as int)) from <table>`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Compare {
    /// The table of pairs.
    pub pairs: TableName,
    /// The model that scores.
    pub judge: ModelName,
    /// Prompts per part. A part's pairs are scored, committed and resumed as a unit; its size does
    /// not change the rewards.
    #[serde(default = "Compare::part")]
    pub part: NonZeroU32,
}

impl Compare {
    fn part() -> NonZeroU32 {
        const { NonZeroU32::new(64).unwrap() }
    }
}

impl Stage for Compare {
    fn inputs(&self) -> Vec<Input<'_>> {
        vec![Input {
            field: "pairs",
            table: Some(&self.pairs),
            needs: Pair::schema(),
            kind: Pair::KIND,
        }]
    }

    fn uses(&self) -> Vec<Use<'_>> {
        vec![Use {
            field: "judge",
            model: &self.judge,
            role: ModelRole::Scores,
            state: ModelState::Now,
        }]
    }

    fn kind(&self) -> Option<&'static str> {
        Some(Comparison::KIND)
    }

    fn output(&self, _: &[(TableName, SchemaRef)]) -> Result<SchemaRef, StageError> {
        Ok(Comparison::schema())
    }

    fn unkeyed(&self) -> &'static [&'static str] {
        &["part"]
    }

    fn expected_rows(&self, input: u64) -> Option<u64> {
        Some(input)
    }

    fn work(&self) -> StageKind<'_> {
        StageKind::Rows(Box::new(self))
    }
}

impl RowStage for &Compare {
    type In = Pair;
    type Out = Comparison;

    fn input(&self) -> &TableName {
        &self.pairs
    }

    fn part_groups(&self) -> u32 {
        self.part.get()
    }

    fn key(&self, _: &mut StageContext<'_>, group: &[Pair], mut key: Key) -> Result<Key, Failure> {
        for pair in group {
            key = Shown::from(pair).add_to(key);
            for caption in pair.captions.iter().flatten() {
                key = key.with("caption").with(caption);
            }
            for (name, value) in pair.kept.iter().flat_map(|kept| &kept.0) {
                key = key.with("kept").with(name).with(value);
            }
            key = key.with(&pair.row_key);
            key = key.with(&pair.chosen).with(&pair.rejected);
        }
        Ok(key)
    }

    fn map(
        &self,
        ctx: &mut StageContext<'_>,
        tasks: &[Task<Pair>],
    ) -> Result<Vec<Outcome<Vec<Comparison>>>, Failure> {
        // A judge takes one group of answers per pair, and a task may hold several pairs.
        let pairs: Vec<&Pair> = tasks.iter().flat_map(|task| &task.rows).collect();
        let mut shown = Vec::with_capacity(pairs.len());
        for task in tasks {
            shown.extend(prompts(ctx, &task.rows)?);
        }
        let groups: Vec<AnswerGroup<'_>> = pairs
            .iter()
            .zip(&shown)
            .map(|(pair, prompt)| AnswerGroup {
                context: RowContext {
                    id: pair.id.as_deref(),
                    kept: pair.kept.as_ref().map_or(&[], |kept| &kept.0),
                    other: None,
                },
                ..AnswerGroup::new(prompt, vec![&pair.chosen, &pair.rejected])
            })
            .collect();
        let mut scored = scored(ctx, &self.judge, &groups, |_| 1)?.into_iter();
        let mut outcomes = Vec::with_capacity(tasks.len());
        for task in tasks {
            let mut rows = Ok(Vec::with_capacity(task.rows.len()));
            for pair in &task.rows {
                let scores = scored.next().expect("one result per pair");
                rows = rows.and_then(|mut rows: Vec<Comparison>| {
                    rows.push(self.row(&task.key, pair, &scores?));
                    Ok(rows)
                });
            }
            outcomes.push(match rows {
                Ok(rows) => Outcome::Rows(rows),
                Err(RowFault(reason)) => Outcome::fault(&task.rows[0].prompt_id, reason),
            });
        }
        Ok(outcomes)
    }
}

impl Compare {
    fn row(&self, key: &str, pair: &Pair, scores: &[JudgeScore]) -> Comparison {
        let [chosen_reward, rejected_reward] = [scores[0].reward, scores[1].reward];
        Comparison {
            row_key: key.to_owned(),
            pair: pair.row_key.clone(),
            id: pair.id.clone(),
            prompt_id: pair.prompt_id.clone(),
            judge: self.judge.to_string(),
            chosen_reward,
            rejected_reward,
            margin: chosen_reward - rejected_reward,
            agrees: chosen_reward > rejected_reward,
            flips: scores[0].flips.map(|share| share > 0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::test_pipeline::{TestPipeline, pair, stage};
    use super::*;

    fn compare() -> Compare {
        stage(json!({"pairs": "pairs", "judge": "judge"}))
    }

    fn pipeline() -> TestPipeline {
        let mut pipeline = TestPipeline::new();
        let pairs = [pair("a", "So.", "No."), pair("b", "No.", "So.")];
        pipeline.table("pairs", &pairs);
        pipeline
    }

    #[test]
    fn both_answers_of_a_pair_are_scored() {
        let (rows, rejects) = pipeline().map::<Comparison>(&compare()).unwrap();
        assert_eq!(rejects, []);
        assert_eq!(rows.len(), 2);
        for row in rows {
            assert_eq!(row.margin, row.chosen_reward - row.rejected_reward);
            assert_eq!(row.agrees, row.chosen_reward > row.rejected_reward);
            assert_eq!(row.judge, "judge");
        }
    }

    #[test]
    fn a_pair_that_cannot_be_scored_is_rejected() {
        let mut pipeline = pipeline();
        pipeline.models.unscored = Some("b");
        let (rows, rejects) = pipeline.map::<Comparison>(&compare()).unwrap();
        let reason = "no verdict in the reply".to_owned();
        assert_eq!(rejects, [("b".to_owned(), reason)]);
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0].pair, "a pair");
    }
}
