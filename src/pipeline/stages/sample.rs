//! The `sample` stage: k answers per prompt.

use std::num::NonZeroU32;

use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::model_calls::sampled;
use super::shown::Shown;
use super::{
    Failure, Input, ModelName, ModelRole, ModelState, Outcome, Positive, Probability, RowStage,
    Share, Stage, StageContext, StageError, StageKind, StopString, TableName, Task, Temperature,
    Use,
};
use ovchat_data::store::Key;
use ovchat_data::tables::{Candidate, Finish, Prompt, Row};
use ovchat_models::{self as models, Generation, RowFault, Sampling, Stop};

/// The maximum number of answers per prompt; all of them are in memory at once.
const COUNT_MAX: u32 = 1024;

/// Samples `count` answers per prompt. The images and the text of a prompt are prefilled once for
/// all of its answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// The table of prompts.
    pub prompts: TableName,
    /// The model that generates the answers.
    pub model: ModelName,
    /// Answers per prompt.
    #[serde(default = "defaults::count")]
    pub count: NonZeroU32,
    /// The sampling temperature; 0 is greedy decoding.
    #[serde(default = "defaults::temperature")]
    pub temperature: Temperature,
    /// Nucleus sampling: keeps the smallest set of most likely tokens whose probabilities sum to
    /// `top_p`; 1 keeps all.
    #[serde(default = "defaults::top_p")]
    pub top_p: Probability,
    /// Keeps the `top_k` most likely tokens; 0 keeps all. (The lmms-lab chat checkpoints specify
    /// 20.)
    #[serde(default)]
    pub top_k: u32,
    /// Keeps the tokens that are at least `min_p` times as likely as the most likely one; 0 keeps
    /// all.
    #[serde(default, skip_serializing_if = "Share::is_zero")]
    pub min_p: Share,
    /// The penalty on tokens that have already occurred; 1 turns it off. (The lmms-lab chat
    /// checkpoints specify 1.05.)
    #[serde(default = "defaults::repetition_penalty")]
    pub repetition_penalty: Positive,
    /// The maximum length of an answer, in tokens.
    #[serde(default = "defaults::max_new_tokens")]
    pub max_new_tokens: NonZeroU32,
    /// Strings that end an answer, in addition to the model's own stop tokens. The answer's `text`
    /// ends before the first of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<StopString>,
    /// Ids of tokens that end an answer, in addition to the model's own stop tokens.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop_token_ids: Vec<u32>,
    /// Prompts per part. A part is computed, committed and resumed as a unit; its size does not
    /// change the answers. Default: 64; on a GPU as many as have 1,024 answers, if these are more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<NonZeroU32>,
}

/// The number of answers of a part on a GPU: four full batches, since the last one of a part runs empty.
const ANSWERS_ON_GPU: u32 = 1024;

impl Sample {
    /// Returns the number of prompts of a part.
    pub fn part(&self, on_gpu: bool) -> NonZeroU32 {
        let usual = match on_gpu {
            true => defaults::part().get().max(ANSWERS_ON_GPU / self.count),
            false => defaults::part().get(),
        };
        self.part
            .or(NonZeroU32::new(usual))
            .unwrap_or(defaults::part())
    }
}

/// The default values: those of the source document, except `max_new_tokens`, which it does not
/// specify.
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
            let message = format!(
                "{} answers per prompt exceed the maximum of {COUNT_MAX}",
                self.count
            );
            return Err(StageError::at("count", message, "the default is 5"));
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
        self.part(false).get()
    }

    fn key(&self, _: &mut StageContext<'_>, group: &[Prompt], key: Key) -> Result<Key, Failure> {
        let prompt = &group[0];
        // The seed depends on the id.
        let key = key.with(&prompt.prompt_id);
        Ok(Shown::from(prompt).add_to(key))
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
            // Checked before the model is opened, so that a prompt that does not fit is rejected
            // and does not fail the run.
            let room = self.max_new_tokens.get() as usize;
            if let Err(RowFault(reason)) = ctx.models.fits(&self.model, &prompt, room)? {
                outcomes.push(Some(Outcome::fault(&row.prompt_id, reason)));
                continue;
            }
            outcomes.push(None);
            prompts.push(prompt);
            places.push(place);
        }
        if prompts.is_empty() {
            return Ok(outcomes.into_iter().flatten().collect());
        }
        let model = ctx.models.fingerprint(&self.model, ModelState::Now);
        let model = model.to_owned();
        let results = sampled(ctx, &self.model, &prompts, &self.sampling())?;
        for (place, result) in places.into_iter().zip(results) {
            let task = &tasks[place];
            outcomes[place] = Some(match result {
                Ok(answers) => Outcome::Rows(candidates(task, answers, &model)),
                Err(RowFault(reason)) => Outcome::fault(&task.rows[0].prompt_id, reason),
            });
        }
        Ok(outcomes.into_iter().flatten().collect())
    }
}

fn candidates(task: &Task<Prompt>, answers: Vec<Generation>, model: &str) -> Vec<Candidate> {
    let row = |(number, answer): (usize, Generation)| Candidate {
        row_key: task.key.clone(),
        prompt_id: task.rows[0].prompt_id.clone(),
        candidate: number as i32,
        text: answer.text,
        // Summed in float64: a float32 sum of hundreds of terms would lose digits that training
        // compares.
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::test_pipeline::{FINGERPRINT, TestPipeline, prompt, stage};
    use super::*;

    fn sample() -> Sample {
        stage(json!({"prompts": "prompts", "model": "policy", "count": 2}))
    }

    fn pipeline() -> TestPipeline {
        let mut pipeline = TestPipeline::new();
        pipeline.table("prompts", &[prompt("a", "Why?"), prompt("b", "How?")]);
        pipeline
    }

    #[test]
    fn each_prompt_gets_its_answers_with_their_tokens() {
        let mut pipeline = pipeline();
        let (answers, rejects) = pipeline.map::<Candidate>(&sample()).unwrap();
        assert_eq!(rejects, []);
        let names: Vec<_> = answers
            .iter()
            .map(|answer| (&*answer.prompt_id, answer.candidate))
            .collect();
        assert_eq!(names, [("a", 0), ("a", 1), ("b", 0), ("b", 1)]);
        for answer in &answers {
            assert_eq!(answer.token_ids.len(), answer.token_logps.len());
            let sum: f64 = answer.token_logps.iter().map(|&logp| f64::from(logp)).sum();
            assert_eq!(answer.logp, sum);
            assert_eq!(answer.model, FINGERPRINT);
        }
        assert_eq!(answers[0].row_key, answers[1].row_key);
        assert_ne!(answers[0].row_key, answers[2].row_key);
        assert_ne!(answers[0].text, answers[1].text);
        assert_eq!(pipeline.progress, [1, 2]);
    }

    #[test]
    fn a_prompt_that_does_not_fit_is_rejected_and_the_others_are_answered() {
        let mut pipeline = pipeline();
        pipeline.models.too_long = Some("a");
        let (answers, rejects) = pipeline.map::<Candidate>(&sample()).unwrap();
        let reason = "the prompt is too long".to_owned();
        assert_eq!(rejects, [("a".to_owned(), reason)]);
        assert!(answers.iter().all(|answer| answer.prompt_id == "b"));
        assert_eq!(answers.len(), 2);
    }

    #[test]
    fn an_interrupted_or_missing_model_ends_the_stage() {
        let mut pipeline = pipeline();
        pipeline.is_interrupted = true;
        let failure = pipeline.map::<Candidate>(&sample()).unwrap_err();
        assert!(matches!(failure, Failure::Interrupted));
        pipeline.is_interrupted = false;
        pipeline.models.is_missing = true;
        let failure = pipeline.map::<Candidate>(&sample()).unwrap_err();
        let expected = "model `policy`: model.safetensors: not found";
        assert_eq!(failure.to_string(), expected);
    }

    #[test]
    fn more_answers_than_the_limit_are_refused() {
        let sample: Sample = stage(json!({"prompts": "prompts", "model": "policy", "count": 1025}));
        let error = sample.output(&[]).unwrap_err();
        assert_eq!(error.field, Some("count"));
    }
}
