//! The configs of a LLaVA-RLHF reward model's three folders.
//!
//! `base` is a LLaVA folder (Llama and a projector), `vision` a CLIP folder, `adapter` a peft LoRA
//! folder with the file `reward_head` in it (github llava-rlhf/LLaVA-RLHF,
//! `RLHF/models/reward_model.py`). Fields are named as in the files.

use std::path::{Path, PathBuf};

use super::{DecoderConfig, VisionConfig, dtype};
use crate::LlavaRlhfSpec;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::json::JsonConfig;

/// The config of a LoRA adapter, from `adapter_config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// The folder with `adapter_config.json` and the adapter's weights: the given folder, or
    /// `adapter_model/`, or `adapter_model/lora_default/` in it, as in training checkpoints.
    pub folder: PathBuf,
    /// LoRA rank.
    pub r: usize,
    /// LoRA alpha: the update is scaled by `lora_alpha / r` (by `lora_alpha / sqrt(r)` with
    /// `use_rslora`).
    pub lora_alpha: f64,
    pub use_rslora: bool,
    /// Names of the adapted linear layers, such as `q_proj`. Empty if the file has a pattern; the
    /// tensors then determine the layers.
    pub target_modules: Vec<String>,
}

impl AdapterConfig {
    /// Finds and reads `adapter_config.json` below `folder`.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let mut place = folder.to_owned();
        for inner in ["adapter_model", "lora_default"] {
            if place.join(inner).is_dir() {
                place.push(inner);
            }
        }
        let file = JsonConfig::open(&place.join("adapter_config.json"))?;
        file.only("peft_type", "LORA")?;
        file.only("bias", "none")?;
        file.only_flag("fan_in_fan_out", false)?;
        file.only_flag("use_dora", false)?;
        for key in ["modules_to_save", "layers_to_transform"] {
            if file.get(key).is_some() {
                return Err(file.fault(key, "is set, which is not supported"));
            }
        }
        for key in ["rank_pattern", "alpha_pattern"] {
            let pattern = file.get(key).and_then(serde_json::Value::as_object);
            if pattern.is_some_and(|pattern| !pattern.is_empty()) {
                return Err(file.fault(key, "is set, which is not supported"));
            }
        }
        let targets = file.get("target_modules").and_then(|value| {
            if value.is_string() {
                return Some(Vec::new());
            }
            let names = value.as_array()?.iter();
            names
                .map(|name| Some(name.as_str()?.to_owned()))
                .collect::<Option<Vec<String>>>()
        });
        let needed = |key| file.fault(key, "is missing");
        Ok(Self {
            r: file.size("r")?.ok_or_else(|| needed("r"))?,
            lora_alpha: file
                .number("lora_alpha")?
                .ok_or_else(|| needed("lora_alpha"))?,
            use_rslora: file.flag("use_rslora")?.unwrap_or(false),
            target_modules: targets.ok_or_else(|| {
                file.fault("target_modules", "must be a list of names or a pattern")
            })?,
            folder: place,
        })
    }

    /// Returns the factor of `lora_B @ lora_A` when it is added to the weight.
    pub fn scale(&self) -> f64 {
        let rank = self.r as f64;
        self.lora_alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }
}

/// The config of a LLaVA-RLHF reward model, from its config files.
#[derive(Debug, Clone, PartialEq)]
pub struct LlavaRlhfConfig {
    /// Llama, from the base folder.
    pub text_config: DecoderConfig,
    /// CLIP.
    pub vision_config: VisionConfig,
    /// Number of layers of CLIP that run before the feature is taken (`mm_vision_select_layer`
    /// counts from the end; -2 skips the last layer). There is no post-layernorm, and the class
    /// token is dropped.
    pub mm_vision_select_layer: usize,
    /// The adapter; `None` if none is trained yet.
    pub adapter: Option<AdapterConfig>,
    /// The dtype of the base's weights, if the file has it.
    pub dtype: Option<String>,
}

impl LlavaRlhfConfig {
    /// Reads the config files of the three folders; the adapter's is optional.
    pub fn open(spec: &LlavaRlhfSpec) -> Result<Self, CheckpointError> {
        let base = JsonConfig::open(&spec.base.join("config.json"))?;
        // Both projectors of LLaVA are supported; the names of the tensors tell them apart.
        base.only("mm_vision_select_feature", "patch")?;
        base.only("image_aspect_ratio", "pad")?;
        let vision = JsonConfig::open(&spec.vision.join("config.json"))?;
        // A complete CLIP config (`CLIPModel`) nests the tower's config; that of `CLIPVisionModel`
        // does not.
        let vision = match vision.section("vision_config")? {
            Some(nested) => nested,
            None => vision,
        };
        vision.only("model_type", "clip_vision_model")?;
        let vision_config = VisionConfig::read(&vision, VisionConfig::CLIP)?;
        let key = "mm_vision_select_layer";
        let index = base.integer(key)?.unwrap_or(-2);
        let mm_vision_select_layer = vision_config.layers(&base, key, &[index])?[0];
        Ok(Self {
            text_config: DecoderConfig::read(&base, DecoderConfig::LLAMA)?,
            vision_config,
            mm_vision_select_layer,
            adapter: spec
                .adapter
                .as_deref()
                .map(AdapterConfig::open)
                .transpose()?,
            dtype: dtype(&base)?,
        })
    }
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "numbers are read, not computed")]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::test_util::{reward_folder, write};

    #[test]
    fn the_three_folders_are_read_together() {
        let (_folder, spec) = reward_folder();
        let config = LlavaRlhfConfig::open(&spec).unwrap();
        assert_eq!(config.text_config.num_key_value_heads, 2);
        assert_eq!(config.text_config.rms_norm_eps, 1e-5);
        assert!(!config.text_config.qkv_bias);
        assert_eq!(config.vision_config.layer_norm_eps, 1e-5);
        assert_eq!(config.vision_config.patches(), 16);
        assert_eq!(config.mm_vision_select_layer, 3);
        let adapter = config.adapter.unwrap();
        assert_eq!(adapter.scale(), 0.25);
        assert_eq!(adapter.target_modules, ["q_proj", "v_proj"]);
        assert_eq!(config.dtype.as_deref(), Some("bfloat16"));
    }

    #[test]
    fn a_training_checkpoint_has_its_adapter_two_folders_deeper() {
        let (_folder, spec) = reward_folder();
        let adapter = spec.adapter.unwrap();
        let inner = adapter.join("adapter_model/lora_default");
        std::fs::create_dir_all(&inner).unwrap();
        let settings =
            json!({"r": 4, "lora_alpha": 8, "use_rslora": true, "target_modules": ["q_proj"]});
        write(&inner, "adapter_config.json", &settings);
        let config = AdapterConfig::open(&adapter).unwrap();
        assert_eq!(config.folder, inner);
        assert_eq!(config.scale(), 4.0);
    }

    #[test]
    fn an_adapter_that_does_more_than_lora_is_refused() {
        let (_folder, spec) = reward_folder();
        let settings =
            json!({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_dora": true});
        let adapter = spec.adapter.as_deref().unwrap();
        write(adapter, "adapter_config.json", &settings);
        let diagnostic = LlavaRlhfConfig::open(&spec).unwrap_err().to_string();
        assert!(
            diagnostic.contains("adapter_config.json: `use_dora` is true"),
            "{diagnostic}"
        );
    }
}
