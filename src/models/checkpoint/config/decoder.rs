//! Decoder configs: Qwen2 of LLaVA-OneVision and Llama of LLaVA-RLHF.

use serde_json::Value;

use crate::checkpoint::CheckpointError;
use crate::checkpoint::json::JsonConfig;

/// Maximum head dimension, given or computed from two other sizes.
const HEAD_DIM_MAX: usize = 1 << 12;

/// Sizes of a decoder, Qwen2 or Llama.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DecoderConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    /// Maximum sequence length in tokens, including image tokens.
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    /// True if q, k and v have biases (Qwen2); false if nothing has (Llama).
    pub qkv_bias: bool,
    /// True if the head is tied to the embedding.
    pub tie_word_embeddings: bool,
}

impl DecoderConfig {
    /// Defaults of `Qwen2Config`.
    pub const QWEN2: Self = Self {
        vocab_size: 151_936,
        hidden_size: 4096,
        intermediate_size: 22_016,
        num_hidden_layers: 32,
        num_attention_heads: 32,
        num_key_value_heads: 32,
        head_dim: 128,
        max_position_embeddings: 32_768,
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        qkv_bias: true,
        tie_word_embeddings: false,
    };

    /// Defaults of `LlamaConfig`.
    pub const LLAMA: Self = Self {
        vocab_size: 32_000,
        intermediate_size: 11_008,
        max_position_embeddings: 2048,
        qkv_bias: false,
        ..Self::QWEN2
    };

    /// Reads a decoder's config; omitted keys have the values in `defaults`.
    pub(crate) fn read(file: &JsonConfig, defaults: Self) -> Result<Self, CheckpointError> {
        file.only("hidden_act", "silu")?;
        file.only_flag("use_sliding_window", false)?;
        file.only_flag("attention_bias", false)?;
        file.only_flag("mlp_bias", false)?;
        if let Some(Value::Array(kinds)) = file.get("layer_types")
            && let Some(kind) = kinds.iter().find(|kind| *kind != "full_attention")
        {
            let problem = format!("contains {kind}, but only \"full_attention\" is supported");
            return Err(file.fault("layer_types", problem));
        }
        let size = |key, default| Ok(file.size(key)?.unwrap_or(default));
        let hidden_size = size("hidden_size", defaults.hidden_size)?;
        let heads = size("num_attention_heads", defaults.num_attention_heads)?;
        let key_value_heads = match (file.size("num_key_value_heads")?, defaults.qkv_bias) {
            (Some(heads), _) => heads,
            // Qwen2Config has a number here; in LlamaConfig absent means one for each query head.
            (None, true) => defaults.num_key_value_heads,
            (None, false) => heads,
        };
        if !heads.is_multiple_of(key_value_heads) {
            let problem = format!("must divide num_attention_heads {heads}");
            return Err(file.fault("num_key_value_heads", problem));
        }
        let head_dim = match file.size("head_dim")? {
            Some(size) => size,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                let problem = format!("does not divide hidden_size {hidden_size}");
                return Err(file.fault("num_attention_heads", problem));
            }
        };
        if head_dim > HEAD_DIM_MAX {
            let problem = format!("is {head_dim}, but at most {HEAD_DIM_MAX} is supported");
            return Err(file.fault("head_dim", problem));
        }
        if head_dim % 2 == 1 {
            return Err(file.fault("head_dim", format!("is {head_dim}, but must be even")));
        }
        Ok(Self {
            vocab_size: size("vocab_size", defaults.vocab_size)?,
            hidden_size,
            intermediate_size: size("intermediate_size", defaults.intermediate_size)?,
            num_hidden_layers: size("num_hidden_layers", defaults.num_hidden_layers)?,
            num_attention_heads: heads,
            num_key_value_heads: key_value_heads,
            head_dim,
            max_position_embeddings: size(
                "max_position_embeddings",
                defaults.max_position_embeddings,
            )?,
            rms_norm_eps: file
                .positive("rms_norm_eps")?
                .unwrap_or(defaults.rms_norm_eps),
            rope_theta: rope_theta(file)?.unwrap_or(defaults.rope_theta),
            qkv_bias: defaults.qkv_bias,
            tie_word_embeddings: file
                .flag("tie_word_embeddings")?
                .unwrap_or(defaults.tie_word_embeddings),
        })
    }
}

/// Reads the base of the rotary embedding: `rope_parameters.rope_theta` (transformers 5.x) or
/// `rope_theta` (4.x). RoPE scaling is rejected under either of its names.
fn rope_theta(file: &JsonConfig) -> Result<Option<f64>, CheckpointError> {
    for key in ["rope_scaling", "rope_parameters"] {
        if let Some(rope) = file.section(key)? {
            rope.only("rope_type", "default")?;
            rope.only("type", "default")?;
        }
    }
    if let Some(rope) = file.section("rope_parameters")?
        && let Some(theta) = rope.positive("rope_theta")?
    {
        return Ok(Some(theta));
    }
    file.positive("rope_theta")
}
