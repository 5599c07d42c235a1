//! The settings of `train_dpo`, and their validation against each other.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::{ModelName, ModelState, NonNegative, Positive, Share, StageError, TableName};
use super::options::{Lora, LossSum, ReferenceAudit, ReferenceModel};
use ovchat_models::checkpoint::TrainingSizes;
use ovchat_models::{
    Architecture, Checkpointing, DpoSettings, LoraSettings, Loss, Mask, Newlines, Objective,
    Optimization, Optimizer, Part, Schedule, Trained,
};

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

impl TrainDpo {
    /// Returns the settings of the trainer.
    pub(super) fn settings(&self, trained: Trained, optimization: Optimization) -> DpoSettings {
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

    /// Returns the memory required to train a model of `architecture`, with `element` bytes per number
    /// in the compute dtype.
    pub fn sizes(&self, architecture: &dyn Architecture, element: u64) -> TrainingSizes {
        TrainingSizes::new(architecture, &self.trained(0), self.optimizer, element)
    }

    /// Returns the trained parameters; `seed` initializes a new adapter.
    pub(super) fn trained(&self, seed: u64) -> Trained {
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
    pub fn reference_model(&self) -> Option<(&ModelName, ModelState)> {
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

    /// Validates the losses and their settings against each other.
    pub fn check_losses(&self) -> Result<(), StageError> {
        let terms = self.loss.terms();
        let refuse = |field, message: String, help: &str| Err(StageError::at(field, message, help));
        if terms.is_empty() {
            let message = "no loss is given".to_owned();
            return refuse("loss", message, "the default is `sigmoid`");
        }
        let smoothing = self.label_smoothing.get();
        let needs = |loss: &Loss| matches!(loss, Loss::ExoPair | Loss::Robust);
        if smoothing == 0.0
            && let Some((loss, _)) = terms.iter().find(|(loss, _)| needs(loss))
        {
            let message = format!(
                "the loss `{}` requires a `label_smoothing` above 0",
                word(loss)
            );
            return refuse(
                "loss",
                message,
                "set it to the expected fraction of flipped labels, e.g. 0.1",
            );
        }
        if smoothing >= 0.5 {
            let message = format!(
                "{smoothing} is too high: with half of the labels flipped, the pairs carry no signal"
            );
            return refuse("label_smoothing", message, "set it below 0.5");
        }
        if smoothing > 0.0 && !terms.iter().any(|(loss, _)| loss.has_smoothing()) {
            let with = Loss::ALL.iter().filter(|loss| loss.has_smoothing());
            let with: Vec<String> = with.map(|loss| format!("`{}`", word(loss))).collect();
            let message = "`label_smoothing` has no effect on these losses".to_owned();
            let help = format!("remove it, or use one of {}", with.join(", "));
            return refuse("label_smoothing", message, &help);
        }
        let has_simpo = terms.iter().any(|(loss, _)| *loss == Loss::Simpo);
        if self.simpo_gamma.is_some() && !has_simpo {
            let message = "`simpo_gamma` only applies to the loss `simpo`".to_owned();
            return refuse("simpo_gamma", message, "remove it, or use `simpo`");
        }
        let asked = terms.iter().any(|(loss, _)| loss.has_reference());
        let is_given = self
            .reference
            .as_ref()
            .is_some_and(|reference| *reference != ReferenceModel::None);
        if is_given && !asked {
            let message = "none of the losses uses a reference".to_owned();
            return refuse("reference", message, "remove it");
        }
        Ok(())
    }

    /// Validates the settings of parts, adapter and warmup against each other.
    pub fn check_parts(&self) -> Result<(), StageError> {
        let refuse = |field, message: String, help: &str| Err(StageError::at(field, message, help));
        if self.lora.is_some() && self.train.is_some() {
            let message = "`train` conflicts with `lora`, which trains the adapter only".to_owned();
            return refuse("train", message, "remove one of the two");
        }
        if self.train.as_ref().is_some_and(Vec::is_empty) {
            let message = "no part is listed, so nothing would be trained".to_owned();
            return refuse("train", message, "list parts, or remove it to train all");
        }
        if self
            .lora
            .as_ref()
            .is_some_and(|lora| lora.targets.is_empty())
        {
            let message = "`targets` is empty, so the adapter has no effect".to_owned();
            return refuse(
                "lora",
                message,
                "remove `targets` to adapt all linear layers",
            );
        }
        let is_trained = |part: &&Part| self.lora.is_none() && self.parts().contains(*part);
        if let Some(part) = self.learning_rates.keys().find(|part| !is_trained(part)) {
            let message = format!(
                "`{}` is not trained, so its learning rate has no effect",
                word(part)
            );
            return refuse("learning_rates", message, "remove it, or train the part");
        }
        if self.warmup_ratio.is_some() && self.warmup_steps.is_some() {
            let message = "`warmup_steps` conflicts with `warmup_ratio`".to_owned();
            return refuse("warmup_steps", message, "remove one of the two");
        }
        Ok(())
    }
}

/// Returns a value as it is written in a pipeline file.
fn word(value: &impl Serialize) -> String {
    let value = serde_json::to_value(value).expect("plain data");
    value.as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::super::test_pipeline::stage;
    use super::*;

    fn train(settings: serde_json::Value) -> TrainDpo {
        let mut all = json!({"pairs": "pairs", "model": "policy"});
        let given = settings.as_object().unwrap().clone();
        all.as_object_mut().unwrap().extend(given);
        stage(all)
    }

    #[test]
    fn a_loss_is_a_name_or_a_weighted_sum() {
        assert_eq!(train(json!({})).loss.terms(), [(Loss::Sigmoid, 1.0)]);
        let sum = train(json!({"loss": {"sigmoid": 1, "sft": 0.2}}));
        let mut terms = sum.loss.terms();
        terms.sort_by(|a, b| a.1.total_cmp(&b.1));
        assert_eq!(terms, [(Loss::Sft, 0.2), (Loss::Sigmoid, 1.0)]);
    }

    #[test]
    fn settings_that_contradict_each_other_are_refused() {
        for (settings, field) in [
            (json!({"loss": {}}), "loss"),
            (json!({"loss": "robust"}), "loss"),
            (json!({"label_smoothing": 0.5}), "label_smoothing"),
            (
                json!({"loss": "hinge", "label_smoothing": 0.1}),
                "label_smoothing",
            ),
            (json!({"simpo_gamma": 0.5}), "simpo_gamma"),
            (
                json!({"loss": "simpo", "reference": "initial"}),
                "reference",
            ),
        ] {
            let error = train(settings.clone()).check_losses().unwrap_err();
            assert_eq!(error.field, Some(field), "{settings}: {error}");
        }
        for (settings, field) in [
            (json!({"lora": {}, "train": ["language_model"]}), "train"),
            (json!({"train": []}), "train"),
            (json!({"lora": {"targets": []}}), "lora"),
            (
                json!({"lora": {}, "learning_rates": {"vision_tower": 1e-6}}),
                "learning_rates",
            ),
            (
                json!({"warmup_ratio": 0.1, "warmup_steps": 10}),
                "warmup_steps",
            ),
        ] {
            let error = train(settings.clone()).check_parts().unwrap_err();
            assert_eq!(error.field, Some(field), "{settings}: {error}");
        }
        let fine = train(json!({"loss": "robust", "label_smoothing": 0.1, "warmup_steps": 10}));
        assert_eq!((fine.check_losses(), fine.check_parts()), (Ok(()), Ok(())));
    }
}
