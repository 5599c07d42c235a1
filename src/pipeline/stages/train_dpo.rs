//! `train_dpo`: one training of a model on pairs, with direct preference optimization or a relative.

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

/// What the name of a training's table of reference log-probabilities ends with.
pub const REFERENCE: &str = "_reference";

/// Trains a model on pairs with DPO or one of its relatives. The defaults are those of the document's
/// training script: every weight, the sigmoid loss, and for reference the model as it is at the start
/// of the round.
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
    /// What is made small: a loss by its name, or several with their weights, as in
    /// `{ sigmoid: 1, sft: 0.2 }`.
    #[serde(default)]
    pub loss: LossSum,
    /// How strongly the reference holds the model.
    #[serde(default = "defaults::beta")]
    pub beta: Positive,
    /// The share of pairs that are assumed to be the wrong way round; `exo_pair` and `robust` need
    /// it.
    #[serde(default)]
    pub label_smoothing: Share,
    /// The margin that the loss `simpo` asks for. Left out: 0.5.
    #[serde(default)]
    pub simpo_gamma: Option<NonNegative>,
    /// What the model is compared with: `round_start` (itself at the start of the round), `initial`
    /// (itself before the first round), `none`, or the name of another model. Left out:
    /// `round_start`, or `none` where no loss asks for one.
    #[serde(default)]
    pub reference: Option<ReferenceModel>,
    /// Where sampling left the log-probabilities of the reference: how many of them are computed
    /// again, and how far they may be off.
    #[serde(default)]
    pub reference_audit: ReferenceAudit,
    /// Which tokens count: `answer`, or the conventions `trl` and `llava_next`, to compare with runs
    /// of those programs.
    #[serde(default)]
    pub mask: Mask,
    /// Newlines between a picture and the text: `one`, as in sampling, or `two`, as LLaVA-NeXT's DPO
    /// script has them.
    #[serde(default)]
    pub newlines: Newlines,
    /// The parts that are trained. Left out: all.
    #[serde(default)]
    pub train: Option<Vec<Part>>,
    /// Highest learning rates of parts that have another than `learning_rate`.
    #[serde(default)]
    pub learning_rates: BTreeMap<Part, Positive>,
    /// Trains an adapter in the place of weights.
    #[serde(default)]
    pub lora: Option<Lora>,
    /// The highest learning rate, reached after warmup.
    #[serde(default = "defaults::learning_rate")]
    pub learning_rate: Positive,
    /// What the learning rate does after warmup: falls to 0 along a `cosine` or in a `linear` way, or
    /// is `constant`.
    #[serde(default)]
    pub schedule: Schedule,
    /// Passes over the pairs.
    #[serde(default = "defaults::epochs")]
    pub epochs: NonZeroU32,
    /// Pairs per optimizer update. How many are computed at once does not depend on it.
    #[serde(default = "defaults::batch_pairs")]
    pub batch_pairs: NonZeroU32,
    /// Puts pairs of similar length into a batch.
    #[serde(default)]
    pub group_by_length: bool,
    /// Share of the updates in which the learning rate rises from 0. Left out: 0.1.
    #[serde(default)]
    pub warmup_ratio: Option<NonNegative>,
    /// The same as a number of updates.
    #[serde(default)]
    pub warmup_steps: Option<u32>,
    /// `adamw`, or `adamw_8bit`, whose moments take a quarter of the memory.
    #[serde(default)]
    pub optimizer: Optimizer,
    /// AdamW's weight decay.
    #[serde(default = "defaults::weight_decay")]
    pub weight_decay: NonNegative,
    /// Gradients with a larger norm are scaled down to it; 0 never clips.
    #[serde(default = "defaults::max_grad_norm")]
    pub max_grad_norm: NonNegative,
    /// Whether activations are computed again for the gradients instead of being remembered, which
    /// takes less memory and a third more time: `always`, `never`, or (`auto`) when they don't fit.
    #[serde(default)]
    pub activation_checkpointing: Checkpointing,
    /// Updates between two saved states; a killed training goes on at the last one.
    #[serde(default = "defaults::save_every")]
    pub save_every: NonZeroU32,
    /// Saved states that are kept; where the newest can't be read, the training goes on from the one
    /// before.
    #[serde(default = "defaults::keep_last")]
    pub keep_last: NonZeroU32,
}

/// `dpo_ov7b.sh` and the Hugging Face trainer's own defaults; `save_every` and
/// `keep_last` are ours.
mod defaults {
    use super::{NonNegative, NonZeroU32, Positive};

    /// The share of warmup where nothing is said.
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

/// SimPO's margin in TRL's `CPOConfig`.
const SIMPO_GAMMA: f64 = 0.5;

impl TrainingStage for TrainDpo {
    type Example = Pair;
    type Step = DpoStep;
    const LESSONS: &'static str = "pairs";
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
        // At the start of the round it is the model in training, which is used in any case.
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

    /// What it takes of memory to train the model of `config`, whose numbers take `element` bytes where
    /// they are computed with.
    pub fn sizes(&self, config: &LlavaOnevisionConfig, element: u64) -> TrainingSizes {
        TrainingSizes::new(config, &self.trained(0), self.optimizer, element)
    }

    /// What is trained; `seed` is for a fresh adapter.
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

    /// The model that is the reference, and which of its states; `None` where there is none.
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
    /// The fingerprint of the reference, if there is one, and the log-probabilities that had to be
    /// computed with it.
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
                // Without a reference everything is equally likely to it.
                None => [0.0; 2],
                Some((reference, computed)) => {
                    if let Some(sampled) = self.stage.sampled_reference(pair, reference) {
                        sampled
                    } else {
                        let missing =
                            || Failure::Other(format!("pair {} has no reference", pair.row_key));
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
