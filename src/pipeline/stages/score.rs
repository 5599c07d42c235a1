//! The `score` stage: a judge's reward for each candidate.

use std::num::NonZeroU32;

use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Failure, Input, ModelName, ModelRole, ModelState, Outcome, RowStage, Stage, StageContext,
    StageError, StageKind, TableName, Task, Use, shown,
};
use ovchat_data::store::Key;
use ovchat_data::tables::{Candidate, Prompt, Reward, Row, rows};
use ovchat_models::{self as models, AnswerGroup, Listener, RowFault};

/// Scores candidates with a judge; a higher reward is better.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Score {
    /// The table of candidates.
    pub candidates: TableName,
    /// The model that scores.
    pub judge: ModelName,
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
        vec![
            Input {
                field: "candidates",
                table: Some(&self.candidates),
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
        let system = prompt.system.as_deref();
        let mut key = shown(
            key,
            &prompt.image_ids,
            system,
            &prompt.turns,
            &prompt.question,
        );
        for caption in prompt.captions.iter().flatten() {
            key = key.with("caption").with(caption);
        }
        if let Some(answer) = &prompt.answer {
            key = key.with("answer").with(answer);
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
            let row = ctx
                .input_tables
                .prompt_row(self.prompts(), &task.rows[0].prompt_id)?;
            prompts.push(ctx.input_tables.prompt(&row, 0)?);
        }
        let groups: Vec<AnswerGroup<'_>> = tasks
            .iter()
            .zip(&prompts)
            .map(|(task, prompt)| AnswerGroup {
                prompt,
                answers: task
                    .rows
                    .iter()
                    .map(|answer| answer.text.as_str())
                    .collect(),
                numbers: task.rows.iter().map(|answer| answer.candidate).collect(),
            })
            .collect();
        let mut outcomes: Vec<Option<Outcome<Vec<Reward>>>> = tasks.iter().map(|_| None).collect();
        let stopping = ctx.stopping;
        let progress = &mut *ctx.progress;
        let mut done = 0;
        let judge = ctx.models.judge(&self.judge)?;
        if let Some(plan) = judge.plan() {
            (ctx.say)(&format!("{}: {plan}", self.judge));
        }
        let mut take = |index: usize, result: Result<Vec<models::JudgeScore>, RowFault>| {
            let task = &tasks[index];
            outcomes[index] = Some(match result {
                Ok(scores) => {
                    let row = |(answer, score): (&JudgedAnswer, models::JudgeScore)| Reward {
                        row_key: task.key.clone(),
                        prompt_id: answer.prompt_id.clone(),
                        candidate: answer.candidate,
                        judge: self.judge.to_string(),
                        reward: score.reward,
                        reply: score.reply,
                    };
                    Outcome::Rows(task.rows.iter().zip(scores).map(row).collect())
                }
                Err(RowFault(reason)) => Outcome::fault(&task.rows[0].prompt_id, reason),
            });
            done += task.rows.len() as u64;
            progress(done);
            if stopping() {
                std::ops::ControlFlow::Break(())
            } else {
                std::ops::ControlFlow::Continue(())
            }
        };
        let name = &self.judge;
        let say = &mut *ctx.say;
        let scored = judge.score_for(
            &groups,
            &mut take,
            &mut Listener {
                say: &mut |text| say(&format!("{name}: {text}")),
                stopping,
            },
        );
        *ctx.telemetry = scored.map_err(Failure::of(&self.judge))?;
        outcomes
            .into_iter()
            .map(|outcome| outcome.ok_or(Failure::Interrupted))
            .collect()
    }
}
