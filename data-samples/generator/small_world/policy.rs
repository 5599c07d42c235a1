//! The policy: a LLaVA-OneVision checkpoint with random weights, as transformers 5 writes it.
//!
//! The code that reads it also reads the 7B model; only the numbers differ. Linear layers use
//! LeCun's initialization, so that images affect the output from the start.

use std::path::Path;

use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::files::{self, Outcome};
use super::tensors::Tensors;
use super::tokenizers::{self as vocabularies, QWEN2_SPECIAL, id};

// The decoder (Qwen2).
const HIDDEN: usize = 96;
const INTERMEDIATE: usize = 256;
const LAYERS: usize = 3;
const HEADS: usize = 4;
const KEY_VALUE_HEADS: usize = 2;
const CONTEXT: usize = 2048;

// The vision tower (SigLIP).
const VISION_HIDDEN: usize = 96;
const VISION_INTERMEDIATE: usize = 192;
const VISION_LAYERS: usize = 3;
const VISION_HEADS: usize = 4;
const TILE: usize = 56;
const PATCH: usize = 14;

/// Tiles along a side of the largest grid.
const GRID: usize = 2;

const CHAT_TEMPLATE: &str = "\
{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}\
{% endif %}{{ '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Writes the checkpoint to the folder `to`.
pub fn write(to: &Path, seed: u64, corpus: &[String]) -> Outcome<()> {
    let tokenizer = vocabularies::qwen2(corpus)?;
    // As in the real conversion, the embedding is larger than the vocabulary: a multiple of 64.
    let vocabulary = (tokenizer.get_vocab_size(true) + 2).next_multiple_of(64);

    files::write_json(&to.join("config.json"), &config(&tokenizer, vocabulary)?)?;
    files::write_json(
        &to.join("generation_config.json"),
        &generation_config(&tokenizer)?,
    )?;
    files::write_json(&to.join("preprocessor_config.json"), &preprocessor_config())?;
    files::write_json(&to.join("processor_config.json"), &processor_config())?;
    files::write_json(
        &to.join("tokenizer_config.json"),
        &tokenizer_config(&tokenizer)?,
    )?;
    files::write(
        &to.join("tokenizer.json"),
        tokenizer.to_string(true)?.as_bytes(),
    )?;
    files::write(&to.join("chat_template.jinja"), CHAT_TEMPLATE.as_bytes())?;
    weights(seed, vocabulary).save(&to.join("model.safetensors"))
}

fn config(tokenizer: &Tokenizer, vocabulary: usize) -> Outcome<Value> {
    Ok(json!({
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_grid_pinpoints": grid_pinpoints(),
        "image_token_index": id(tokenizer, "<image>")?,
        "model_type": "llava_onevision",
        "multimodal_projector_bias": true,
        "projector_hidden_act": "gelu",
        "text_config": {
            "attention_dropout": 0.0,
            "bos_token_id": id(tokenizer, "<|endoftext|>")?,
            "eos_token_id": id(tokenizer, "<|im_end|>")?,
            "hidden_act": "silu",
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "layer_types": vec!["full_attention"; LAYERS],
            "max_position_embeddings": CONTEXT,
            "max_window_layers": LAYERS,
            "model_type": "qwen2",
            "num_attention_heads": HEADS,
            "num_hidden_layers": LAYERS,
            "num_key_value_heads": KEY_VALUE_HEADS,
            "pad_token_id": null,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "sliding_window": null,
            "tie_word_embeddings": false,
            "use_cache": true,
            "use_sliding_window": false,
            "vocab_size": vocabulary,
        },
        "tie_word_embeddings": false,
        "transformers_version": "5.23.0",
        "video_token_index": id(tokenizer, "<video>")?,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_config": {
            "attention_dropout": 0.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": VISION_HIDDEN,
            "image_size": TILE,
            "intermediate_size": VISION_INTERMEDIATE,
            "layer_norm_eps": 1e-6,
            "model_type": "siglip_vision_model",
            "num_attention_heads": VISION_HEADS,
            "num_channels": 3,
            "num_hidden_layers": VISION_LAYERS,
            "patch_size": PATCH,
            "vision_use_head": false,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }))
}

fn generation_config(tokenizer: &Tokenizer) -> Outcome<Value> {
    Ok(json!({
        "_from_model_config": true,
        "bos_token_id": id(tokenizer, "<|endoftext|>")?,
        "eos_token_id": id(tokenizer, "<|im_end|>")?,
        "pad_token_id": id(tokenizer, "<|endoftext|>")?,
        "transformers_version": "5.23.0",
    }))
}

fn preprocessor_config() -> Value {
    json!({
        "do_convert_rgb": true,
        "do_normalize": true,
        "do_pad": true,
        "do_rescale": true,
        "do_resize": true,
        "image_grid_pinpoints": grid_pinpoints(),
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "LlavaOnevisionProcessor",
        "resample": 3,
        "rescale_factor": 1.0 / 255.0,
        "size": {"height": TILE, "width": TILE},
    })
}

fn processor_config() -> Value {
    json!({
        "image_token": "<image>",
        "num_image_tokens": patches(),
        "processor_class": "LlavaOnevisionProcessor",
        "video_token": "<video>",
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_select_strategy": "full",
    })
}

fn tokenizer_config(tokenizer: &Tokenizer) -> Outcome<Value> {
    let mut added = serde_json::Map::new();
    for token in QWEN2_SPECIAL {
        let entry = json!({
            "content": token, "lstrip": false, "normalized": false, "rstrip": false,
            "single_word": false, "special": true,
        });
        added.insert(id(tokenizer, token)?.to_string(), entry);
    }
    Ok(json!({
        "add_prefix_space": false,
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<image>", "<video>"],
        "bos_token": null,
        "clean_up_tokenization_spaces": false,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": CONTEXT,
        "pad_token": "<|endoftext|>",
        "processor_class": "LlavaOnevisionProcessor",
        "split_special_tokens": false,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": null,
    }))
}

/// Sizes of tile grids in pixels, height before width.
fn grid_pinpoints() -> Vec<[usize; 2]> {
    let sides = (1..=GRID).map(|tiles| tiles * TILE);
    sides
        .clone()
        .flat_map(|height| sides.clone().map(move |width| [height, width]))
        .collect()
}

/// Patches per tile.
const fn patches() -> usize {
    (TILE / PATCH) * (TILE / PATCH)
}

fn weights(seed: u64, vocabulary: usize) -> Tensors {
    let mut tensors = Tensors::new(seed, "policy");
    tensors.normal("image_newline", &[HIDDEN], 1.0 / (HIDDEN as f64).sqrt());
    tensors.linear("multi_modal_projector.linear_1", VISION_HIDDEN, HIDDEN);
    tensors.linear("multi_modal_projector.linear_2", HIDDEN, HIDDEN);
    tower(&mut tensors);
    decoder(&mut tensors, vocabulary);
    tensors
}

fn tower(tensors: &mut Tensors) {
    let hidden = VISION_HIDDEN;
    let name = |part: &str| format!("vision_tower.{part}");
    let inputs = 3 * PATCH * PATCH;
    let patch_shape = [hidden, 3, PATCH, PATCH];
    let deviation = 1.0 / (inputs as f64).sqrt();
    tensors.normal(
        &name("embeddings.patch_embedding.weight"),
        &patch_shape,
        deviation,
    );
    tensors.normal(&name("embeddings.patch_embedding.bias"), &[hidden], 0.02);
    let deviation = 1.0 / (hidden as f64).sqrt();
    let positions = name("embeddings.position_embedding.weight");
    tensors.normal(&positions, &[patches(), hidden], deviation);
    for layer in 0..VISION_LAYERS {
        let name = |part: &str| format!("vision_tower.encoder.layers.{layer}.{part}");
        tensors.layer_norm(&name("layer_norm1"), hidden);
        for projection in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            tensors.linear(&name(&format!("self_attn.{projection}")), hidden, hidden);
        }
        tensors.layer_norm(&name("layer_norm2"), hidden);
        tensors.linear(&name("mlp.fc1"), hidden, VISION_INTERMEDIATE);
        tensors.linear(&name("mlp.fc2"), VISION_INTERMEDIATE, hidden);
    }
    // Present in every checkpoint, although LLaVA takes the features before it.
    tensors.layer_norm(&name("post_layernorm"), hidden);
}

fn decoder(tensors: &mut Tensors, vocabulary: usize) {
    let deviation = |inputs: usize| 1.0 / (inputs as f64).sqrt();
    let std = deviation(HIDDEN);
    let key_values = HIDDEN / HEADS * KEY_VALUE_HEADS;
    let name = |part: &str| format!("language_model.model.{part}");
    tensors.normal(&name("embed_tokens.weight"), &[vocabulary, HIDDEN], std);
    for layer in 0..LAYERS {
        let name = |part: &str| name(&format!("layers.{layer}.{part}"));
        tensors.constant(&name("input_layernorm.weight"), &[HIDDEN], 1.0);
        for (part, outputs) in [
            ("q_proj", HIDDEN),
            ("k_proj", key_values),
            ("v_proj", key_values),
        ] {
            let part = name(&format!("self_attn.{part}"));
            tensors.normal(&format!("{part}.weight"), &[outputs, HIDDEN], std);
            tensors.normal(&format!("{part}.bias"), &[outputs], 0.02);
        }
        tensors.normal(&name("self_attn.o_proj.weight"), &[HIDDEN, HIDDEN], std);
        tensors.constant(&name("post_attention_layernorm.weight"), &[HIDDEN], 1.0);
        tensors.normal(&name("mlp.gate_proj.weight"), &[INTERMEDIATE, HIDDEN], std);
        tensors.normal(&name("mlp.up_proj.weight"), &[INTERMEDIATE, HIDDEN], std);
        tensors.normal(
            &name("mlp.down_proj.weight"),
            &[HIDDEN, INTERMEDIATE],
            deviation(INTERMEDIATE),
        );
    }
    tensors.constant(&name("norm.weight"), &[HIDDEN], 1.0);
    tensors.normal("language_model.lm_head.weight", &[vocabulary, HIDDEN], std);
}
