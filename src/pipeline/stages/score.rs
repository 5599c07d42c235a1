//! The `score` stage: a judge's reward for each candidate.

use std::num::NonZeroU32;

use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::model_calls::{Scored, scored};
use super::shown::Shown;
use super::{
    Failure, Input, ModelName, ModelRole, ModelState, Outcome, RowStage, Stage, StageContext,
    StageError, StageKind, TableName, Task, Use,
};
use ovchat_data::store::Key;
use ovchat_data::tables::{Candidate, Prompt, Reward, Row, rows};
use ovchat_models::{AnswerGroup, JudgeScore, RowContext, RowFault};

/// Scores candidates with a judge; a higher reward is better.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Score {
    /// The table of candidates.
    pub candidates: TableName,
    /// The model that scores.
    pub judge: ModelName,
    /// A table of answers that those of `candidates` are compared with, by a judge with `mode:
    /// against`: the first answer to each prompt. Default: the answer that the judge's `other` names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub against: Option<TableName>,
    /// The table of prompts of the candidates. Default: found through `candidates`.
    #[serde(default)]
    pub prompts: Option<TableName>,
    /// Prompts per part. A part's candidates are scored, committed and resumed as a unit; its size
    /// does not change the rewards.
    #[serde(default = "Score::part")]
    pub part: NonZeroU32,
}

impl Score {
    fn part() -> NonZeroU32 {
        const { NonZeroU32::new(64).unwrap() }
    }
}

impl Stage for Score {
    fn inputs(&self) -> Vec<Input<'_>> {
        let answers = |field, table| Input {
            field,
            table: Some(table),
            needs: JudgedAnswer::schema(),
            kind: Candidate::KIND,
        };
        let mut inputs = vec![
            answers("candidates", &self.candidates),
            Input {
                field: "prompts",
                table: self.prompts.as_ref(),
                needs: Prompt::schema(),
                kind: Prompt::KIND,
            },
        ];
        inputs.extend(self.against.as_ref().map(|table| answers("against", table)));
        inputs
    }

    fn find(&mut self, field: &str, table: TableName) {
        if field == "prompts" {
            self.prompts = Some(table);
        }
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
        Some(Reward::KIND)
    }

    fn output(&self, _: &[(TableName, SchemaRef)]) -> Result<SchemaRef, StageError> {
        Ok(Reward::schema())
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

impl Score {
    fn prompts(&self) -> &TableName {
        self.prompts.as_ref().expect("the plan found the prompts")
    }
}

rows! {
    /// The columns of a candidate that a judge uses.
    pub struct JudgedAnswer: "answer" => {
        /// The prompt's id.
        pub prompt_id: String,
        /// The candidate's number within its prompt.
        pub candidate: i32,
        /// The answer's text.
        pub text: String,
    }
}

impl RowStage for &Score {
    type In = JudgedAnswer;
    type Out = Reward;

    fn input(&self) -> &TableName {
        &self.candidates
    }

    fn part_groups(&self) -> u32 {
        self.part.get()
    }

    fn key(
        &self,
        ctx: &mut StageContext<'_>,
        group: &[JudgedAnswer],
        key: Key,
    ) -> Result<Key, Failure> {
        let prompt = ctx
            .input_tables
            .prompt_row(self.prompts(), &group[0].prompt_id)?;
        let mut key = Shown::from(&*prompt).add_to(key);
        for caption in prompt.captions.iter().flatten() {
            key = key.with("caption").with(caption);
        }
        if let Some(answer) = &prompt.answer {
            key = key.with("answer").with(answer);
        }
        for (name, value) in prompt.kept.iter().flat_map(|kept| &kept.0) {
            key = key.with("kept").with(name).with(value);
        }
        if let Some(other) = self.other(ctx, &group[0].prompt_id)? {
            key = key.with("against").with(other);
        }
        let mut key = key.with(&group[0].prompt_id);
        if group.len() == 1 && ctx.models.compares(&self.judge) {
            // Earlier versions scored a single answer as 0; such rows must not be reused.
            key = key.with("alone");
        }
        Ok(group.iter().fold(key, |key, answer| {
            key.with(answer.candidate.to_le_bytes()).with(&answer.text)
        }))
    }

    fn map(
        &self,
        ctx: &mut StageContext<'_>,
        tasks: &[Task<JudgedAnswer>],
    ) -> Result<Vec<Outcome<Vec<Reward>>>, Failure> {
        let mut prompts = Vec::with_capacity(tasks.len());
        for task in tasks {
            let prompt_id = &task.rows[0].prompt_id;
            let row = ctx.input_tables.prompt_row(self.prompts(), prompt_id)?;
            let prompt = ctx.input_tables.prompt(&row, 0)?;
            prompts.push((row, prompt, self.other(ctx, prompt_id)?));
        }
        let groups: Vec<AnswerGroup<'_>> = tasks
            .iter()
            .zip(&prompts)
            .map(|(task, (row, prompt, other))| AnswerGroup {
                prompt,
                answers: task
                    .rows
                    .iter()
                    .map(|answer| answer.text.as_str())
                    .collect(),
                numbers: task.rows.iter().map(|answer| answer.candidate).collect(),
                context: RowContext {
                    id: row.id.as_deref(),
                    kept: row.kept.as_ref().map_or(&[], |kept| &kept.0),
                    other: other.as_deref(),
                },
            })
            .collect();
        let rows = |group: usize| tasks[group].rows.len() as u64;
        let scored = scored(ctx, &self.judge, &groups, rows)?;
        let outcome = |(task, result): (&Task<JudgedAnswer>, Scored)| match result {
            Ok(scores) => {
                let rows = task.rows.iter().zip(scores);
                Outcome::Rows(
                    rows.map(|(answer, score)| self.row(&task.key, answer, score))
                        .collect(),
                )
            }
            Err(RowFault(reason)) => Outcome::fault(&task.rows[0].prompt_id, reason),
        };
        Ok(tasks.iter().zip(scored).map(outcome).collect())
    }
}

impl Score {
    /// Returns the answer of the table `against` to a prompt, if that table is set and has one.
    fn other(
        &self,
        ctx: &mut StageContext<'_>,
        prompt_id: &str,
    ) -> Result<Option<String>, Failure> {
        let Some(table) = &self.against else {
            return Ok(None);
        };
        let ids = std::iter::once(prompt_id);
        let found = ctx
            .input_tables
            .rows_of(table, &JudgedAnswer::schema(), ids)?;
        let mut answers = Vec::new();
        for rows in &found {
            answers.extend(JudgedAnswer::from_batch(rows)?);
        }
        let first = answers.into_iter().min_by_key(|answer| answer.candidate);
        Ok(first.map(|answer| answer.text))
    }

    fn row(&self, key: &str, answer: &JudgedAnswer, score: JudgeScore) -> Reward {
        Reward {
            row_key: key.to_owned(),
            prompt_id: answer.prompt_id.clone(),
            candidate: answer.candidate,
            judge: self.judge.to_string(),
            reward: score.reward,
            reply: score.reply,
            label: score.label,
            first_score: score.scores.map(|[first, _]| first),
            second_score: score.scores.map(|[_, second]| second),
            failure: score.failure,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::test_pipeline::{TestPipeline, candidate, prompt, stage};
    use super::*;

    fn score() -> Score {
        stage(json!({"candidates": "candidates", "prompts": "prompts", "judge": "judge"}))
    }

    fn pipeline() -> TestPipeline {
        let mut pipeline = TestPipeline::new();
        pipeline.table("prompts", &[prompt("a", "Why?"), prompt("b", "How?")]);
        let candidates = [
            candidate("a", 0, "So."),
            candidate("a", 1, "No."),
            candidate("b", 0, "So."),
        ];
        pipeline.table("candidates", &candidates);
        pipeline
    }

    #[test]
    fn each_candidate_gets_a_reward() {
        let mut pipeline = pipeline();
        let (rewards, rejects) = pipeline.map::<Reward>(&score()).unwrap();
        assert_eq!(rejects, []);
        let names: Vec<_> = rewards
            .iter()
            .map(|reward| (&*reward.prompt_id, reward.candidate, &*reward.judge))
            .collect();
        let expected = [("a", 0, "judge"), ("a", 1, "judge"), ("b", 0, "judge")];
        assert_eq!(names, expected);
        assert_ne!(rewards[0].reward, rewards[1].reward);
        assert_eq!(pipeline.progress, [2, 3]);
    }

    #[test]
    fn a_prompt_that_cannot_be_scored_is_rejected_and_the_others_are_scored() {
        let mut pipeline = pipeline();
        pipeline.models.unscored = Some("a");
        let (rewards, rejects) = pipeline.map::<Reward>(&score()).unwrap();
        let reason = "no verdict in the reply".to_owned();
        assert_eq!(rejects, [("a".to_owned(), reason)]);
        assert_eq!(rewards.len(), 1);
        assert_eq!(rewards[0].prompt_id, "b");
    }

    #[test]
    fn a_candidate_without_its_prompt_and_an_interrupt_end_the_stage() {
        let mut pipeline = pipeline();
        pipeline.is_interrupted = true;
        let failure = pipeline.map::<Reward>(&score()).unwrap_err();
        assert!(matches!(failure, Failure::Interrupted));
        pipeline.table("prompts", &[prompt("a", "Why?")]);
        let failure = pipeline.map::<Reward>(&score()).unwrap_err();
        assert_eq!(failure.to_string(), "table `prompts` has no prompt b");
    }
}
