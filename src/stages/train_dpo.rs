//! `train_dpo`: one training of a model on pairs with direct preference optimization.

use std::cell::RefCell;
use std::num::NonZeroU32;
use std::time::Instant;

use arrow::array::RecordBatch;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::training::{Course, Recipe, Trains, example, prompts};
use super::{
    Failure, Map, MapWork, ModelName, NonNegative, Outcome, Positive, Role, Scope, TableName, Task,
    Training, shown,
};
use crate::models::{DpoLearner, DpoSettings, Learner, Mask, Newlines, Optimization, Schedule};
use crate::store::{Key, Lookup};
use crate::tables::{DpoStep, Pair, Reference, Row};

/// Trains every weight of a model on pairs with DPO (sigmoid loss), the model at the start of the
/// round being the reference. The defaults are those of the document's training script.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainDpo {
    /// The table of pairs.
    pub pairs: TableName,
    /// The model that learns. From the next round on its name means the checkpoint made here.
    pub model: ModelName,
    /// The table of another training of the model in the same round; this one goes on where that
    /// one ends. Left out: from the model as it is at the start of the round.
    #[serde(default)]
    pub after: Option<TableName>,
    /// How strongly the reference holds the model.
    #[serde(default = "defaults::beta")]
    pub beta: Positive,
    /// Which tokens count: `answer`, or the conventions `trl` and `llava_next`, to compare with runs
    /// of those programs.
    #[serde(default)]
    pub mask: Mask,
    /// Newlines between a picture and the text: `one`, as in sampling, or `two`, as LLaVA-NeXT's DPO
    /// script has them.
    #[serde(default)]
    pub newlines: Newlines,
    /// The highest learning rate, reached after warmup; it then falls to 0 along a cosine.
    #[serde(default = "defaults::learning_rate")]
    pub learning_rate: Positive,
    /// Passes over the pairs.
    #[serde(default = "defaults::epochs")]
    pub epochs: NonZeroU32,
    /// Pairs per optimizer update.
    #[serde(default = "defaults::batch_pairs")]
    pub batch_pairs: NonZeroU32,
    /// Share of the updates in which the learning rate rises from 0.
    #[serde(default = "defaults::warmup_ratio")]
    pub warmup_ratio: NonNegative,
    /// AdamW's weight decay.
    #[serde(default = "defaults::weight_decay")]
    pub weight_decay: NonNegative,
    /// Gradients with a larger norm are scaled down to it; 0 never clips.
    #[serde(default = "defaults::max_grad_norm")]
    pub max_grad_norm: NonNegative,
    /// Updates between two saved states; a killed training goes on at the last one.
    #[serde(default = "defaults::save_every")]
    pub save_every: NonZeroU32,
}

/// `dpo_ov7b.sh` and the Hugging Face trainer's own defaults; `save_every` is ours.
mod defaults {
    use super::{NonNegative, NonZeroU32, Positive};

    pub fn beta() -> Positive {
        0.1.try_into().expect("positive")
    }
    pub fn learning_rate() -> Positive {
        5.0e-7.try_into().expect("positive")
    }
    pub fn epochs() -> NonZeroU32 {
        NonZeroU32::MIN
    }
    pub fn batch_pairs() -> NonZeroU32 {
        const { NonZeroU32::new(8).unwrap() }
    }
    pub fn warmup_ratio() -> NonNegative {
        0.1.try_into().expect("not negative")
    }
    pub fn weight_decay() -> NonNegative {
        0.0.try_into().expect("not negative")
    }
    pub fn max_grad_norm() -> NonNegative {
        1.0.try_into().expect("not negative")
    }
    pub fn save_every() -> NonZeroU32 {
        const { NonZeroU32::new(100).unwrap() }
    }
}

impl Trains for TrainDpo {
    type Lesson = Pair;
    type Step = DpoStep;
    const LESSONS: &'static str = "pairs";
    const ROLE: Role = Role::LearnsPairs;

    fn course(&self) -> Course<'_> {
        Course {
            lessons: &self.pairs,
            model: &self.model,
            after: self.after.as_ref(),
            epochs: self.epochs.get(),
            batch: self.batch_pairs.get(),
            save_every: self.save_every.get(),
            recipe: Recipe {
                learning_rate: self.learning_rate,
                schedule: Schedule::Cosine,
                warmup_ratio: self.warmup_ratio,
                weight_decay: self.weight_decay,
                max_grad_norm: self.max_grad_norm,
            },
        }
    }

    fn before(&self, table: &TableName) -> Option<(TableName, Box<dyn MapWork + '_>)> {
        let name = format!("{table}_reference")
            .try_into()
            .expect("a name with a suffix is a name");
        let pass = ReferencePass {
            stage: self,
            learner: RefCell::new(None),
        };
        Some((name, Box::new(pass)))
    }

    fn begin(
        &self,
        scope: &mut Scope<'_>,
        optimization: Optimization,
        before: Option<Lookup>,
    ) -> Result<Box<dyn Training + '_>, Failure> {
        let settings = self.settings(optimization);
        Ok(Box::new(DpoTraining {
            stage: self,
            start: scope.models.fingerprint(&self.model).to_owned(),
            learner: scope.models.dpo_learner(&self.model, &settings)?,
            references: before.expect("this stage asks for a table before"),
        }))
    }
}

impl TrainDpo {
    fn settings(&self, optimization: Optimization) -> DpoSettings {
        DpoSettings {
            beta: self.beta.get(),
            mask: self.mask,
            newlines: self.newlines,
            optimization,
        }
    }

    /// The reference log-probabilities that sampling left, if the model that answered is the
    /// reference, which is the model as it is at the start of this round, and what was asked and
    /// answered is all that counts.
    fn sampled_reference(&self, pair: &Pair, start: &str) -> Option<[f64; 2]> {
        let as_sampled = pair.chosen_token_ids.is_some() && pair.rejected_token_ids.is_some();
        let same_model = pair.model.as_deref() == Some(start);
        let same_tokens = (self.mask, self.newlines) == (Mask::Answer, Newlines::One);
        (as_sampled && same_model && same_tokens).then_some(())?;
        Some([pair.chosen_logp?, pair.rejected_logp?])
    }
}

struct DpoTraining<'a> {
    stage: &'a TrainDpo,
    /// The fingerprint of the model at the start: the reference.
    start: String,
    learner: Box<dyn DpoLearner>,
    /// The log-probabilities that had to be computed.
    references: Lookup,
}

impl Training for DpoTraining<'_> {
    fn step(
        &mut self,
        scope: &mut Scope<'_>,
        number: u32,
        epoch: u32,
        rows: &RecordBatch,
    ) -> Result<RecordBatch, Failure> {
        let begun = Instant::now();
        let pairs = Pair::from_batch(rows)?;
        let prompts = prompts(scope, &pairs)?;
        let mut examples = Vec::with_capacity(pairs.len());
        for (pair, prompt) in pairs.iter().zip(&prompts) {
            let reference = if let Some(sampled) = self.stage.sampled_reference(pair, &self.start) {
                sampled
            } else {
                let missing = || Failure::Other(format!("pair {} has no reference", pair.row_key));
                let row: Option<Reference> = self.references.row(&pair.row_key)?;
                let row = row.ok_or_else(missing)?;
                [row.chosen_logp, row.rejected_logp]
            };
            examples.push(example(pair, prompt, Some(reference)));
        }
        let report = self.learner.step(&examples);
        let report = report.map_err(Failure::of(&self.stage.model))?;
        Ok(DpoStep::to_batch(&[DpoStep {
            step: number.cast_signed(),
            epoch: epoch.cast_signed(),
            loss: report.loss,
            rewards_chosen: report.rewards_chosen,
            rewards_rejected: report.rewards_rejected,
            accuracy: report.accuracy,
            margin: report.rewards_chosen - report.rewards_rejected,
            logps_chosen: report.logps_chosen,
            logps_rejected: report.logps_rejected,
            grad_norm: report.grad_norm,
            learning_rate: report.learning_rate,
            tokens: report.tokens.cast_signed(),
            seconds: begun.elapsed().as_secs_f64(),
        }]))
    }

    fn learner(&mut self) -> &mut dyn Learner {
        &mut *self.learner
    }
}

/// Computes the reference log-probabilities that sampling did not leave: those of pairs that people
/// judged, or whose answers come from another model.
struct ReferencePass<'a> {
    stage: &'a TrainDpo,
    /// Opened for the first pair that needs it, and kept for all parts.
    learner: RefCell<Option<Box<dyn DpoLearner>>>,
}

/// Pairs per part of the reference pass.
const REFERENCE_PART: u32 = 64;

impl Map for ReferencePass<'_> {
    type In = Pair;
    type Out = Reference;

    fn input(&self) -> &TableName {
        &self.stage.pairs
    }

    fn part_groups(&self) -> u32 {
        REFERENCE_PART
    }

    fn key(&self, _: &mut Scope<'_>, group: &[Pair], key: Key) -> Result<Key, Failure> {
        let mut key = key.with(format!("{:?} {:?}", self.stage.mask, self.stage.newlines));
        for pair in group {
            let system = pair.system.as_deref();
            key = shown(
                key.with(&pair.row_key),
                &pair.image_ids,
                system,
                &pair.turns,
                &pair.prompt,
            );
            for (text, token_ids) in [
                (&pair.chosen, &pair.chosen_token_ids),
                (&pair.rejected, &pair.rejected_token_ids),
            ] {
                key = key.with(text);
                for id in token_ids.iter().flatten() {
                    key = key.with(id.to_le_bytes());
                }
            }
        }
        Ok(key)
    }

    fn map(
        &self,
        scope: &mut Scope<'_>,
        tasks: &[Task<Pair>],
    ) -> Result<Vec<Outcome<Vec<Reference>>>, Failure> {
        let model = &self.stage.model;
        let start = scope.models.fingerprint(model).to_owned();
        let mut outcomes = Vec::with_capacity(tasks.len());
        let mut learner = self.learner.borrow_mut();
        let mut done = 0;
        for task in tasks {
            let open = |pair: &&Pair| self.stage.sampled_reference(pair, &start).is_none();
            let pairs: Vec<Pair> = task.rows.iter().filter(open).cloned().collect();
            let mut rows = Vec::with_capacity(pairs.len());
            if !pairs.is_empty() {
                if scope.go_on().is_break() {
                    return Err(Failure::Interrupted);
                }
                let prompts = prompts(scope, &pairs)?;
                let examples: Vec<_> = pairs
                    .iter()
                    .zip(&prompts)
                    .map(|(pair, prompt)| example(pair, prompt, None))
                    .collect();
                if learner.is_none() {
                    // Nothing is trained here, so the schedule does not matter.
                    let settings = self
                        .stage
                        .settings(self.stage.course().recipe.optimization(1));
                    *learner = Some(scope.models.dpo_learner(model, &settings)?);
                }
                let learner = learner.as_mut().expect("just opened");
                let logps = learner
                    .reference_logps(&examples)
                    .map_err(Failure::of(model))?;
                rows.extend(
                    pairs
                        .iter()
                        .zip(logps)
                        .map(|(pair, [chosen_logp, rejected_logp])| Reference {
                            row_key: task.key.clone(),
                            pair: pair.row_key.clone(),
                            prompt_id: pair.prompt_id.clone(),
                            chosen_logp,
                            rejected_logp,
                            model: start.clone(),
                        }),
                );
            }
            done += task.rows.len() as u64;
            (scope.progress)(done);
            outcomes.push(Outcome::Made(rows));
        }
        Ok(outcomes)
    }
}
