//! `sample`: k answers to each prompt.

use std::num::NonZeroU32;

use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Failure, Input, ModelName, ModelRole, ModelState, Outcome, Positive, Probability, RowStage,
    Share, Stage, StageContext, StageError, StageKind, StopString, TableName, Task, Temperature,
    Use, shown,
};
use ovchat_data::store::Key;
use ovchat_data::tables::{Candidate, Finish, Prompt, Row};
use ovchat_models::{self as models, Generation, RowFault, Sampling, Stop};

/// The most answers to a prompt: they are in memory together.
const COUNT_MAX: u32 = 1024;

/// Samples `count` answers to each prompt, all from one reading of its pictures and its text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// The table of prompts.
    pub prompts: TableName,
    /// The model that answers.
    pub model: ModelName,
    /// Answers per prompt.
    #[serde(default = "defaults::count")]
    pub count: NonZeroU32,
    /// How far to stray from the most likely token; 0 is greedy.
    #[serde(default = "defaults::temperature")]
    pub temperature: Temperature,
    /// Keeps the smallest set of most likely tokens whose probabilities sum to this.
    #[serde(default = "defaults::top_p")]
    pub top_p: Probability,
    /// Keeps this many most likely tokens; 0 keeps all. (The lmms-lab chat checkpoints ask for 20.)
    #[serde(default)]
    pub top_k: u32,
    /// Keeps only tokens at least this share as likely as the most likely one; 0 keeps all.
    #[serde(default, skip_serializing_if = "Share::is_zero")]
    pub min_p: Share,
    /// Makes tokens that occurred less likely; 1 is off. (The lmms-lab chat checkpoints ask for 1.05.)
    #[serde(default = "defaults::repetition_penalty")]
    pub repetition_penalty: Positive,
    /// The longest answer in tokens.
    #[serde(default = "defaults::max_new_tokens")]
    pub max_new_tokens: NonZeroU32,
    /// Texts that end an answer, beside the model's own stop tokens. The answer's `text` ends before
    /// the first of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<StopString>,
    /// Tokens that end an answer, beside the model's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop_token_ids: Vec<u32>,
    /// Prompts that are computed, stored and resumed as one.
    #[serde(default = "defaults::part")]
    pub part: NonZeroU32,
}

/// The source document's values; `max_new_tokens` is ours, since it names none.
mod defaults {
    use super::{NonZeroU32, Positive, Probability, Temperature};

    pub fn count() -> NonZeroU32 {
        const { NonZeroU32::new(5).unwrap() }
    }
    pub fn temperature() -> Temperature {
        0.7.try_into().expect("a temperature")
    }
    pub fn top_p() -> Probability {
        0.9.try_into().expect("a probability")
    }
    pub fn repetition_penalty() -> Positive {
        1.0.try_into().expect("a positive number")
    }
    pub fn max_new_tokens() -> NonZeroU32 {
        const { NonZeroU32::new(512).unwrap() }
    }
    pub fn part() -> NonZeroU32 {
        const { NonZeroU32::new(64).unwrap() }
    }
}

impl Stage for Sample {
    fn inputs(&self) -> Vec<Input<'_>> {
        vec![Input {
            field: "prompts",
            table: Some(&self.prompts),
            needs: Prompt::schema(),
            kind: Prompt::KIND,
        }]
    }

    fn uses(&self) -> Vec<Use<'_>> {
        vec![Use {
            field: "model",
            model: &self.model,
            role: ModelRole::Answers,
            state: ModelState::Now,
        }]
    }

    fn kind(&self) -> Option<&'static str> {
        Some(Candidate::KIND)
    }

    fn output(&self, _: &[(TableName, SchemaRef)]) -> Result<SchemaRef, StageError> {
        if self.count.get() > COUNT_MAX {
            return Err(StageError {
                field: Some("count"),
                message: format!(
                    "{} answers to each prompt are too many: at most {COUNT_MAX} are sampled",
                    self.count
                ),
                help: Some("5 are the usual number".to_owned()),
            });
        }
        Ok(Candidate::schema())
    }

    fn draws(&self) -> bool {
        self.temperature.get() > 0.0
    }

    fn unkeyed(&self) -> &'static [&'static str] {
        &["part"]
    }

    fn expected_rows(&self, input: u64) -> Option<u64> {
        Some(input * u64::from(self.count.get()))
    }

    fn work(&self) -> StageKind<'_> {
        StageKind::Rows(Box::new(self))
    }
}

impl Sample {
    fn sampling(&self) -> Sampling {
        Sampling {
            count: self.count.get() as usize,
            temperature: self.temperature.get(),
            top_p: self.top_p.get(),
            top_k: self.top_k as usize,
            min_p: self.min_p.get(),
            repetition_penalty: self.repetition_penalty.get(),
            max_new_tokens: self.max_new_tokens.get() as usize,
            stop_strings: self.stop.iter().map(|one| one.get().to_owned()).collect(),
            stop_token_ids: self.stop_token_ids.iter().map(|&id| id.into()).collect(),
        }
    }
}

impl RowStage for &Sample {
    type In = Prompt;
    type Out = Candidate;

    fn input(&self) -> &TableName {
        &self.prompts
    }

    fn part_groups(&self) -> u32 {
        self.part.get()
    }

    fn key(&self, _: &mut StageContext<'_>, group: &[Prompt], key: Key) -> Result<Key, Failure> {
        let prompt = &group[0];
        // The id decides the seed.
        let key = key.with(&prompt.prompt_id);
        let system = prompt.system.as_deref();
        Ok(shown(
            key,
            &prompt.image_ids,
            system,
            &prompt.turns,
            &prompt.question,
        ))
    }

    fn map(
        &self,
        ctx: &mut StageContext<'_>,
        tasks: &[Task<Prompt>],
    ) -> Result<Vec<Outcome<Vec<Candidate>>>, Failure> {
        let mut outcomes: Vec<Option<Outcome<Vec<Candidate>>>> = Vec::new();
        let mut prompts: Vec<models::ChatPrompt> = Vec::new();
        let mut places = Vec::new();
        for (place, task) in tasks.iter().enumerate() {
            let row = &task.rows[0];
            let prompt = ctx.input_tables.prompt(row, ctx.seed_for(&row.prompt_id))?;
            // Before the model is opened: a prompt that can't be answered costs its row, not the run.
            let room = self.max_new_tokens.get() as usize;
            if let Err(RowFault(reason)) = ctx.models.fits(&self.model, &prompt, room)? {
                outcomes.push(Some(Outcome::fault(&row.prompt_id, reason)));
                continue;
            }
            outcomes.push(None);
            prompts.push(prompt);
            places.push(place);
        }
        if !prompts.is_empty() {
            let fingerprint = ctx
                .models
                .fingerprint(&self.model, ModelState::Now)
                .to_owned();
            let stopping = ctx.stopping;
            let progress = &mut *ctx.progress;
            let mut done = 0;
            let policy = ctx.models.policy(&self.model)?;
            if let Some(plan) = policy.plan() {
                (ctx.say)(&format!("{}: {plan}", self.model));
            }
            let sampled = policy.sample(&prompts, &self.sampling(), &mut |index, result| {
                let place = places[index];
                let task = &tasks[place];
                outcomes[place] = Some(match result {
                    Ok(answers) => Outcome::TableVersion(candidates(task, answers, &fingerprint)),
                    Err(RowFault(reason)) => Outcome::fault(&task.rows[0].prompt_id, reason),
                });
                done += 1;
                progress(done);
                if stopping() {
                    std::ops::ControlFlow::Break(())
                } else {
                    std::ops::ControlFlow::Continue(())
                }
            });
            *ctx.telemetry = sampled.map_err(Failure::of(&self.model))?;
        }
        // A model that was told to stop leaves prompts unanswered.
        outcomes
            .into_iter()
            .map(|outcome| outcome.ok_or(Failure::Interrupted))
            .collect()
    }
}

fn candidates(task: &Task<Prompt>, answers: Vec<Generation>, model: &str) -> Vec<Candidate> {
    let row = |(number, answer): (usize, Generation)| Candidate {
        row_key: task.key.clone(),
        prompt_id: task.rows[0].prompt_id.clone(),
        candidate: number as i32,
        text: answer.text,
        // Summed in float64: the sum of hundreds of float32 would lose digits that training compares.
        logp: answer.token_logps.iter().map(|&logp| f64::from(logp)).sum(),
        token_ids: answer.token_ids,
        token_logps: answer.token_logps,
        finish: match answer.stop {
            Stop::Token | Stop::String => Finish::Stop,
            Stop::Length => Finish::Length,
        },
        seed: answer.seed,
        model: model.to_owned(),
    };
    answers.into_iter().enumerate().map(row).collect()
}
