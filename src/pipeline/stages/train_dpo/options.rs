//! The settings of `train_dpo` that are more than a number, and what they say against each other.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use schemars::JsonSchema;
use serde::de::value::MapAccessDeserializer;
use serde::de::{IntoDeserializer, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::super::{ModelName, Positive, Share, StageError};
use super::TrainDpo;
use ovchat_models::{Loss, Part};

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
    /// The losses with their weights.
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

impl TrainDpo {
    /// What losses and their settings say against each other.
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
    pub fn check_parts(&self) -> Result<(), StageError> {
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
}

/// A value as a pipeline file spells it.
fn word(value: &impl Serialize) -> String {
    let value = serde_json::to_value(value).expect("plain data");
    value.as_str().unwrap_or_default().to_owned()
}
