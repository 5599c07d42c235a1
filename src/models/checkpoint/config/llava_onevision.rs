//! The config of a LLaVA-OneVision checkpoint (transformers, `configuration_llava_onevision.py`).

use std::path::Path;

use serde::Deserialize as _;
use serde_json::Value;

use super::{DecoderConfig, VisionConfig, dtype, eos_token_id, llava_next_tower, not_quantized};
use crate::Layout;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::json::JsonConfig;

/// The config of a LLaVA-OneVision checkpoint, from its `config.json` and `generation_config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct LlavaOnevisionConfig {
    pub layout: Layout,
    pub vision_config: VisionConfig,
    pub text_config: DecoderConfig,
    pub image_token_index: i64,
    pub video_token_index: i64,
    /// For each selected feature (they are concatenated on the channel axis), the number of layers
    /// of the tower that run before it. `-1` in the file is the last layer; there is no
    /// post-layernorm.
    pub vision_feature_layer: Vec<usize>,
    pub multimodal_projector_bias: bool,
    /// Resolutions that a single image may be fitted to, as `[height, width]`.
    pub image_grid_pinpoints: Vec<[usize; 2]>,
    /// The N of `anyres_max_N`: features beyond about N tiles are scaled down.
    pub anyres_max: usize,
    /// True if the head is tied to the embedding, declared at the top level or in `text_config`.
    pub tie_word_embeddings: bool,
    /// `dtype` or `torch_dtype`, if the file has it: the dtype that the weights were saved in.
    pub dtype: Option<String>,
    /// The setting that keeps the model from reading videos, if there is one: LLaVA-NeXT's other
    /// places of newlines, and its fast frames.
    pub no_video: Option<String>,
    /// Tokens that end an answer, from `generation_config.json`; empty if there is no such file.
    pub eos_token_id: Vec<i64>,
}

impl LlavaOnevisionConfig {
    /// Reads `config.json` and, if it exists, `generation_config.json` in `folder`. A config of
    /// LLaVA-NeXT does not contain its tower's sizes: they are taken from the headers of the
    /// weights.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let file = JsonConfig::open(&folder.join("config.json"))?;
        match file.text("model_type")? {
            Some("llava_onevision") => Self::of_transformers(folder, &file),
            Some("llava" | "llava_qwen") => Self::of_llava_next(folder, &file),
            Some(other) => {
                let problem = format!("is `{other}`, expected `llava_onevision` or `llava_qwen`");
                Err(file.fault("model_type", problem))
            }
            None => Err(file.fault("model_type", "is missing, expected `llava_onevision`")),
        }
    }

    fn of_transformers(folder: &Path, file: &JsonConfig) -> Result<Self, CheckpointError> {
        not_quantized(file)?;
        file.only("projector_hidden_act", "gelu")?;
        // "default" would drop the first patch as a class token, which SigLIP does not have.
        file.only("vision_feature_select_strategy", "full")?;
        let vision_config = match file.section("vision_config")? {
            Some(vision) => {
                vision.only("model_type", "siglip_vision_model")?;
                VisionConfig::read(&vision, VisionConfig::SIGLIP)?
            }
            None => VisionConfig::SIGLIP_SO400M,
        };
        let text = match file.section("text_config")? {
            Some(text) => text,
            None => file.empty("text_config"),
        };
        text.only("model_type", "qwen2")?;
        let mut text_config = DecoderConfig::read(&text, DecoderConfig::QWEN2)?;
        let tied =
            text_config.tie_word_embeddings || file.flag("tie_word_embeddings")?.unwrap_or(false);
        text_config.tie_word_embeddings = tied;

        let mut layers = file.integers("vision_feature_layer")?;
        if layers.is_empty() {
            layers.push(-1);
        }
        let token = |index: &str, id: &str, default: i64| {
            let found = match file.integer(index)? {
                Some(found) => found,
                None => file.integer(id)?.unwrap_or(default),
            };
            let known = (0..text_config.vocab_size as i64).contains(&found);
            known.then_some(found).ok_or_else(|| {
                let size = text_config.vocab_size;
                file.fault(
                    index,
                    format!("is {found}, outside the vocabulary of {size}"),
                )
            })
        };
        Ok(Self {
            layout: Layout::Transformers,
            vision_feature_layer: vision_config.layers(file, "vision_feature_layer", &layers)?,
            image_token_index: token("image_token_index", "image_token_id", 151_646)?,
            video_token_index: token("video_token_index", "video_token_id", 151_647)?,
            multimodal_projector_bias: file.flag("multimodal_projector_bias")?.unwrap_or(true),
            image_grid_pinpoints: pinpoints(file, vision_config.image_size)?
                .unwrap_or_else(default_pinpoints),
            anyres_max: anyres_max(file, "vision_aspect_ratio")?,
            tie_word_embeddings: tied,
            dtype: dtype(file)?,
            no_video: None,
            eos_token_id: eos_token_id(folder)?,
            vision_config,
            text_config,
        })
    }

    /// Reads LLaVA-NeXT's `config.json`, which is Qwen2's with additional settings.
    fn of_llava_next(folder: &Path, file: &JsonConfig) -> Result<Self, CheckpointError> {
        not_quantized(file)?;
        file.only("mm_projector_type", "mlp2x_gelu")?;
        file.only("mm_patch_merge_type", "spatial_unpad")?;
        file.only("mm_vision_select_feature", "patch")?;
        for key in [
            "mm_use_im_start_end",
            "mm_use_im_patch_token",
            "use_pos_skipping",
        ] {
            file.only_flag(key, false)?;
        }
        if let Some(kind) = file.text("mm_resampler_type")? {
            return Err(file.fault(
                "mm_resampler_type",
                format!("is `{kind}`, but must be null"),
            ));
        }
        let text_config = DecoderConfig::read(file, DecoderConfig::QWEN2)?;
        let (vision_config, used) = llava_next_tower::read(folder, file)?;
        let side = vision_config.image_size;
        let mut pinpoints = pinpoints(file, side)?
            .ok_or_else(|| file.fault("image_grid_pinpoints", "is missing"))?;
        for pair in &mut pinpoints {
            pair.reverse(); // LLaVA-NeXT has the width first.
        }
        // LLaVA-NeXT never passes the placeholder to the embedding, so any id without a token will
        // do.
        let placeholder = text_config.vocab_size as i64;
        Ok(Self {
            layout: Layout::LlavaNext,
            vision_feature_layer: vec![used],
            image_token_index: file.integer("image_token_index")?.unwrap_or(placeholder),
            video_token_index: placeholder + 1,
            multimodal_projector_bias: true,
            image_grid_pinpoints: pinpoints,
            anyres_max: anyres_max(file, "image_aspect_ratio")?,
            tie_word_embeddings: text_config.tie_word_embeddings,
            dtype: dtype(file)?,
            no_video: no_video(file)?,
            eos_token_id: eos_token_id(folder)?,
            vision_config,
            text_config,
        })
    }

    /// Returns the width of the tower's features at the projector's input.
    pub fn feature_size(&self) -> usize {
        self.vision_config.hidden_size * self.vision_feature_layer.len()
    }
}

/// Returns the setting of LLaVA-NeXT's config that lays out videos in another way than
/// LLaVA-OneVision, if there is one.
fn no_video(file: &JsonConfig) -> Result<Option<String>, CheckpointError> {
    if file.flag("add_faster_video")? == Some(true) {
        return Ok(Some("`add_faster_video` is true".to_owned()));
    }
    let position = file.text("mm_newline_position")?;
    let other = position.filter(|position| *position != "one_token");
    Ok(
        other
            .map(|position| format!("`mm_newline_position` is `{position}`, expected `one_token`")),
    )
}

/// Limits on the number of resolutions and on the length of a side in pixels.
const PINPOINTS_MAX: usize = 1024;
const PINPOINT_SIDE_MAX: usize = 1 << 14;

/// Parses `image_grid_pinpoints`: pairs `[height, width]`, or LLaVA-NeXT's text `(1x1),...,(6x6)`,
/// which means every pair between the first and the last, in tiles of `side` pixels.
pub(crate) fn pinpoints(
    file: &JsonConfig,
    side: usize,
) -> Result<Option<Vec<[usize; 2]>>, CheckpointError> {
    const KEY: &str = "image_grid_pinpoints";
    let pairs: Option<Vec<[usize; 2]>> = match file.get(KEY) {
        None => return Ok(None),
        Some(Value::String(text)) => grid_text(text, side),
        Some(value) => Vec::deserialize(value).ok(),
    };
    let usable = |pairs: &Vec<[usize; 2]>| {
        let mut sides = pairs.as_flattened().iter();
        (1..=PINPOINTS_MAX).contains(&pairs.len())
            && sides.all(|side| (1..=PINPOINT_SIDE_MAX).contains(side))
    };
    let pairs = pairs.filter(usable).ok_or_else(|| {
        let problem = format!(
            "must be a list of at most {PINPOINTS_MAX} pairs [height, width] in pixels, each at most \
             {PINPOINT_SIDE_MAX}, or a string such as `(1x1),...,(6x6)`"
        );
        file.fault(KEY, problem)
    })?;
    Ok(Some(pairs))
}

/// Expands `(1x1),...,(6x6)`.
fn grid_text(text: &str, side: usize) -> Option<Vec<[usize; 2]>> {
    let mut pairs = text
        .split(['(', ')'])
        .filter(|part| part.contains('x'))
        .map(|part| {
            let (height, width) = part.split_once('x')?;
            let in_bounds = |tiles: &usize| *tiles <= PINPOINTS_MAX;
            let number = |text: &str| text.trim().parse::<usize>().ok().filter(in_bounds);
            Some([number(height)?, number(width)?])
        });
    let first = pairs.next()??;
    let last = pairs.next_back()??;
    let rows = first[0]..=last[0];
    Some(
        rows.flat_map(|row| (first[1]..=last[1]).map(move |column| [row * side, column * side]))
            .collect(),
    )
}

/// Returns the 36 default resolutions of `LlavaOnevisionConfig`.
fn default_pinpoints() -> Vec<[usize; 2]> {
    (1..=6)
        .flat_map(|row| (1..=6).map(move |column| [384 * row, 384 * column]))
        .collect()
}

/// Maximum N of `anyres_max_N`.
const ANYRES_MAX: usize = 1000;

/// Parses the N of `anyres_max_N`, the value of `key`.
fn anyres_max(file: &JsonConfig, key: &str) -> Result<usize, CheckpointError> {
    let text = file.text(key)?.unwrap_or("anyres_max_9");
    text.strip_prefix("anyres_max_")
        .and_then(|digits| digits.parse().ok())
        .filter(|tiles| (1..=ANYRES_MAX).contains(tiles))
        .ok_or_else(|| {
            file.fault(
                key,
                format!("is `{text}`, expected `anyres_max_N` with N from 1 to {ANYRES_MAX}"),
            )
        })
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "numbers are read, not computed")]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::test_util::{onevision_config, write};

    fn read(config: &Value) -> Result<LlavaOnevisionConfig, CheckpointError> {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "config.json", config);
        LlavaOnevisionConfig::open(folder.path())
    }

    fn diagnostic(change: impl FnOnce(&mut Value)) -> String {
        let mut config = onevision_config();
        change(&mut config);
        read(&config).expect_err("refused").to_string()
    }

    #[test]
    fn what_transformers_leaves_out_has_the_defaults_of_its_classes() {
        let config = json!({
            "model_type": "llava_onevision",
            "vision_config": {"image_size": 384, "patch_size": 14},
            "text_config": {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2,
                            "rope_theta": 1e6}
        });
        let model_config = read(&config).unwrap();
        assert_eq!(
            model_config.text_config,
            DecoderConfig {
                hidden_size: 896,
                num_attention_heads: 14,
                num_key_value_heads: 2,
                head_dim: 64,
                rope_theta: 1e6,
                ..DecoderConfig::QWEN2
            }
        );
        assert_eq!(model_config.vision_config.hidden_size, 768);
        assert_eq!(model_config.vision_config.patches(), 729);
        assert_eq!(
            (
                model_config.image_token_index,
                model_config.video_token_index
            ),
            (151_646, 151_647)
        );
        assert_eq!(model_config.vision_feature_layer, [12]);
        assert_eq!(model_config.image_grid_pinpoints.len(), 36);
        assert_eq!(model_config.image_grid_pinpoints[7], [768, 768]);
        assert!(model_config.multimodal_projector_bias && !model_config.tie_word_embeddings);
        assert_eq!(model_config.anyres_max, 9);
    }

    #[test]
    fn no_vision_config_means_so400m() {
        let model_config = read(&json!({"model_type": "llava_onevision"})).unwrap();
        assert_eq!(model_config.vision_config, VisionConfig::SIGLIP_SO400M);
    }

    #[test]
    fn both_spellings_of_the_rotary_base_are_read() {
        let mut config = onevision_config();
        assert_eq!(read(&config).unwrap().text_config.rope_theta, 1e6);
        config["text_config"]["rope_parameters"] = Value::Null;
        config["text_config"]["rope_theta"] = json!(5e5);
        assert_eq!(read(&config).unwrap().text_config.rope_theta, 5e5);
        let scaled = diagnostic(|config| {
            config["text_config"]["rope_scaling"] = json!({"type": "yarn", "factor": 4.0});
        });
        assert!(
            scaled.contains("`text_config.rope_scaling.type` is `yarn`"),
            "{scaled}"
        );
    }

    #[test]
    fn the_head_is_tied_if_either_level_says_so() {
        let mut config = onevision_config();
        config["text_config"]["tie_word_embeddings"] = json!(true);
        assert!(read(&config).unwrap().tie_word_embeddings);
        config["text_config"]["tie_word_embeddings"] = json!(false);
        config["tie_word_embeddings"] = json!(true);
        let model_config = read(&config).unwrap();
        assert!(model_config.tie_word_embeddings && model_config.text_config.tie_word_embeddings);
    }

    #[test]
    fn feature_layers_may_be_several_and_count_from_either_end() {
        let mut config = onevision_config();
        config["vision_feature_layer"] = json!([-2, 1, -1]);
        let model_config = read(&config).unwrap();
        assert_eq!(model_config.vision_feature_layer, [2, 1, 3]);
        assert_eq!(model_config.feature_size(), 24);
        let beyond = diagnostic(|config| config["vision_feature_layer"] = json!(-5));
        assert!(
            beyond.contains("refers to layer -5, but the tower has 3 layers"),
            "{beyond}"
        );
    }

    #[test]
    fn pinpoints_may_be_the_text_of_llava_next() {
        let mut config = onevision_config();
        let pairs = read(&config).unwrap().image_grid_pinpoints;
        config["image_grid_pinpoints"] = json!("(1x1),...,(6x6)");
        assert_eq!(read(&config).unwrap().image_grid_pinpoints, pairs);
        let empty = diagnostic(|config| config["image_grid_pinpoints"] = json!([]));
        assert!(empty.contains("`image_grid_pinpoints` must be"), "{empty}");
    }

    #[test]
    fn both_names_of_dtype_and_of_the_image_token_are_read() {
        let mut config = onevision_config();
        config["torch_dtype"] = json!("float16");
        assert_eq!(read(&config).unwrap().dtype.as_deref(), Some("float16"));
        config["dtype"] = json!("bfloat16");
        assert_eq!(read(&config).unwrap().dtype.as_deref(), Some("bfloat16"));
        config["image_token_index"] = Value::Null;
        config["image_token_id"] = json!(255);
        assert_eq!(read(&config).unwrap().image_token_index, 255);
    }

    #[test]
    fn one_or_several_end_tokens_are_read() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "config.json", &onevision_config());
        assert!(
            LlavaOnevisionConfig::open(folder.path())
                .unwrap()
                .eos_token_id
                .is_empty()
        );
        write(
            folder.path(),
            "generation_config.json",
            &json!({"eos_token_id": [259, 257]}),
        );
        assert_eq!(
            LlavaOnevisionConfig::open(folder.path())
                .unwrap()
                .eos_token_id,
            [259, 257]
        );
    }

    #[test]
    fn other_models_are_refused_by_name() {
        let other = diagnostic(|config| config["model_type"] = json!("llava_next"));
        assert!(
            other.contains("`model_type` is `llava_next`, expected `llava_onevision`"),
            "{other}"
        );
    }

    #[test]
    fn what_the_network_can_not_do_is_refused() {
        type Change = fn(&mut Value);
        let changes: [(Change, &str); 6] = [
            (
                |c| c["text_config"]["use_sliding_window"] = json!(true),
                "use_sliding_window",
            ),
            (
                |c| c["text_config"]["layer_types"] = json!(["sliding_attention"]),
                "layer_types",
            ),
            (
                |c| c["text_config"]["num_key_value_heads"] = json!(3),
                "num_key_value_heads",
            ),
            (
                |c| c["vision_config"]["num_attention_heads"] = json!(3),
                "num_attention_heads",
            ),
            (
                |c| c["vision_config"]["hidden_act"] = json!("gelu"),
                "vision_config.hidden_act",
            ),
            (|c| c["quantization_config"] = json!({}), "quantized"),
        ];
        for (change, key) in changes {
            let found = diagnostic(change);
            assert!(
                found.contains("config.json: ") && found.contains(key),
                "{found}"
            );
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let missing = LlavaOnevisionConfig::open(folder.path()).unwrap_err();
        assert!(missing.path.ends_with("config.json"));
        assert!(missing.problem.contains("cannot be read"));
    }
}
