//! `train_dpo`: one training of a model on pairs, with direct preference optimization or a relative.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::time::Instant;

use arrow::array::RecordBatch;
use schemars::JsonSchema;
use serde::de::value::MapAccessDeserializer;
use serde::de::{IntoDeserializer, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::training::{Course, Recipe, Trains, Warmup, example, prompts};
use super::{
    Failure, Map, MapWork, ModelName, ModelState, NonNegative, Outcome, Positive, Role, Scope,
    Share, StageError, TableName, Task, Training, Use, shown,
};
use crate::models::{
    Checkpointing, DpoLearner, DpoSettings, Learner, LoraSettings, Loss, Mask, Newlines, Objective,
    Optimization, Optimizer, Part, Schedule, Trained,
};
use crate::prep::{OnevisionCard, TrainingSizes};
use crate::store::{Key, Lookup};
use crate::tables::{DpoStep, Pair, Reference, Row};

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
}

/// A loss, or several with their weights.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum LossSum {
    One(Loss),
    Several(BTreeMap<Loss, Positive>),
}

/// By hand, because serde does not say what is wrong with a value that may be one of two things.
impl<'de> Deserialize<'de> for LossSum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrSeveral;
        impl<'de> Visitor<'de> for OneOrSeveral {
            type Value = LossSum;

            fn expecting(&self, text: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                text.write_str(
                    "the name of a loss, or names with weights as in `{ sigmoid: 1, sft: 0.2 }`",
                )
            }
            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<LossSum, E> {
                Loss::deserialize(name.into_deserializer()).map(LossSum::One)
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<LossSum, A::Error> {
                BTreeMap::deserialize(MapAccessDeserializer::new(map)).map(LossSum::Several)
            }
        }
        deserializer.deserialize_any(OneOrSeveral)
    }
}

impl Default for LossSum {
    fn default() -> Self {
        Self::One(Loss::Sigmoid)
    }
}

impl LossSum {
    fn terms(&self) -> Vec<(Loss, f64)> {
        match self {
            Self::One(loss) => vec![(*loss, 1.0)],
            Self::Several(terms) => {
                let terms = terms.iter();
                terms.map(|(loss, weight)| (*loss, weight.get())).collect()
            }
        }
    }
}

/// What a model in training is compared with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ReferenceModel {
    RoundStart,
    Initial,
    None,
    Model(ModelName),
}

impl TryFrom<String> for ReferenceModel {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Ok(match text.as_str() {
            "round_start" => Self::RoundStart,
            "initial" => Self::Initial,
            "none" => Self::None,
            _ => Self::Model(text.try_into()?),
        })
    }
}

impl From<ReferenceModel> for String {
    fn from(reference: ReferenceModel) -> Self {
        match reference {
            ReferenceModel::RoundStart => "round_start".to_owned(),
            ReferenceModel::Initial => "initial".to_owned(),
            ReferenceModel::None => "none".to_owned(),
            ReferenceModel::Model(model) => model.to_string(),
        }
    }
}

impl JsonSchema for ReferenceModel {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Reference".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "examples": ["round_start", "initial", "none"]
        })
    }
}

/// How far the log-probabilities that sampling left are trusted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ReferenceAudit {
    /// The share of pairs whose log-probabilities are computed again, drawn by their names.
    pub share: Share,
    /// How far an answer's log-probability may be off, per token; beyond it nothing is trained.
    pub drift_max: Positive,
}

impl Default for ReferenceAudit {
    fn default() -> Self {
        Self {
            share: 0.02.try_into().expect("a share"),
            drift_max: 0.05.try_into().expect("positive"),
        }
    }
}

/// A LoRA adapter to the language model. Once there is one, later rounds go on with it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Lora {
    /// The rank of its matrices.
    pub rank: NonZeroU32,
    /// Their product is scaled by `alpha / rank`.
    pub alpha: Positive,
    /// The share of its inputs that is set to zero at random.
    pub dropout: Share,
    /// The linear layers of the language model that it is added to.
    pub targets: Vec<String>,
}

/// LLaVA-NeXT's own rank and alpha, without its dropout of 0.05.
impl Default for Lora {
    fn default() -> Self {
        let targets = [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ];
        Self {
            rank: const { NonZeroU32::new(64).unwrap() },
            alpha: 16.0.try_into().expect("positive"),
            dropout: Share::default(),
            targets: targets.map(str::to_owned).to_vec(),
        }
    }
}

/// `dpo_ov7b.sh` and the Hugging Face trainer's own defaults; `save_every` is ours.
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
    pub fn save_every() -> NonZeroU32 {
        const { NonZeroU32::new(100).unwrap() }
    }
}

/// SimPO's margin in TRL's `CPOConfig`.
const SIMPO_GAMMA: f64 = 0.5;

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
            group_by_length: self.group_by_length,
            recipe: Recipe {
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
            role: Role::Reads,
            state,
        })
    }

    fn check(&self) -> Result<(), StageError> {
        self.check_losses()?;
        self.check_parts()
    }

    fn words(pair: &Pair) -> usize {
        let of = |text: &str| text.split_whitespace().count();
        of(&pair.prompt) + of(&pair.chosen) + of(&pair.rejected)
    }

    fn before(&self, table: &TableName) -> Option<(TableName, Box<dyn MapWork + '_>)> {
        self.reference_model()?;
        let name = format!("{table}_reference")
            .try_into()
            .expect("a name with a suffix is a name");
        let pass = ReferencePass {
            stage: self,
            learner: RefCell::new(None),
        };
        Some((name, Box::new(pass)))
    }

    fn before_settings(&self) -> serde_json::Value {
        serde_json::to_value(self.reference_audit).expect("plain data")
    }

    fn begin(
        &self,
        scope: &mut Scope<'_>,
        optimization: Optimization,
        before: Option<Lookup>,
    ) -> Result<Box<dyn Training + '_>, Failure> {
        let settings = self.settings(self.trained(scope.seed_for("adapter")), optimization);
        let start = self.reference_model().map(|(model, state)| {
            let fingerprint = scope.models.fingerprint(model, state);
            fingerprint.to_owned()
        });
        let learner = scope.models.dpo_learner(&self.model, &settings)?;
        Ok(Box::new(DpoTraining {
            stage: self,
            reference: start.zip(before),
            learner,
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

    /// What it takes of memory to train the model of `card`, whose numbers take `element` bytes where
    /// they are computed with.
    pub fn sizes(&self, card: &OnevisionCard, element: u64) -> TrainingSizes {
        TrainingSizes::new(card, &self.trained(0), self.optimizer, element)
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

    /// What losses and their settings say against each other.
    fn check_losses(&self) -> Result<(), StageError> {
        let terms = self.loss.terms();
        let refuse = |field, message: String, help: &str| {
            Err(StageError {
                field: Some(field),
                message,
                help: Some(help.to_owned()),
            })
        };
        if terms.is_empty() {
            let message = "no loss is named, so there is nothing to make small".to_owned();
            return refuse("loss", message, "the usual one is `sigmoid`");
        }
        let smoothing = self.label_smoothing.get();
        let needs = |loss: &Loss| matches!(loss, Loss::ExoPair | Loss::Robust);
        if smoothing == 0.0
            && let Some((loss, _)) = terms.iter().find(|(loss, _)| needs(loss))
        {
            let message = format!(
                "the loss `{}` needs a `label_smoothing` above 0",
                word(loss)
            );
            return refuse(
                "loss",
                message,
                "give the share of wrong labels, such as 0.1",
            );
        }
        if smoothing >= 0.5 {
            let message = format!("with {smoothing} of the labels wrong, nothing can be learned");
            return refuse("label_smoothing", message, "give a share below 0.5");
        }
        if smoothing > 0.0 && !terms.iter().any(|(loss, _)| loss.has_smoothing()) {
            let with = Loss::ALL.iter().filter(|loss| loss.has_smoothing());
            let with: Vec<String> = with.map(|loss| format!("`{}`", word(loss))).collect();
            let message = "`label_smoothing` has no part in these losses".to_owned();
            let help = format!("leave it out, or use one of {}", with.join(", "));
            return refuse("label_smoothing", message, &help);
        }
        let has_simpo = terms.iter().any(|(loss, _)| *loss == Loss::Simpo);
        if self.simpo_gamma.is_some() && !has_simpo {
            let message = "only the loss `simpo` has such a margin".to_owned();
            return refuse("simpo_gamma", message, "leave it out, or use `simpo`");
        }
        let asked = terms.iter().any(|(loss, _)| loss.has_reference());
        let is_given = self
            .reference
            .as_ref()
            .is_some_and(|reference| *reference != ReferenceModel::None);
        if is_given && !asked {
            let message = "none of the losses asks for a reference".to_owned();
            return refuse("reference", message, "leave it out");
        }
        Ok(())
    }

    /// What is said of parts, adapter and warmup against each other.
    fn check_parts(&self) -> Result<(), StageError> {
        let refuse = |field, message: String, help: &str| {
            Err(StageError {
                field: Some(field),
                message,
                help: Some(help.to_owned()),
            })
        };
        if self.lora.is_some() && self.train.is_some() {
            let message = "with `lora` an adapter is trained, and nothing else".to_owned();
            return refuse("train", message, "leave out one of the two");
        }
        if self.train.as_ref().is_some_and(Vec::is_empty) {
            let message = "nothing would be trained".to_owned();
            return refuse("train", message, "name parts, or leave it out to train all");
        }
        if self
            .lora
            .as_ref()
            .is_some_and(|lora| lora.targets.is_empty())
        {
            let message = "an adapter without `targets` changes nothing".to_owned();
            return refuse(
                "lora",
                message,
                "leave `targets` out to adapt all linear layers",
            );
        }
        let is_trained = |part: &&Part| self.lora.is_none() && self.parts().contains(*part);
        if let Some(part) = self.learning_rates.keys().find(|part| !is_trained(part)) {
            let message = format!("`{}` is not trained, so it needs no rate", word(part));
            return refuse("learning_rates", message, "leave it out, or train the part");
        }
        if self.warmup_ratio.is_some() && self.warmup_steps.is_some() {
            let message = "`warmup_ratio` says the same".to_owned();
            return refuse("warmup_steps", message, "leave out one of the two");
        }
        Ok(())
    }

    /// The reference log-probabilities that sampling left, if the model that answered is the
    /// reference, and what was asked and answered is all that counts.
    fn sampled_reference(&self, pair: &Pair, reference: &str) -> Option<[f64; 2]> {
        let as_sampled = pair.chosen_token_ids.is_some() && pair.rejected_token_ids.is_some();
        let same_model = pair.model.as_deref() == Some(reference);
        let same_tokens = (self.mask, self.newlines) == (Mask::Answer, Newlines::One);
        (as_sampled && same_model && same_tokens).then_some(())?;
        Some([pair.chosen_logp?, pair.rejected_logp?])
    }

    /// Whether what sampling left for a pair is computed again.
    fn is_audited(&self, pair: &Pair) -> bool {
        let draw = Key::new("audit").with(&pair.row_key).finish_u64();
        (draw as f64) < self.reference_audit.share.get() * 2f64.powi(64)
    }

    /// How far the two log-probabilities of a pair are apart, per token.
    fn drift(pair: &Pair, [sampled, found]: [[f64; 2]; 2]) -> f64 {
        let tokens = [&pair.chosen_token_ids, &pair.rejected_token_ids]
            .map(|ids| ids.as_ref().map_or(1, |ids| ids.len().max(1)) as f64);
        let apart = |side: usize| (sampled[side] - found[side]).abs() / tokens[side];
        apart(0).max(apart(1))
    }
}

/// A value as a pipeline file spells it.
fn word(value: &impl Serialize) -> String {
    let value = serde_json::to_value(value).expect("plain data");
    value.as_str().unwrap_or_default().to_owned()
}

struct DpoTraining<'a> {
    stage: &'a TrainDpo,
    /// The fingerprint of the reference, if there is one, and the log-probabilities that had to be
    /// computed with it.
    reference: Option<(String, Lookup)>,
    learner: Box<dyn DpoLearner>,
}

impl Training for DpoTraining<'_> {
    fn look_over(&mut self, scope: &mut Scope<'_>, rows: &RecordBatch) -> Result<(), Failure> {
        let pairs = Pair::from_batch(rows)?;
        let prompts = prompts(scope, &pairs)?;
        let pairs = pairs.iter().zip(&prompts);
        let examples: Vec<_> = pairs
            .map(|(pair, prompt)| example(pair, prompt, None))
            .collect();
        let looked = self.learner.look_over(&examples);
        looked.map_err(Failure::of(&self.stage.model))
    }

    fn plan(&self) -> Option<String> {
        let plan = self.learner.plan()?;
        Some(format!("{}: {plan}", self.stage.model))
    }

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
            key = key.with([u8::from(self.stage.is_audited(pair))]);
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
        let stage = self.stage;
        let (model, state) = stage.reference_model().expect("made only with a reference");
        let reference = scope.models.fingerprint(model, state).to_owned();
        let mut outcomes = Vec::with_capacity(tasks.len());
        let mut learner = self.learner.borrow_mut();
        let mut done = 0;
        for task in tasks {
            let is_open = |pair: &&Pair| {
                stage.sampled_reference(pair, &reference).is_none() || stage.is_audited(pair)
            };
            let pairs: Vec<Pair> = task.rows.iter().filter(is_open).cloned().collect();
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
                    let optimization = stage.course().recipe.optimization(1);
                    let settings = stage.settings(Trained::Parts(Vec::new()), optimization);
                    *learner = Some(scope.models.reference(model, state, &settings)?);
                }
                let learner = learner.as_mut().expect("just opened");
                let logps = learner
                    .reference_logps(&examples)
                    .map_err(Failure::of(model))?;
                for (pair, found) in pairs.iter().zip(logps) {
                    let sampled = stage.sampled_reference(pair, &reference);
                    let drift = sampled.map(|sampled| TrainDpo::drift(pair, [sampled, found]));
                    let drift_max = stage.reference_audit.drift_max.get();
                    if let Some(drift) = drift.filter(|&drift| drift > drift_max) {
                        return Err(Failure::Other(format!(
                            "the log-probabilities that sampling left for pair {} are {drift:.4} a \
                             token off what the reference says now ({sampled:?} and {found:?}), and \
                             `reference_audit.drift_max` is {drift_max}; sample with the precision \
                             and on the device of the training, or allow more",
                            pair.row_key,
                        )));
                    }
                    rows.push(Reference {
                        row_key: task.key.clone(),
                        pair: pair.row_key.clone(),
                        prompt_id: pair.prompt_id.clone(),
                        chosen_logp: found[0],
                        rejected_logp: found[1],
                        model: reference.clone(),
                        drift,
                    });
                }
            }
            done += task.rows.len() as u64;
            (scope.progress)(done);
            outcomes.push(Outcome::Made(rows));
        }
        Ok(outcomes)
    }
}
