//! One layer of the decoder.

use tch::Tensor;

use super::super::attention::KeyValue;
use super::super::layers::{Activation, Bias, Linear, Path, RmsNorm, RotaryCosSin};
use super::sizes::DecoderSizes;
use ovchat_models::ModelError;

/// A layer: attention, then a gated MLP.
#[derive(Debug)]
pub struct DecoderLayer {
    pub input_layernorm: RmsNorm,
    pub self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

impl DecoderLayer {
    pub fn new(path: &Path, config: &DecoderSizes) -> Result<Self, ModelError> {
        let norm = |name| RmsNorm::new(&(path / name), config.hidden_size, config.rms_norm_eps);
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            self_attn: Attention::new(&(path / "self_attn"), config)?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: Mlp::new(&(path / "mlp"), config)?,
        })
    }

    /// Takes `xs` before and after `input_layernorm`. `attend` gets the queries
    /// (`[heads, tokens, head_dim]`) with rotary embeddings applied, and attends to whatever these
    /// tokens may see.
    pub fn forward(
        &self,
        xs: &Tensor,
        normed: &Tensor,
        angles: &RotaryCosSin,
        attend: impl FnOnce(&Tensor) -> Tensor,
    ) -> Tensor {
        let xs = xs + self.self_attn.forward(normed, angles, attend);
        let mixed = self
            .mlp
            .forward(&self.post_attention_layernorm.forward(&xs));
        xs + mixed
    }
}

#[derive(Debug)]
pub struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    head_dim: i64,
}

impl Attention {
    fn new(path: &Path, config: &DecoderSizes) -> Result<Self, ModelError> {
        let hidden = config.hidden_size;
        let all = config.num_attention_heads * config.head_dim;
        let shared = config.num_key_value_heads * config.head_dim;
        let bias = config.qkv_bias;
        Ok(Self {
            q_proj: Linear::new(&(path / "q_proj"), hidden, all, bias)?,
            k_proj: Linear::new(&(path / "k_proj"), hidden, shared, bias)?,
            v_proj: Linear::new(&(path / "v_proj"), hidden, shared, bias)?,
            o_proj: Linear::new(&(path / "o_proj"), all, hidden, Bias::No)?,
            head_dim: config.head_dim,
        })
    }

    /// The keys and values of tokens, `[kv_heads, tokens, head_dim]`, with rotary embeddings
    /// applied.
    pub fn keys_values(&self, xs: &Tensor, angles: &RotaryCosSin) -> KeyValue {
        KeyValue {
            k: angles.rotate(&self.heads(&self.k_proj.forward(xs))),
            v: self.heads(&self.v_proj.forward(xs)),
        }
    }

    fn forward(
        &self,
        xs: &Tensor,
        angles: &RotaryCosSin,
        attend: impl FnOnce(&Tensor) -> Tensor,
    ) -> Tensor {
        let q = angles.rotate(&self.heads(&self.q_proj.forward(xs)));
        let mixed = attend(&q); // [heads, tokens, head_dim]
        self.o_proj.forward(&mixed.transpose(0, 1).flatten(1, 2))
    }

    /// Reshapes `[tokens, heads * head_dim]` to `[heads, tokens, head_dim]`.
    fn heads(&self, projected: &Tensor) -> Tensor {
        projected.unflatten(-1, [-1, self.head_dim]).transpose(0, 1)
    }
}

#[derive(Debug)]
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    activation: Activation,
}

impl Mlp {
    fn new(path: &Path, config: &DecoderSizes) -> Result<Self, ModelError> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        Ok(Self {
            gate_proj: Linear::new(&(path / "gate_proj"), hidden, inner, Bias::No)?,
            up_proj: Linear::new(&(path / "up_proj"), hidden, inner, Bias::No)?,
            down_proj: Linear::new(&(path / "down_proj"), inner, hidden, Bias::No)?,
            activation: config.hidden_act,
        })
    }

    fn forward(&self, xs: &Tensor) -> Tensor {
        let gate = self.activation.forward(&self.gate_proj.forward(xs));
        self.down_proj.forward(&(gate * self.up_proj.forward(xs)))
    }
}
