//! The `train_reward` stage: training of a reward model on pairs.

use std::num::NonZeroU32;
use std::time::Instant;

use arrow::array::RecordBatch;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::training::{
    OptimizerSettings, TrainingSettings, TrainingStage, Warmup, example, prompts,
};
use super::{
    Failure, ModelName, ModelRole, NonNegative, Positive, StageContext, TableName, TrainingRun,
};
use ovchat_data::store::Lookup;
use ovchat_data::tables::{Pair, RewardStep, Row};
use ovchat_models::{Optimization, Optimizer, RewardSettings, RewardTrainer, Schedule, Trainer};

/// Trains a reward model on preference pairs, as in LLaVA-RLHF: a LoRA adapter and the reward head
/// are trained to score the chosen answer above the rejected one; the base model, projector and
/// vision tower are frozen. The loss is `-log sigmoid(r_chosen - r_rejected)`, plus `centering`
/// times the absolute batch mean of `r_chosen + r_rejected`. The defaults are those of LLaVA-RLHF's
/// training script.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainReward {
    /// The table of pairs.
    pub pairs: TableName,
    /// The reward model to train: its adapter and head, or new ones if it has none. From the next
    /// round on, and in `evaluate`, its name refers to the checkpoint written here.
    pub model: ModelName,
    /// The table of another training stage of the same model in the same round; this stage
    /// continues from its checkpoint. Default: training starts from the model at the start of the
    /// round.
    #[serde(default)]
    pub after: Option<TableName>,
    /// The LoRA rank of a new adapter.
    #[serde(default = "defaults::rank")]
    pub rank: NonZeroU32,
    /// The LoRA alpha of a new adapter, whose product is scaled by `alpha / rank`.
    #[serde(default = "defaults::alpha")]
    pub alpha: Positive,
    /// The weight of the loss term that keeps the mean reward near 0.
    #[serde(default = "defaults::centering")]
    pub centering: NonNegative,
    /// The peak learning rate, reached after warmup.
    #[serde(default = "defaults::learning_rate")]
    pub learning_rate: Positive,
    /// The learning rate schedule after warmup: `constant`, or `cosine` or `linear` decay to 0.
    #[serde(default = "defaults::schedule")]
    pub schedule: Schedule,
    /// The number of passes over the pairs.
    #[serde(default = "defaults::epochs")]
    pub epochs: NonZeroU32,
    /// Pairs per optimizer step.
    #[serde(default = "defaults::batch_pairs")]
    pub batch_pairs: NonZeroU32,
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

/// The default values of LLaVA-RLHF's `RLHF/scripts/13b-v1.5-336/train_reward_model.sh`;
/// `save_every` and `keep_last` are specific to this project.
mod defaults {
    use super::{NonNegative, NonZeroU32, Positive, Schedule};

    pub fn schedule() -> Schedule {
        Schedule::Constant
    }
    pub fn rank() -> NonZeroU32 {
        const { NonZeroU32::new(64).unwrap() }
    }
    pub fn alpha() -> Positive {
        16.0.try_into().expect("positive")
    }
    pub fn centering() -> NonNegative {
        1.0e-3.try_into().expect("not negative")
    }
    pub fn learning_rate() -> Positive {
        2.0e-5.try_into().expect("positive")
    }
    pub fn epochs() -> NonZeroU32 {
        NonZeroU32::MIN
    }
    pub fn batch_pairs() -> NonZeroU32 {
        const { NonZeroU32::new(32).unwrap() }
    }
    pub fn warmup_ratio() -> NonNegative {
        0.03.try_into().expect("not negative")
    }
    pub fn weight_decay() -> NonNegative {
        0.0.try_into().expect("not negative")
    }
    pub fn max_grad_norm() -> NonNegative {
        0.3.try_into().expect("not negative")
    }
    pub fn keep_last() -> NonZeroU32 {
        NonZeroU32::MIN
    }
    pub fn save_every() -> NonZeroU32 {
        const { NonZeroU32::new(100).unwrap() }
    }
}

impl TrainingStage for TrainReward {
    type Example = Pair;
    type Step = RewardStep;
    const EXAMPLES: &'static str = "pairs";
    const ROLE: ModelRole = ModelRole::LearnsRewards;

    fn training(&self) -> TrainingSettings<'_> {
        TrainingSettings {
            examples: &self.pairs,
            model: &self.model,
            after: self.after.as_ref(),
            epochs: self.epochs.get(),
            batch: self.batch_pairs.get(),
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
        let settings = RewardSettings {
            rank: self.rank.get() as usize,
            alpha: self.alpha.get(),
            centering: self.centering.get(),
            seed: ctx.seed_for("adapter"),
            optimization,
        };
        let trainer = ctx.models.reward_trainer(&self.model, &settings)?;
        Ok(Box::new(RewardTraining {
            model: &self.model,
            trainer,
        }))
    }
}

struct RewardTraining<'a> {
    model: &'a ModelName,
    trainer: Box<dyn RewardTrainer>,
}

impl TrainingRun for RewardTraining<'_> {
    fn step(
        &mut self,
        ctx: &mut StageContext<'_>,
        number: u32,
        epoch: u32,
        rows: &RecordBatch,
    ) -> Result<RecordBatch, Failure> {
        let begun = Instant::now();
        let pairs = Pair::from_batch(rows)?;
        let prompts = prompts(ctx, &pairs)?;
        let examples: Vec<_> = pairs
            .iter()
            .zip(&prompts)
            .map(|(pair, prompt)| example(pair, prompt, None))
            .collect();
        let report = self.trainer.step(&examples);
        let report = report.map_err(Failure::of(self.model))?;
        Ok(RewardStep::to_batch(&[RewardStep {
            step: number.cast_signed(),
            epoch: epoch.cast_signed(),
            loss: report.loss,
            reward_chosen: report.reward_chosen,
            reward_rejected: report.reward_rejected,
            accuracy: report.accuracy,
            margin: report.reward_chosen - report.reward_rejected,
            grad_norm: report.grad_norm,
            learning_rate: report.learning_rate,
            tokens: report.tokens.cast_signed(),
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

    use super::super::test_pipeline::{TestPipeline, pair, stage};
    use super::*;

    fn train() -> TrainReward {
        stage(json!({"pairs": "pairs", "model": "judge", "batch_pairs": 2}))
    }

    #[test]
    fn a_step_reports_the_rewards_of_its_pairs() {
        let mut pipeline = TestPipeline::new();
        let pairs = [
            pair("a", "So.", "No."),
            pair("b", "So.", "No."),
            pair("c", "So.", "No."),
        ];
        pipeline.table("pairs", &pairs);
        let steps = pipeline.train::<RewardStep>(&train()).unwrap();
        assert_eq!(steps.len(), 2);
        for step in &steps {
            assert_eq!(step.margin, step.reward_chosen - step.reward_rejected);
            assert!(step.learning_rate > 0.0);
        }
        // One word and an end for each of two answers.
        assert_eq!([steps[0].tokens, steps[1].tokens], [8, 4]);
    }

    #[test]
    fn a_missing_model_ends_the_training() {
        let mut pipeline = TestPipeline::new();
        pipeline.table("pairs", &[pair("a", "So.", "No.")]);
        pipeline.models.is_missing = true;
        let failure = pipeline.train::<RewardStep>(&train()).unwrap_err();
        let expected = "model `judge`: model.safetensors: not found";
        assert_eq!(failure.to_string(), expected);
    }
}
