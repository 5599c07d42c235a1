//! The `train_sft` stage: supervised fine-tuning of a model on given answers.

use std::num::NonZeroU32;
use std::time::Instant;

use arrow::array::RecordBatch;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::training::{OptimizerSettings, TrainingSettings, TrainingStage, Warmup};
use super::{
    Failure, ModelName, ModelRole, NonNegative, Positive, StageContext, TableName, TrainingRun,
};
use ovchat_data::store::Lookup;
use ovchat_data::tables::{Prompt, Row, SftStep};
use ovchat_models::{
    Optimization, Optimizer, Schedule, SftExample, SftSettings, SftTrainer, Tower, TrainOn, Trainer,
};

/// Trains a model on the answers of its prompts with next-token cross-entropy (supervised
/// fine-tuning). If the model is a reward model, its base model and vision tower are trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainSft {
    /// The table of prompts. Each prompt must have an `answer`.
    pub prompts: TableName,
    /// The model to train. From the next round on, its name refers to the checkpoint written here.
    pub model: ModelName,
    /// The table of another training stage of the same model in the same round; this stage
    /// continues from its checkpoint. Default: training starts from the model at the start of the
    /// round.
    #[serde(default)]
    pub after: Option<TableName>,
    /// The answers that count toward the loss: `all` assistant turns of a conversation, or the
    /// `last` one only.
    #[serde(default)]
    pub answers: TrainOn,
    /// The vision tower: trained with the rest (`train`) or frozen (`freeze`).
    #[serde(default)]
    pub tower: Tower,
    /// The peak learning rate, reached after warmup.
    #[serde(default = "defaults::learning_rate")]
    pub learning_rate: Positive,
    /// The learning rate schedule after warmup: `cosine` or `linear` decay to 0, or `constant`.
    #[serde(default)]
    pub schedule: Schedule,
    /// The number of passes over the prompts.
    #[serde(default = "defaults::epochs")]
    pub epochs: NonZeroU32,
    /// Conversations per optimizer step.
    #[serde(default = "defaults::batch_prompts")]
    pub batch_prompts: NonZeroU32,
    /// The fraction of the optimizer steps in which the learning rate rises from 0.
    #[serde(default = "defaults::warmup_ratio")]
    pub warmup_ratio: NonNegative,
    /// The weight decay of AdamW; 0 turns it off.
    #[serde(default = "defaults::weight_decay")]
    pub weight_decay: NonNegative,
    /// The maximum gradient norm: gradients with a larger norm are scaled down to it. 0 turns
    /// clipping off.
    #[serde(default = "defaults::max_grad_norm")]
    pub max_grad_norm: NonNegative,
    /// Optimizer steps between saved training states. An interrupted training resumes from the last
    /// one.
    #[serde(default = "defaults::save_every")]
    pub save_every: NonZeroU32,
    /// The number of saved training states to keep. If the newest cannot be read, training resumes
    /// from the one before.
    #[serde(default = "defaults::keep_last")]
    pub keep_last: NonZeroU32,
}

/// The default values of LLaVA-NeXT's fine-tuning of LLaVA-OneVision
/// (`scripts/train/finetune_ov.sh`: learning rate 1e-5, cosine, warmup 0.03, no weight decay) and
/// of the Hugging Face `Trainer`; `batch_prompts`, `save_every` and `keep_last` are specific to
/// this project.
mod defaults {
    use super::{NonNegative, NonZeroU32, Positive};

    pub fn learning_rate() -> Positive {
        1.0e-5.try_into().expect("positive")
    }
    pub fn epochs() -> NonZeroU32 {
        NonZeroU32::MIN
    }
    pub fn batch_prompts() -> NonZeroU32 {
        const { NonZeroU32::new(16).unwrap() }
    }
    pub fn warmup_ratio() -> NonNegative {
        0.03.try_into().expect("not negative")
    }
    pub fn weight_decay() -> NonNegative {
        0.0.try_into().expect("not negative")
    }
    pub fn max_grad_norm() -> NonNegative {
        1.0.try_into().expect("not negative")
    }
    pub fn keep_last() -> NonZeroU32 {
        NonZeroU32::MIN
    }
    pub fn save_every() -> NonZeroU32 {
        const { NonZeroU32::new(100).unwrap() }
    }
}

impl TrainingStage for TrainSft {
    type Example = Prompt;
    type Step = SftStep;
    const EXAMPLES: &'static str = "prompts";
    const ROLE: ModelRole = ModelRole::LearnsAnswers;

    fn training(&self) -> TrainingSettings<'_> {
        TrainingSettings {
            examples: &self.prompts,
            model: &self.model,
            after: self.after.as_ref(),
            epochs: self.epochs.get(),
            batch: self.batch_prompts.get(),
            save_every: self.save_every.get(),
            keep_last: self.keep_last.get(),
            optimizer_settings: OptimizerSettings {
                learning_rate: self.learning_rate,
                schedule: self.schedule,
                warmup: Warmup::Ratio(self.warmup_ratio.get()),
                weight_decay: self.weight_decay,
                max_grad_norm: self.max_grad_norm,
                optimizer: Optimizer::Adamw,
            },
        }
    }

    fn begin(
        &self,
        ctx: &mut StageContext<'_>,
        optimization: Optimization,
        _: Option<Lookup>,
    ) -> Result<Box<dyn TrainingRun + '_>, Failure> {
        let settings = SftSettings {
            tower: self.tower,
            optimization,
        };
        let trainer = ctx.models.sft_trainer(&self.model, &settings)?;
        Ok(Box::new(SftTraining {
            stage: self,
            trainer,
        }))
    }
}

struct SftTraining<'a> {
    stage: &'a TrainSft,
    trainer: Box<dyn SftTrainer>,
}

impl TrainingRun for SftTraining<'_> {
    fn step(
        &mut self,
        ctx: &mut StageContext<'_>,
        number: u32,
        epoch: u32,
        rows: &RecordBatch,
    ) -> Result<RecordBatch, Failure> {
        let begun = Instant::now();
        let rows = Prompt::from_batch(rows)?;
        let mut prompts = Vec::with_capacity(rows.len());
        for row in &rows {
            prompts.push(ctx.input_tables.prompt(row, 0)?);
        }
        let mut examples = Vec::with_capacity(rows.len());
        for (row, prompt) in rows.iter().zip(&prompts) {
            let missing = || {
                let id = row.id.as_deref().unwrap_or(&row.prompt_id);
                Failure::Other(format!(
                    "prompt {id} of `{}` has no `answer` to train on; filter out such prompts: \
                     sql: {{ query: \"select * from {} where answer is not null\", tables: [{}] }}",
                    self.stage.prompts, self.stage.prompts, self.stage.prompts
                ))
            };
            examples.push(SftExample {
                id: row.id.as_deref().unwrap_or(&row.prompt_id),
                prompt,
                answer: row.answer.as_deref().ok_or_else(missing)?,
                learned: self.stage.answers,
            });
        }
        let report = self.trainer.step(&examples);
        let report = report.map_err(Failure::of(&self.stage.model))?;
        Ok(SftStep::to_batch(&[SftStep {
            step: number.cast_signed(),
            epoch: epoch.cast_signed(),
            loss: report.loss,
            accuracy: report.accuracy,
            grad_norm: report.grad_norm,
            learning_rate: report.learning_rate,
            tokens: report.tokens.cast_signed(),
            learned_tokens: report.learned_tokens.cast_signed(),
            seconds: begun.elapsed().as_secs_f64(),
        }]))
    }

    fn trainer(&mut self) -> &mut dyn Trainer {
        &mut *self.trainer
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::test_pipeline::{TestPipeline, prompt, stage};
    use super::*;

    fn train() -> TrainSft {
        stage(json!({"prompts": "prompts", "model": "policy", "batch_prompts": 2, "epochs": 2}))
    }

    fn answered(id: &str) -> Prompt {
        Prompt {
            answer: Some("So it is.".to_owned()),
            ..prompt(id, "Why?")
        }
    }

    #[test]
    fn every_epoch_passes_over_all_prompts() {
        let mut pipeline = TestPipeline::new();
        let prompts = [answered("a"), answered("b"), answered("c")];
        pipeline.table("prompts", &prompts);
        let steps = pipeline.train::<SftStep>(&train()).unwrap();
        let numbers: Vec<_> = steps.iter().map(|step| (step.step, step.epoch)).collect();
        assert_eq!(numbers, [(1, 1), (2, 1), (3, 2), (4, 2)]);
        // The scripted trainer counts three words and an end for each answer.
        let tokens: Vec<_> = steps.iter().map(|step| step.learned_tokens).collect();
        assert_eq!(tokens, [8, 4, 8, 4]);
    }

    #[test]
    fn a_prompt_without_an_answer_ends_the_training() {
        let mut pipeline = TestPipeline::new();
        pipeline.table("prompts", &[answered("a"), prompt("b", "How?")]);
        let failure = pipeline.train::<SftStep>(&train()).unwrap_err().to_string();
        let expected = "prompt b of `prompts` has no `answer` to train on";
        assert!(failure.starts_with(expected), "{failure}");
    }
}
