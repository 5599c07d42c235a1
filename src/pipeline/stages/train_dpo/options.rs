//! The structured settings of `train_dpo`, and the validation of its settings against each other.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use schemars::JsonSchema;
use serde::de::value::MapAccessDeserializer;
use serde::de::{IntoDeserializer, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::super::{ModelName, Positive, Share, StageError};
use super::TrainDpo;
use ovchat_models::{Loss, Part};

/// A loss, or a weighted sum of losses.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum LossSum {
    One(Loss),
    Several(BTreeMap<Loss, Positive>),
}

/// Implemented by hand, because serde's error for an untagged enum does not name the problem.
impl<'de> Deserialize<'de> for LossSum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrSeveral;
        impl<'de> Visitor<'de> for OneOrSeveral {
            type Value = LossSum;

            fn expecting(&self, text: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                text.write_str(
                    "the name of a loss, or losses with weights such as `{ sigmoid: 1, sft: 0.2 }`",
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
    /// Returns the losses with their weights.
    pub fn terms(&self) -> Vec<(Loss, f64)> {
        match self {
            Self::One(loss) => vec![(*loss, 1.0)],
            Self::Several(terms) => {
                let terms = terms.iter();
                terms.map(|(loss, weight)| (*loss, weight.get())).collect()
            }
        }
    }
}

/// The reference model of a training stage.
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

/// The audit of the log-probabilities that were recorded during sampling.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ReferenceAudit {
    /// The share of pairs whose log-probabilities are recomputed, chosen by a hash of their keys.
    pub share: Share,
    /// The maximum difference of an answer's recorded and recomputed log-probabilities, in nats per
    /// token. Training fails above it.
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

/// A LoRA adapter of the language model. Later rounds continue to train the same adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Lora {
    /// The rank of the adapter's matrices.
    pub rank: NonZeroU32,
    /// The scaling numerator: the product of the matrices is scaled by `alpha / rank`.
    pub alpha: Positive,
    /// The dropout probability of the adapter's inputs; 0 turns it off.
    pub dropout: Share,
    /// The linear layers of the language model that get an adapter, by module name. Default: all.
    pub targets: Vec<String>,
}

/// The rank and alpha of LLaVA-NeXT, without its dropout of 0.05.
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

impl TrainDpo {
    /// Validates the losses and their settings against each other.
    pub fn check_losses(&self) -> Result<(), StageError> {
        let terms = self.loss.terms();
        let refuse = |field, message: String, help: &str| {
            Err(StageError {
                field: Some(field),
                message,
                help: Some(help.to_owned()),
            })
        };
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
        let refuse = |field, message: String, help: &str| {
            Err(StageError {
                field: Some(field),
                message,
                help: Some(help.to_owned()),
            })
        };
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
