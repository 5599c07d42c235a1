//! The `train_dpo` stage: training on pairs with direct preference optimization or a related loss.

mod options;
mod reference;

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::time::Instant;

use arrow::array::RecordBatch;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::options::{Lora, LossSum, ReferenceAudit, ReferenceModel};
use self::reference::ReferencePass;
use super::training::{
    OptimizerSettings, TrainingSettings, TrainingStage, Warmup, example, prompts,
};
use super::{
    BatchStage, Failure, ModelName, ModelRole, ModelState, NonNegative, Positive, Share,
    StageContext, StageError, TableName, TrainingRun, Use,
};
use ovchat_data::store::Lookup;
use ovchat_data::tables::{DpoStep, Pair, Reference, Row};
use ovchat_models::checkpoint::{LlavaOnevisionConfig, TrainingSizes};
use ovchat_models::{
    Checkpointing, DpoSettings, DpoTrainer, LoraSettings, Mask, Newlines, Objective, Optimization,
    Optimizer, Part, Schedule, Trained, Trainer,
};

/// The suffix of the name of a training stage's table of reference log-probabilities.
pub const REFERENCE: &str = "_reference";

/// Trains a model on preference pairs with DPO or a related loss. The defaults are those of the
/// document's training script: full fine-tuning, the sigmoid loss, and the model at the start of
/// the round as the reference.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainDpo {
    /// The table of pairs.
    pub pairs: TableName,
    /// The model to train. From the next round on, its name refers to the checkpoint written here.
    pub model: ModelName,
    /// The table of another training stage of the same model in the same round; this stage
    /// continues from its checkpoint. Default: training starts from the model at the start of the
    /// round.
    #[serde(default)]
    pub after: Option<TableName>,
    /// The loss: a name, or a weighted sum of several losses, e.g. `{ sigmoid: 1, sft: 0.2 }`.
    #[serde(default)]
    pub loss: LossSum,
    /// The coefficient β of the preference loss: a higher value allows less deviation from the
    /// reference model.
    #[serde(default = "defaults::beta")]
    pub beta: Positive,
    /// The assumed fraction of pairs with flipped labels, below 0.5. The losses `exo_pair` and
    /// `robust` require a value above 0.
    #[serde(default)]
    pub label_smoothing: Share,
    /// The target reward margin γ of the loss `simpo`. Default: 0.5.
    #[serde(default)]
    pub simpo_gamma: Option<NonNegative>,
    /// The reference model: `round_start` (the model at the start of the round), `initial` (the
    /// model before the first round), `none`, or the name of another model. Default: `round_start`,
    /// or `none` if no loss uses a reference.
    #[serde(default)]
    pub reference: Option<ReferenceModel>,
    /// The audit of reference log-probabilities that were recorded during sampling: the share that
    /// is recomputed, and the maximum drift.
    #[serde(default)]
    pub reference_audit: ReferenceAudit,
    /// The tokens that count toward the loss: `answer`, or the conventions of `trl` and
    /// `llava_next`, for comparison with runs of those programs.
    #[serde(default)]
    pub mask: Mask,
    /// Newlines between an image and the text: `one`, as in sampling, or `two`, as in LLaVA-NeXT's
    /// DPO script.
    #[serde(default)]
    pub newlines: Newlines,
    /// The parts of the model to train; the others are frozen. Default: all parts.
    #[serde(default)]
    pub train: Option<Vec<Part>>,
    /// Peak learning rates by part, for parts that do not use `learning_rate`.
    #[serde(default)]
    pub learning_rates: BTreeMap<Part, Positive>,
    /// Trains a LoRA adapter instead of the model's weights. Default: no adapter.
    #[serde(default)]
    pub lora: Option<Lora>,
    /// The peak learning rate, reached after warmup.
    #[serde(default = "defaults::learning_rate")]
    pub learning_rate: Positive,
    /// The learning rate schedule after warmup: `cosine` or `linear` decay to 0, or `constant`.
    #[serde(default)]
    pub schedule: Schedule,
    /// The number of passes over the pairs.
    #[serde(default = "defaults::epochs")]
    pub epochs: NonZeroU32,
    /// Pairs per optimizer step. The number of pairs computed at once does not depend on it.
    #[serde(default = "defaults::batch_pairs")]
    pub batch_pairs: NonZeroU32,
    /// Groups pairs of similar length into the same batch.
    #[serde(default)]
    pub group_by_length: bool,
    /// The fraction of the optimizer steps in which the learning rate rises from 0. Default: 0.1.
    #[serde(default)]
    pub warmup_ratio: Option<NonNegative>,
    /// The number of optimizer steps in which the learning rate rises from 0, instead of
    /// `warmup_ratio`.
    #[serde(default)]
    pub warmup_steps: Option<u32>,
    /// The optimizer: `adamw`, or `adamw_8bit`, whose moments take a quarter of the memory.
    #[serde(default)]
    pub optimizer: Optimizer,
    /// The weight decay of AdamW; 0 turns it off.
    #[serde(default = "defaults::weight_decay")]
    pub weight_decay: NonNegative,
    /// The maximum gradient norm: gradients with a larger norm are scaled down to it. 0 turns
    /// clipping off.
    #[serde(default = "defaults::max_grad_norm")]
    pub max_grad_norm: NonNegative,
    /// Activation checkpointing: activations are recomputed in the backward pass instead of saved,
    /// which takes less memory and about a third more time. `always`, `never`, or `auto` (only if
    /// they do not fit in memory).
    #[serde(default)]
    pub activation_checkpointing: Checkpointing,
    /// Optimizer steps between saved training states. An interrupted training resumes from the last
    /// one.
    #[serde(default = "defaults::save_every")]
    pub save_every: NonZeroU32,
    /// The number of saved training states to keep. If the newest cannot be read, training resumes
    /// from the one before.
    #[serde(default = "defaults::keep_last")]
    pub keep_last: NonZeroU32,
}

/// The default values of `dpo_ov7b.sh` and the Hugging Face `Trainer`; `save_every` and `keep_last`
/// are specific to this project.
mod defaults {
    use super::{NonNegative, NonZeroU32, Positive};

    /// The default warmup ratio.
    pub const WARMUP_RATIO: f64 = 0.1;

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

/// The default of `simpo_gamma` in TRL's `CPOConfig`.
const SIMPO_GAMMA: f64 = 0.5;

impl TrainingStage for TrainDpo {
    type Example = Pair;
    type Step = DpoStep;
    const EXAMPLES: &'static str = "pairs";
    const ROLE: ModelRole = ModelRole::LearnsPairs;

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
                warmup: match (self.warmup_steps, self.warmup_ratio) {
                    (Some(steps), _) => Warmup::Steps(steps),
                    (None, Some(ratio)) => Warmup::Ratio(ratio.get()),
                    (None, None) => Warmup::Ratio(defaults::WARMUP_RATIO),
                },
                weight_decay: self.weight_decay,
                max_grad_norm: self.max_grad_norm,
                optimizer: self.optimizer,
            },
        }
    }

    fn also_uses(&self) -> Option<Use<'_>> {
        let (model, state) = self.reference_model()?;
        // At the start of the round, the reference is the model in training, which is used anyway.
        let is_another = state == ModelState::Initial || *model != self.model;
        is_another.then_some(Use {
            field: "reference",
            model,
            role: ModelRole::Reads,
            state,
        })
    }

    fn check(&self) -> Result<(), StageError> {
        self.check_losses()?;
        self.check_parts()
    }

    fn length(&self) -> Option<fn(&Pair) -> usize> {
        fn words(pair: &Pair) -> usize {
            let of = |text: &str| text.split_whitespace().count();
            of(&pair.prompt) + of(&pair.chosen) + of(&pair.rejected)
        }
        self.group_by_length.then_some(words)
    }

    fn before(&self, table: &TableName) -> Option<(TableName, Box<dyn BatchStage + '_>)> {
        self.reference_model()?;
        let name = format!("{table}{REFERENCE}")
            .try_into()
            .expect("a name with a suffix is a name");
        Some((name, Box::new(ReferencePass::new(self))))
    }

    fn before_settings(&self) -> serde_json::Value {
        serde_json::to_value(self.reference_audit).expect("plain data")
    }

    fn begin(
        &self,
        ctx: &mut StageContext<'_>,
        optimization: Optimization,
        before: Option<Lookup>,
    ) -> Result<Box<dyn TrainingRun + '_>, Failure> {
        let settings = self.settings(self.trained(ctx.seed_for("adapter")), optimization);
        let start = self.reference_model().map(|(model, state)| {
            let fingerprint = ctx.models.fingerprint(model, state);
            fingerprint.to_owned()
        });
        let trainer = ctx.models.dpo_trainer(&self.model, &settings)?;
        Ok(Box::new(DpoTraining {
            stage: self,
            reference: start.zip(before),
            trainer,
        }))
    }
}

impl TrainDpo {
    fn settings(&self, trained: Trained, optimization: Optimization) -> DpoSettings {
        DpoSettings {
            objective: Objective {
                terms: self.loss.terms(),
                beta: self.beta.get(),
                label_smoothing: self.label_smoothing.get(),
                simpo_gamma: self.simpo_gamma.map_or(SIMPO_GAMMA, NonNegative::get),
            },
            mask: self.mask,
            newlines: self.newlines,
            trained,
            checkpointing: self.activation_checkpointing,
            optimization,
        }
    }

    /// Returns the memory required to train the model of `config`, with `element` bytes per number
    /// in the compute dtype.
    pub fn sizes(&self, config: &LlavaOnevisionConfig, element: u64) -> TrainingSizes {
        TrainingSizes::new(config, &self.trained(0), self.optimizer, element)
    }

    /// Returns the trained parameters; `seed` initializes a new adapter.
    fn trained(&self, seed: u64) -> Trained {
        if let Some(lora) = &self.lora {
            return Trained::Lora(LoraSettings {
                rank: lora.rank.get() as usize,
                alpha: lora.alpha.get(),
                dropout: lora.dropout.get(),
                targets: lora.targets.clone(),
                seed,
            });
        }
        let parts = self.parts().into_iter();
        let own = |part| self.learning_rates.get(&part).map(|rate| rate.get());
        Trained::Parts(parts.map(|part| (part, own(part))).collect())
    }

    fn parts(&self) -> Vec<Part> {
        let all = || Part::ALL.to_vec();
        self.train.clone().unwrap_or_else(all)
    }

    /// Returns the reference model and its state; `None` without a reference.
    fn reference_model(&self) -> Option<(&ModelName, ModelState)> {
        let asked = || {
            let mut terms = self.loss.terms().into_iter();
            terms.any(|(loss, _)| loss.has_reference())
        };
        match &self.reference {
            None => asked().then_some((&self.model, ModelState::Now)),
            Some(ReferenceModel::None) => None,
            Some(ReferenceModel::RoundStart) => Some((&self.model, ModelState::Now)),
            Some(ReferenceModel::Initial) => Some((&self.model, ModelState::Initial)),
            Some(ReferenceModel::Model(model)) => Some((model, ModelState::Now)),
        }
    }
}

struct DpoTraining<'a> {
    stage: &'a TrainDpo,
    /// The fingerprint of the reference, if there is one, and the log-probabilities computed by the
    /// reference pass.
    reference: Option<(String, Lookup)>,
    trainer: Box<dyn DpoTrainer>,
}

impl TrainingRun for DpoTraining<'_> {
    fn validate(&mut self, ctx: &mut StageContext<'_>, rows: &RecordBatch) -> Result<(), Failure> {
        let pairs = Pair::from_batch(rows)?;
        let prompts = prompts(ctx, &pairs)?;
        let pairs = pairs.iter().zip(&prompts);
        let examples: Vec<_> = pairs
            .map(|(pair, prompt)| example(pair, prompt, None))
            .collect();
        let looked = self.trainer.validate(&examples);
        looked.map_err(Failure::of(&self.stage.model))
    }

    fn plan(&self) -> Option<String> {
        let plan = self.trainer.plan()?;
        Some(format!("{}: {plan}", self.stage.model))
    }

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
        let mut examples = Vec::with_capacity(pairs.len());
        for (pair, prompt) in pairs.iter().zip(&prompts) {
            let reference = match &mut self.reference {
                // Without a reference, both answers are equally likely.
                None => [0.0; 2],
                Some((reference, computed)) => {
                    if let Some(sampled) = self.stage.sampled_reference(pair, reference) {
                        sampled
                    } else {
                        let missing = || {
                            Failure::Other(format!(
                                "pair {} has no reference log-probabilities",
                                pair.row_key
                            ))
                        };
                        let row: Option<Reference> = computed.row(&pair.row_key)?;
                        let row = row.ok_or_else(missing)?;
                        [row.chosen_logp, row.rejected_logp]
                    }
                }
            };
            examples.push(example(pair, prompt, Some(reference)));
        }
        let report = self.trainer.step(&examples);
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

    fn trainer(&mut self) -> &mut dyn Trainer {
        &mut *self.trainer
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::test_pipeline::{FINGERPRINT, TestPipeline, pair, stage};
    use super::*;

    fn train(settings: serde_json::Value) -> TrainDpo {
        let mut all = json!({"pairs": "pairs", "model": "policy", "batch_pairs": 2});
        let given = settings.as_object().unwrap().clone();
        all.as_object_mut().unwrap().extend(given);
        stage(all)
    }

    /// A pair whose answers were sampled from the policy, with one token each.
    fn sampled(prompt_id: &str) -> Pair {
        Pair {
            chosen_token_ids: Some(vec![1]),
            rejected_token_ids: Some(vec![2]),
            chosen_logp: Some(-(16.0_f64.ln())),
            rejected_logp: Some(-(16.0_f64.ln())),
            model: Some(FINGERPRINT.to_owned()),
            ..pair(prompt_id, "So.", "No.")
        }
    }

    #[test]
    fn sampled_and_written_pairs_are_trained_on() {
        let mut pipeline = TestPipeline::new();
        let pairs = [sampled("a"), sampled("b"), pair("c", "So.", "No.")];
        pipeline.table("pairs", &pairs);
        let steps = pipeline
            .train::<DpoStep>(&train(json!({"epochs": 2})))
            .unwrap();
        let numbers: Vec<_> = steps.iter().map(|step| (step.step, step.epoch)).collect();
        assert_eq!(numbers, [(1, 1), (2, 1), (3, 2), (4, 2)]);
        let without = train(json!({"reference": "none", "loss": "simpo"}));
        assert_eq!(pipeline.train::<DpoStep>(&without).unwrap().len(), 2);
    }

    #[test]
    fn the_order_of_the_pairs_depends_on_their_lengths_only_if_asked() {
        let mut pipeline = TestPipeline::new();
        let long = "word ".repeat(40);
        let pairs = [
            pair("a", "So.", "No."),
            pair("b", &long, "No."),
            pair("c", "So.", "No."),
        ];
        pipeline.table("pairs", &pairs);
        let grouped = train(json!({"batch_pairs": 1, "group_by_length": true}));
        let steps = pipeline.train::<DpoStep>(&grouped).unwrap();
        let tokens: Vec<_> = steps.iter().map(|step| step.tokens).collect();
        assert_eq!(tokens, [43, 4, 4]);
    }

    #[test]
    fn a_missing_model_ends_the_training() {
        let mut pipeline = TestPipeline::new();
        pipeline.table("pairs", &[sampled("a")]);
        pipeline.models.is_missing = true;
        let stage = train(json!({"reference_audit": {"share": 0}}));
        let failure = pipeline.train::<DpoStep>(&stage).unwrap_err();
        let expected = "model `policy`: model.safetensors: not found";
        assert_eq!(failure.to_string(), expected);
    }
}
