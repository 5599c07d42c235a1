//! The structured settings of `train_dpo`.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use schemars::JsonSchema;
use serde::de::value::MapAccessDeserializer;
use serde::de::{IntoDeserializer, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::super::{ModelName, Positive, Share};
use ovchat_models::Loss;

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
