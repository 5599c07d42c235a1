//! The judge: a LLaVA-RLHF reward model with random weights, in the published layout.
//!
//! `base` is the LLaVA folder (Llama and a single linear projector), `vision` the CLIP folder as
//! transformers 5 writes it, and `prompt.txt` the prompt for the score. Training adds the LoRA
//! adapter and the reward head.

use std::path::Path;

use serde_json::{Value, json};

use super::files::{self, Outcome};
use super::tensors::Tensors;
use super::tokenizers::{self as vocabularies, id};

// The decoder (Llama).
const HIDDEN: usize = 96;
const INTERMEDIATE: usize = 256;
const LAYERS: usize = 8;
const HEADS: usize = 4;
const CONTEXT: usize = 2048;

// The vision tower (CLIP); its last layer is not used.
const VISION_HIDDEN: usize = 96;
const VISION_INTERMEDIATE: usize = 192;
const VISION_LAYERS: usize = 4;
const VISION_HEADS: usize = 4;
const PICTURE: usize = 112;
const PATCH: usize = 14;

/// The linear layers of Llama: name, inputs, outputs.
const LINEAR: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", HIDDEN, HIDDEN),
    ("self_attn.k_proj", HIDDEN, HIDDEN),
    ("self_attn.v_proj", HIDDEN, HIDDEN),
    ("self_attn.o_proj", HIDDEN, HIDDEN),
    ("mlp.gate_proj", HIDDEN, INTERMEDIATE),
    ("mlp.up_proj", HIDDEN, INTERMEDIATE),
    ("mlp.down_proj", INTERMEDIATE, HIDDEN),
];

/// A reward prompt of this project: the base is trained on the same question about answers, so that
/// it knows the meaning of the score. (The published adapter was trained with a different prompt.)
pub const PROMPT: &str = "USER: Is that true? ASSISTANT:";

/// Writes the reward model to the folder `to`.
pub fn write(to: &Path, seed: u64, corpus: &[String]) -> Outcome<()> {
    write_base(&to.join("base"), seed, corpus)?;
    write_vision(&to.join("vision"), seed)?;
    files::write(&to.join("prompt.txt"), PROMPT.as_bytes())
}

fn write_base(to: &Path, seed: u64, corpus: &[String]) -> Outcome<()> {
    let tokenizer = vocabularies::llama(corpus)?;
    let vocabulary = tokenizer.get_vocab_size(true);
    files::write(
        &to.join("tokenizer.json"),
        tokenizer.to_string(true)?.as_bytes(),
    )?;
    files::write_json(&to.join("tokenizer_config.json"), &tokenizer_config())?;
    let config = json!({
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": id(&tokenizer, "<s>")?,
        "eos_token_id": id(&tokenizer, "</s>")?,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "image_aspect_ratio": "pad",
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": CONTEXT,
        "mm_hidden_size": VISION_HIDDEN,
        "mm_use_im_start_end": false,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "../vision",
        "model_type": "llava",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS,
        "pad_token_id": id(&tokenizer, "<unk>")?,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
        "use_cache": true,
        "use_mm_proj": true,
        "vocab_size": vocabulary,
    });
    files::write_json(&to.join("config.json"), &config)?;

    let mut tensors = Tensors::new(seed, "judge/base");
    let deviation = |inputs: usize| 1.0 / (inputs as f64).sqrt();
    let embedding = [vocabulary, HIDDEN];
    tensors.normal("model.embed_tokens.weight", &embedding, deviation(HIDDEN));
    for layer in 0..LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        tensors.constant(&name("input_layernorm"), &[HIDDEN], 1.0);
        for (part, inputs, outputs) in LINEAR {
            tensors.normal(&name(part), &[outputs, inputs], deviation(inputs));
        }
        tensors.constant(&name("post_attention_layernorm"), &[HIDDEN], 1.0);
    }
    tensors.constant("model.norm.weight", &[HIDDEN], 1.0);
    tensors.normal("lm_head.weight", &embedding, deviation(HIDDEN));
    tensors.linear("model.mm_projector", VISION_HIDDEN, HIDDEN);
    tensors.save(&to.join("model.safetensors"))
}

/// Writes a tokenizer config whose class reads `tokenizer.json` unchanged; transformers 5 would
/// rebuild a `LlamaTokenizer` with other rules for spaces.
fn tokenizer_config() -> Value {
    json!({
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": false,
        "eos_token": "</s>",
        "model_max_length": CONTEXT,
        "pad_token": "<unk>",
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    })
}

fn write_vision(to: &Path, seed: u64) -> Outcome<()> {
    let config = json!({
        "architectures": ["CLIPVisionModel"],
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "hidden_act": "quick_gelu",
        "hidden_size": VISION_HIDDEN,
        "image_size": PICTURE,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": VISION_INTERMEDIATE,
        "layer_norm_eps": 1e-5,
        "model_type": "clip_vision_model",
        "num_attention_heads": VISION_HEADS,
        "num_channels": 3,
        "num_hidden_layers": VISION_LAYERS,
        "patch_size": PATCH,
        "projection_dim": VISION_HIDDEN,
        "transformers_version": "5.23.0",
    });
    files::write_json(&to.join("config.json"), &config)?;
    let preprocessor = json!({
        "crop_size": {"height": PICTURE, "width": PICTURE},
        "do_center_crop": true,
        "do_convert_rgb": true,
        "do_normalize": true,
        "do_rescale": true,
        "do_resize": true,
        "image_mean": [0.481_454_66, 0.457_827_5, 0.408_210_73],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.268_629_54, 0.261_302_58, 0.275_777_11],
        "resample": 3,
        "rescale_factor": 1.0 / 255.0,
        "size": {"shortest_edge": PICTURE},
    });
    files::write_json(&to.join("preprocessor_config.json"), &preprocessor)?;

    let hidden = VISION_HIDDEN;
    let mut tensors = Tensors::new(seed, "judge/vision");
    let deviation = 1.0 / (hidden as f64).sqrt();
    tensors.normal("embeddings.class_embedding", &[hidden], deviation);
    let patch_deviation = 1.0 / ((3 * PATCH * PATCH) as f64).sqrt();
    let patch_shape = [hidden, 3, PATCH, PATCH];
    tensors.normal(
        "embeddings.patch_embedding.weight",
        &patch_shape,
        patch_deviation,
    );
    let positions = (PICTURE / PATCH) * (PICTURE / PATCH) + 1;
    tensors.normal(
        "embeddings.position_embedding.weight",
        &[positions, hidden],
        deviation,
    );
    tensors.layer_norm("pre_layrnorm", hidden); // spelled so in every CLIP checkpoint
    for layer in 0..VISION_LAYERS {
        let name = |part: &str| format!("encoder.layers.{layer}.{part}");
        tensors.layer_norm(&name("layer_norm1"), hidden);
        for projection in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            tensors.linear(&name(&format!("self_attn.{projection}")), hidden, hidden);
        }
        tensors.layer_norm(&name("layer_norm2"), hidden);
        tensors.linear(&name("mlp.fc1"), hidden, VISION_INTERMEDIATE);
        tensors.linear(&name("mlp.fc2"), VISION_INTERMEDIATE, hidden);
    }
    tensors.layer_norm("post_layernorm", hidden);
    tensors.save(&to.join("model.safetensors"))
}
