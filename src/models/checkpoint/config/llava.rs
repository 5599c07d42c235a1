//! The config of a LLaVA-1.5 checkpoint in the layout of transformers (`configuration_llava.py`).

use std::path::Path;

use super::{DecoderConfig, VisionConfig, eos_token_id, not_quantized};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::json::JsonConfig;

/// The config of a LLaVA-1.5 checkpoint, from its `config.json` and `generation_config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct LlavaConfig {
    pub vision_config: VisionConfig,
    pub text_config: DecoderConfig,
    pub image_token_index: i64,
    /// For each selected feature (they are concatenated on the channel axis), the number of layers
    /// of the tower that run before it. There is no post-layernorm.
    pub vision_feature_layer: Vec<usize>,
    /// True if the class token is dropped (`vision_feature_select_strategy: default`).
    pub drops_class_token: bool,
    pub multimodal_projector_bias: bool,
    /// Tokens that end an answer, from `generation_config.json`; empty if there is no such file.
    pub eos_token_id: Vec<i64>,
}

impl LlavaConfig {
    /// Reads `config.json` and, if it exists, `generation_config.json` in `folder`.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let file = JsonConfig::open(&folder.join("config.json"))?;
        not_quantized(&file)?;
        file.only("projector_hidden_act", "gelu")?;
        let vision_config = match file.section("vision_config")? {
            Some(vision) => {
                vision.only("model_type", "clip_vision_model")?;
                VisionConfig::read(&vision, VisionConfig::CLIP)?
            }
            None => VisionConfig::CLIP_LARGE_336,
        };
        let text = match file.section("text_config")? {
            Some(text) => text,
            None => file.empty("text_config"),
        };
        text.only("model_type", "llama")?;
        let mut text_config = DecoderConfig::read(&text, DecoderConfig::LLAMA)?;
        text_config.tie_word_embeddings |= file.flag("tie_word_embeddings")?.unwrap_or(false);
        let mut layers = file.integers("vision_feature_layer")?;
        if layers.is_empty() {
            layers.push(-2);
        }
        let key = "vision_feature_select_strategy";
        let drops_class_token = match file.text(key)? {
            None | Some("default") => true,
            Some("full") => false,
            Some(other) => {
                let problem = format!("is `{other}`, expected `default` or `full`");
                return Err(file.fault(key, problem));
            }
        };
        let image_token_index = match file.integer("image_token_index")? {
            Some(found) => found,
            None => file.integer("image_token_id")?.unwrap_or(32_000),
        };
        if !(0..text_config.vocab_size as i64).contains(&image_token_index) {
            let size = text_config.vocab_size;
            let problem = format!("is {image_token_index}, outside the vocabulary of {size}");
            return Err(file.fault("image_token_index", problem));
        }
        Ok(Self {
            vision_feature_layer: vision_config.layers(&file, "vision_feature_layer", &layers)?,
            image_token_index,
            drops_class_token,
            multimodal_projector_bias: file.flag("multimodal_projector_bias")?.unwrap_or(true),
            eos_token_id: eos_token_id(folder)?,
            vision_config,
            text_config,
        })
    }

    /// Returns the number of layers of the tower that run.
    pub fn tower_layers(&self) -> usize {
        self.vision_feature_layer.iter().max().copied().unwrap_or(0)
    }

    /// Returns the width of the tower's features at the projector's input.
    pub fn feature_size(&self) -> usize {
        self.vision_config.hidden_size * self.vision_feature_layer.len()
    }

    /// Returns the number of features of an image.
    pub fn image_tokens(&self) -> usize {
        self.vision_config.patches() + usize::from(!self.drops_class_token)
    }
}
