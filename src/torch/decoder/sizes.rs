//! The sizes of a decoder.

use super::super::layers::{Activation, Bias};
use ovchat_models::checkpoint::DecoderConfig;

/// The sizes of a decoder, named as in `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderSizes {
    pub vocab_size: i64,
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub num_hidden_layers: i64,
    pub num_attention_heads: i64,
    /// Divides `num_attention_heads`; each key-value head serves
    /// `num_attention_heads / num_key_value_heads` consecutive query heads.
    pub num_key_value_heads: i64,
    pub head_dim: i64,
    pub hidden_act: Activation,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    /// The biases of `q_proj`, `k_proj` and `v_proj`: Qwen2 has them, Llama does not.
    pub qkv_bias: Bias,
}

impl From<&DecoderConfig> for DecoderSizes {
    fn from(model_config: &DecoderConfig) -> Self {
        Self {
            vocab_size: model_config.vocab_size as i64,
            hidden_size: model_config.hidden_size as i64,
            intermediate_size: model_config.intermediate_size as i64,
            num_hidden_layers: model_config.num_hidden_layers as i64,
            num_attention_heads: model_config.num_attention_heads as i64,
            num_key_value_heads: model_config.num_key_value_heads as i64,
            head_dim: model_config.head_dim as i64,
            hidden_act: Activation::Silu,
            rms_norm_eps: model_config.rms_norm_eps,
            rope_theta: model_config.rope_theta,
            qkv_bias: if model_config.qkv_bias {
                Bias::Yes
            } else {
                Bias::No
            },
        }
    }
}
