//! Conversion of LLaVA-OneVision checkpoints between the layouts of transformers and LLaVA-NeXT.
//!
//! The layouts differ in the names of the tensors; in the config (LLaVA-NeXT's is Qwen2's with
//! additional settings, and only names its tower); in the placeholder tokens `<image>` and
//! `<video>`, which only transformers' tokenizer has; and in the image processor and chat template,
//! which only transformers reads from files. The conversion follows transformers'
//! `convert_llava_onevision_weights_to_hf.py` (4.45), and adds the way back.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::Layout;
use crate::architectures::{self, llava_onevision};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::{KNOWN_TOWERS, LlavaOnevisionConfig, VisionConfig};
use crate::checkpoint::json::JsonConfig;
use crate::checkpoint::names::stored;
use crate::preprocess::ImageProcessorConfig;
use crate::preprocess::Processor;

/// The placeholders of transformers' tokenizer, in the order of their ids.
const PLACEHOLDERS: [&str; 2] = ["<image>", "<video>"];

/// The decoder settings that have the same name in both programs.
const DECODER: [&str; 19] = [
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "max_window_layers",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "sliding_window",
    "tie_word_embeddings",
    "use_cache",
    "use_sliding_window",
    "vocab_size",
];

/// Files that only one of the programs reads, or that repeat what other files contain.
const LEFT_OUT: [&str; 6] = [
    "added_tokens.json",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
];

/// The chat template that the converter writes.
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}\
{% endif %}{{ '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// A plan for converting a checkpoint to another layout.
#[derive(Debug, Clone)]
pub struct Conversion {
    to: Layout,
    /// Files to write instead of copying them, by name relative to the folder.
    pub files: Vec<(&'static str, String)>,
    /// Rows that the embedding and the head need. If there are fewer, rows are added for the
    /// placeholders; no network ever uses their values.
    pub vocab_size: usize,
    /// Number of layers of the tower that are kept.
    tower_layers: usize,
}

impl Conversion {
    /// Plans the conversion of the checkpoint in `folder` to the layout `to`; `None` if it already
    /// has that layout.
    pub fn of(folder: &Path, to: Layout) -> Result<Option<Self>, CheckpointError> {
        if architectures::name_of(folder)? != llava_onevision::NAME {
            let problem = "is not a LLaVA-OneVision checkpoint; only those have two layouts";
            return Err(CheckpointError::new(folder, problem));
        }
        // Reads all files, which validates the checkpoint before it is converted.
        Processor::open(folder)?;
        let config = LlavaOnevisionConfig::open(folder)?;
        if config.layout == to {
            return Ok(None);
        }
        let old = Old::open(folder, config)?;
        match to {
            Layout::Transformers => old.for_transformers(),
            Layout::LlavaNext => old.for_llava_next(),
        }
        .map(Some)
    }

    /// Returns the converted name of the tensor with this canonical name; `None` if it is dropped.
    pub fn name(&self, canonical: &str) -> Option<String> {
        let layer = canonical.strip_prefix("vision_tower.encoder.layers.");
        let number = layer.and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        let is_kept = number.is_none_or(|number| number < self.tower_layers);
        is_kept.then(|| stored(canonical, self.to))
    }

    /// True if a file other than the weights is copied to the new folder unchanged.
    pub fn keeps(&self, file: &str) -> bool {
        let is_replaced = self.files.iter().any(|(name, _)| *name == file);
        !is_replaced && !LEFT_OUT.contains(&file) && file != "chat_template.jinja"
    }
}

/// The files of a checkpoint that the conversion rewrites.
struct Old<'a> {
    folder: &'a Path,
    model_config: LlavaOnevisionConfig,
    config: JsonConfig,
    tokenizer: Map<String, Value>,
    tokenizer_config: Map<String, Value>,
}

impl<'a> Old<'a> {
    fn open(folder: &'a Path, model_config: LlavaOnevisionConfig) -> Result<Self, CheckpointError> {
        let tokenizer_config = folder.join("tokenizer_config.json");
        let tokenizer_config = if tokenizer_config.exists() {
            JsonConfig::open(&tokenizer_config)?.into_map()
        } else {
            Map::new()
        };
        Ok(Self {
            folder,
            config: JsonConfig::open(&folder.join("config.json"))?,
            tokenizer: JsonConfig::open(&folder.join("tokenizer.json"))?.into_map(),
            tokenizer_config,
            model_config,
        })
    }

    fn for_transformers(mut self) -> Result<Conversion, CheckpointError> {
        let ids = self.add_placeholders();
        let rows = self.model_config.text_config.vocab_size;
        // Padded as the converter does, unless there is room already.
        let vocab_size = if ids[1] < rows {
            rows
        } else {
            (rows.max(ids[0]) + PLACEHOLDERS.len()).next_multiple_of(64)
        };
        let class = json!("Processor");
        self.tokenizer_config
            .insert("processor_class".to_owned(), class);
        let images = self.processor_part(json!({
            "do_pad": true,
            "image_grid_pinpoints": self.model_config.image_grid_pinpoints,
            "image_processor_type": "LlavaOnevisionImageProcessor",
        }));
        let video = self.processor_part(json!({
            "video_processor_type": "LlavaOnevisionVideoProcessor",
        }));
        let mut files = vec![
            (
                "config.json",
                text_of(&self.transformers_config(ids, vocab_size)),
            ),
            ("tokenizer.json", text_of(&self.tokenizer)),
            ("tokenizer_config.json", text_of(&self.tokenizer_config)),
            ("preprocessor_config.json", text_of(&images)),
            ("video_preprocessor_config.json", text_of(&video)),
            ("processor_config.json", text_of(&self.processor_config())),
            ("chat_template.jinja", CHAT_TEMPLATE.to_owned()),
        ];
        if !self.folder.join("generation_config.json").exists() {
            let stops = self.config.integers("eos_token_id")?;
            files.push((
                "generation_config.json",
                text_of(&json!({ "eos_token_id": stops })),
            ));
        }
        Ok(Conversion {
            to: Layout::Transformers,
            files,
            vocab_size,
            tower_layers: self.model_config.vision_config.num_hidden_layers,
        })
    }

    /// Returns `config.json` of transformers; `ids` are those of the placeholders.
    fn transformers_config(&self, ids: [usize; 2], vocab_size: usize) -> Value {
        let model_config = &self.model_config;
        let mut text = decoder_settings(&self.config);
        text.insert("model_type".to_owned(), json!("qwen2"));
        text.insert(
            "rope_theta".to_owned(),
            json!(model_config.text_config.rope_theta),
        );
        text.insert("vocab_size".to_owned(), json!(vocab_size));
        let stored = model_config.vision_config.num_hidden_layers;
        // The last layer is -1, as in the checkpoints of llava-hf.
        let layer = match model_config.vision_feature_layer[0] {
            used if used == stored => -1,
            used => used as i64,
        };
        json!({
            "architectures": ["LlavaOnevisionForConditionalGeneration"],
            "dtype": model_config.dtype,
            "image_grid_pinpoints": model_config.image_grid_pinpoints,
            "image_token_index": ids[0],
            "model_type": "llava_onevision",
            "multimodal_projector_bias": true,
            "projector_hidden_act": "gelu",
            "text_config": text,
            "tie_word_embeddings": model_config.tie_word_embeddings,
            "torch_dtype": model_config.dtype,
            "use_image_newline_parameter": true,
            "video_token_index": ids[1],
            "vision_aspect_ratio": format!("anyres_max_{}", model_config.anyres_max),
            "vision_config": tower_config(&model_config.vision_config, stored),
            "vision_feature_layer": layer,
            "vision_feature_select_strategy": "full",
        })
    }

    /// Returns `processor_config.json` of transformers.
    fn processor_config(&self) -> Value {
        json!({
            "image_token": PLACEHOLDERS[0],
            "num_image_tokens": self.model_config.vision_config.patches(),
            "processor_class": "Processor",
            "video_token": PLACEHOLDERS[1],
            "vision_aspect_ratio": format!("anyres_max_{}", self.model_config.anyres_max),
            "vision_feature_select_strategy": "full",
        })
    }

    /// Returns the settings of transformers' image or video processor: the common ones, and `more`.
    fn processor_part(&self, more: Value) -> Value {
        let side = self.model_config.vision_config.image_size;
        let mut settings = json!({
            "do_convert_rgb": true,
            "do_normalize": true,
            "do_rescale": true,
            "do_resize": true,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "Processor",
            "resample": 3,
            "rescale_factor": 1.0 / 255.0,
            "size": { "height": side, "width": side },
        });
        if let (Value::Object(settings), Value::Object(more)) = (&mut settings, more) {
            settings.extend(more);
        }
        settings
    }

    fn for_llava_next(mut self) -> Result<Conversion, CheckpointError> {
        let used = self.check_for_llava_next()?;
        // LLaVA-NeXT drops the last layer of the tower that it loads.
        let tower = VisionConfig {
            num_hidden_layers: used + 1,
            ..self.model_config.vision_config
        };
        let known = KNOWN_TOWERS.iter().find(|(_, known)| *known == tower);
        let tower_name =
            known.map_or_else(|| "siglip".to_owned(), |(name, _)| format!("google/{name}"));
        let text = self.config.section("text_config")?;
        let text = text.unwrap_or_else(|| self.config.empty("text_config"));
        let mut config = decoder_settings(&text);
        config.extend(self.llava_next_settings(&tower, &tower_name));
        self.remove_placeholders();
        self.tokenizer_config.remove("processor_class");
        let mut files = vec![
            ("config.json", text_of(&config)),
            ("tokenizer.json", text_of(&self.tokenizer)),
            ("tokenizer_config.json", text_of(&self.tokenizer_config)),
        ];
        if known.is_none() {
            // For a tower that LLaVA-NeXT cannot load by name: its sizes, for this program to read.
            files.push((
                "siglip/config.json",
                text_of(&tower_config(&tower, used + 1)),
            ));
        }
        Ok(Conversion {
            to: Layout::LlavaNext,
            files,
            vocab_size: self.model_config.text_config.vocab_size,
            tower_layers: used,
        })
    }

    /// Fails if the model has a setting that LLaVA-NeXT does not support. Returns the layer of the
    /// tower whose features it uses.
    fn check_for_llava_next(&self) -> Result<usize, CheckpointError> {
        let model_config = &self.model_config;
        let refuse = |key: &str, problem: &str| {
            let problem = format!("{problem}, the only value that LLaVA-NeXT supports");
            Err(self.config.fault(key, problem))
        };
        let [used] = model_config.vision_feature_layer[..] else {
            return refuse("vision_feature_layer", "must be one layer");
        };
        if !model_config.multimodal_projector_bias {
            return refuse("multimodal_projector_bias", "must be true");
        }
        let side = model_config.vision_config.image_size;
        let processor = ImageProcessorConfig::open_onevision(self.folder, side)?;
        let fixed = ImageProcessorConfig::of_llava_next(side);
        if (processor.image_mean, processor.image_std) != (fixed.image_mean, fixed.image_std) {
            return refuse(
                "image_mean",
                "and `image_std` of the image processor must be 0.5",
            );
        }
        Ok(used)
    }

    /// Returns the settings that every `config.json` of LLaVA-NeXT has.
    fn llava_next_settings(&self, tower: &VisionConfig, tower_name: &str) -> Map<String, Value> {
        let model_config = &self.model_config;
        let decoder = &model_config.text_config;
        let pinpoints = model_config.image_grid_pinpoints.iter();
        // LLaVA-NeXT has the width first.
        let pinpoints: Vec<_> = pinpoints.map(|[height, width]| [width, height]).collect();
        let Value::Object(settings) = json!({
            "architectures": ["LlavaQwenForCausalLM"],
            "model_type": "llava_qwen",
            "hidden_size": decoder.hidden_size,
            "intermediate_size": decoder.intermediate_size,
            "max_position_embeddings": decoder.max_position_embeddings,
            "num_attention_heads": decoder.num_attention_heads,
            "num_hidden_layers": decoder.num_hidden_layers,
            "num_key_value_heads": decoder.num_key_value_heads,
            "rms_norm_eps": decoder.rms_norm_eps,
            "rope_scaling": null,
            "rope_theta": decoder.rope_theta,
            "tie_word_embeddings": model_config.tie_word_embeddings,
            "vocab_size": decoder.vocab_size,
            "image_aspect_ratio": format!("anyres_max_{}", model_config.anyres_max),
            "image_crop_resolution": null,
            "image_grid_pinpoints": pinpoints,
            "image_split_resolution": null,
            "mm_hidden_size": tower.hidden_size,
            "mm_newline_position": "one_token",
            "mm_patch_merge_type": "spatial_unpad",
            "mm_projector_type": "mlp2x_gelu",
            "mm_resampler_type": null,
            "mm_spatial_pool_mode": "bilinear",
            "mm_use_im_patch_token": false,
            "mm_use_im_start_end": false,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": tower_name,
            "tokenizer_model_max_length": decoder.max_position_embeddings,
            "tokenizer_padding_side": "right",
            "torch_dtype": model_config.dtype,
            "use_mm_proj": true,
            "use_pos_skipping": false,
        }) else {
            unreachable!("an object was written");
        };
        settings
    }

    /// Adds missing placeholders to the tokenizer, after its last token; returns the ids of both.
    fn add_placeholders(&mut self) -> [usize; 2] {
        let mut next = 1 + highest_id(&self.tokenizer);
        PLACEHOLDERS.map(|token| {
            let added = self.tokenizer.entry("added_tokens");
            let added = added.or_insert_with(|| json!([])).as_array_mut();
            let added = added.expect("the tokenizer was opened");
            if let Some(known) = added.iter().find(|known| known["content"] == token) {
                return known["id"].as_u64().unwrap_or_default() as usize;
            }
            let id = next;
            next += 1;
            let mut entry = json!({
                "content": token, "lstrip": false, "normalized": false, "rstrip": false,
                "single_word": false, "special": true,
            });
            let decoder = self.tokenizer_config.entry("added_tokens_decoder");
            if let Some(decoder) = decoder.or_insert_with(|| json!({})).as_object_mut() {
                decoder.insert(id.to_string(), entry.clone());
            }
            entry["id"] = json!(id);
            added.push(entry);
            id
        })
    }

    /// Removes the placeholders from the tokenizer if they are its last tokens, so that no gap is
    /// left; LLaVA-NeXT replaces `<image>` in a text before it is tokenized.
    fn remove_placeholders(&mut self) {
        let is_placeholder = |content: &Value| PLACEHOLDERS.iter().any(|token| content == *token);
        let Some(Value::Array(added)) = self.tokenizer.get_mut("added_tokens") else {
            return;
        };
        added.sort_by_key(|token| token["id"].as_u64());
        let kept = added
            .iter()
            .rposition(|token| !is_placeholder(&token["content"]));
        added.truncate(kept.map_or(0, |last| last + 1));
        let left: Vec<Value> = added.iter().map(|token| token["content"].clone()).collect();
        let is_gone = |content: &Value| is_placeholder(content) && !left.contains(content);
        let settings = &mut self.tokenizer_config;
        if let Some(Value::Object(decoder)) = settings.get_mut("added_tokens_decoder") {
            decoder.retain(|_, token| !is_gone(&token["content"]));
        }
        for list in ["additional_special_tokens", "extra_special_tokens"] {
            match settings.get_mut(list) {
                Some(Value::Array(tokens)) => tokens.retain(|token| !is_gone(token)),
                Some(Value::Object(tokens)) => tokens.retain(|_, token| !is_gone(token)),
                _ => {}
            }
        }
    }
}

/// Returns the highest token id of a tokenizer.
fn highest_id(tokenizer: &Map<String, Value>) -> usize {
    let vocab = tokenizer
        .get("model")
        .and_then(|model| model["vocab"].as_object());
    let of_text = vocab
        .into_iter()
        .flatten()
        .filter_map(|(_, id)| id.as_u64());
    let added = tokenizer.get("added_tokens").and_then(Value::as_array);
    let added = added
        .into_iter()
        .flatten()
        .filter_map(|token| token["id"].as_u64());
    of_text.chain(added).max().unwrap_or_default() as usize
}

/// Returns the decoder settings that the file contains.
fn decoder_settings(file: &JsonConfig) -> Map<String, Value> {
    let there = DECODER
        .into_iter()
        .filter_map(|key| Some((key, file.get(key)?)));
    there
        .map(|(key, value)| (key.to_owned(), value.clone()))
        .collect()
}

/// Returns the `SiglipVisionConfig` of a tower with `layers` layers.
fn tower_config(model_config: &VisionConfig, layers: usize) -> Value {
    json!({
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": model_config.hidden_size,
        "image_size": model_config.image_size,
        "intermediate_size": model_config.intermediate_size,
        "layer_norm_eps": model_config.layer_norm_eps,
        "model_type": "siglip_vision_model",
        "num_attention_heads": model_config.num_attention_heads,
        "num_channels": model_config.num_channels,
        "num_hidden_layers": layers,
        "patch_size": model_config.patch_size,
        "vision_use_head": false,
    })
}

fn text_of(json: &impl serde::Serialize) -> String {
    let mut text = serde_json::to_string_pretty(json).expect("plain data");
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;
    use crate::checkpoint::canonical;
    use crate::test_util::{onevision_folder, shard, write};

    /// Writes the converted files of `folder` and headers of the tensors, as a converter would.
    fn convert(folder: &Path, to: Layout) -> (TempDir, Conversion) {
        let conversion = Conversion::of(folder, to).unwrap().unwrap();
        let new = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(folder).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let is_copied = conversion.keeps(&name) && folder.join(&name).is_file();
            if is_copied && !name.ends_with("safetensors") {
                fs::copy(folder.join(&name), new.path().join(&name)).unwrap();
            }
        }
        for (name, text) in &conversion.files {
            let path = new.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let model_config = LlavaOnevisionConfig::open(folder).unwrap();
        let tensors = model_config
            .tensors()
            .into_iter()
            .filter_map(|(name, mut shape)| {
                if shape[0] == model_config.text_config.vocab_size {
                    shape[0] = conversion.vocab_size;
                }
                Some((conversion.name(&name)?, shape))
            });
        let tensors: Vec<_> = tensors.collect();
        let tensors: Vec<_> = tensors
            .iter()
            .map(|(name, shape)| (name.as_str(), shape.as_slice()))
            .collect();
        shard(&new.path().join("model.safetensors"), &tensors);
        (new, conversion)
    }

    fn json_of(folder: &Path, name: &str) -> Value {
        serde_json::from_slice(&fs::read(folder.join(name)).unwrap()).unwrap()
    }

    /// Opens the whole checkpoint and returns its config.
    fn open(folder: &Path) -> LlavaOnevisionConfig {
        Processor::open(folder).unwrap();
        LlavaOnevisionConfig::open(folder).unwrap()
    }

    #[test]
    fn there_and_back_is_the_same_model() {
        let folder = onevision_folder();
        let old = open(folder.path());
        assert!(
            Conversion::of(folder.path(), Layout::Transformers)
                .unwrap()
                .is_none()
        );

        let (next, conversion) = convert(folder.path(), Layout::LlavaNext);
        let of_next = open(next.path());
        assert_eq!(of_next.layout, Layout::LlavaNext);
        let [mut one, mut other] = [&old, &of_next].map(Clone::clone);
        // The programs count the placeholders differently, and LLaVA-NeXT states the dtype.
        for model_config in [&mut one, &mut other] {
            model_config.layout = Layout::LlavaNext;
            (
                model_config.image_token_index,
                model_config.video_token_index,
            ) = (0, 0);
        }
        assert_eq!(one, other);
        assert_eq!(
            conversion.name("image_newline").unwrap(),
            "model.image_newline"
        );
        assert!(!next.path().join("preprocessor_config.json").exists());
        let tokens = json_of(next.path(), "tokenizer.json")["added_tokens"].clone();
        assert_eq!(tokens.as_array().unwrap().len(), 3, "{tokens}");

        let (back, conversion) = convert(next.path(), Layout::Transformers);
        let mut back_again = open(back.path());
        assert_eq!(conversion.vocab_size, 264, "there was room");
        assert_eq!(
            (back_again.image_token_index, back_again.video_token_index),
            (260, 261)
        );
        back_again.layout = old.layout;
        assert_eq!(back_again, old);
        let name = "vision_tower.encoder.layers.2.mlp.fc1.bias";
        let stored = conversion.name(name).unwrap();
        assert_eq!(
            stored,
            "vision_tower.vision_model.encoder.layers.2.mlp.fc1.bias"
        );
        assert_eq!(canonical(&stored), name);
    }

    #[test]
    fn rows_are_added_where_the_placeholders_find_no_room() {
        let folder = onevision_folder();
        let (next, _) = convert(folder.path(), Layout::LlavaNext);
        let mut config = json_of(next.path(), "config.json");
        config["vocab_size"] = json!(260);
        write(next.path(), "config.json", &config);
        let conversion = Conversion::of(next.path(), Layout::Transformers)
            .unwrap()
            .unwrap();
        assert_eq!(conversion.vocab_size, 320);
        let (_, config) = &conversion.files[0];
        let config: Value = serde_json::from_str(config).unwrap();
        assert_eq!(config["text_config"]["vocab_size"], 320);
        assert_eq!(config["image_token_index"], 260);
    }

    #[test]
    fn a_layer_behind_the_features_is_left_out_for_llava_next() {
        let folder = onevision_folder();
        let mut config = json_of(folder.path(), "config.json");
        config["vision_feature_layer"] = json!(-2);
        write(folder.path(), "config.json", &config);
        let (next, conversion) = convert(folder.path(), Layout::LlavaNext);
        assert_eq!(
            conversion.name("vision_tower.encoder.layers.2.mlp.fc1.bias"),
            None
        );
        let model_config = LlavaOnevisionConfig::open(next.path()).unwrap();
        assert_eq!(
            (
                model_config.vision_config.num_hidden_layers,
                model_config.vision_feature_layer
            ),
            (2, vec![2])
        );
    }

    #[test]
    fn what_llava_next_does_not_know_is_refused() {
        let folder = onevision_folder();
        let mut config = json_of(folder.path(), "config.json");
        config["vision_feature_layer"] = json!([-2, -1]);
        write(folder.path(), "config.json", &config);
        let refused = Conversion::of(folder.path(), Layout::LlavaNext)
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("`vision_feature_layer` must be one layer"),
            "{refused}"
        );
    }
}
