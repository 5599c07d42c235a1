//! SigLIP (LLaVA-OneVision) and CLIP (LLaVA-RLHF) vision towers.
//!
//! Both are the same network except for the embeddings: CLIP prepends a class token to the patches,
//! normalizes the embeddings and has no bias in the patch convolution. A tower outputs the
//! requested hidden states, before any post-layernorm, and holds no layer beyond the last of them.
//! Sources: transformers' `models/siglip/modeling_siglip.py` and `models/clip/modeling_clip.py`.

use tch::Tensor;

use super::casts::cast_weight;
use super::layer_stack::Layer;
use super::layers::{Activation, Bias, LayerNorm, Linear, Path};
use ovchat_models::ModelError;
use ovchat_models::checkpoint::VisionConfig;

/// The family of a tower, which decides its embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Patches only, a bias in the patch convolution.
    Siglip,
    /// A class token, `pre_layrnorm`, no bias in the patch convolution.
    Clip,
}

/// The sizes of a tower, named as in `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct VitSizes {
    pub family: Family,
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub num_hidden_layers: i64,
    pub num_attention_heads: i64,
    pub num_channels: i64,
    pub image_size: i64,
    pub patch_size: i64,
    pub hidden_act: Activation,
    pub layer_norm_eps: f64,
}

impl VitSizes {
    /// The sizes from a checkpoint's config.
    pub fn new(family: Family, model_config: &VisionConfig) -> Self {
        Self {
            family,
            hidden_size: model_config.hidden_size as i64,
            intermediate_size: model_config.intermediate_size as i64,
            num_hidden_layers: model_config.num_hidden_layers as i64,
            num_attention_heads: model_config.num_attention_heads as i64,
            num_channels: model_config.num_channels as i64,
            image_size: model_config.image_size as i64,
            patch_size: model_config.patch_size as i64,
            hidden_act: match model_config.hidden_act {
                ovchat_models::checkpoint::Activation::GeluTanh => Activation::GeluTanh,
                ovchat_models::checkpoint::Activation::QuickGelu => Activation::QuickGelu,
            },
            layer_norm_eps: model_config.layer_norm_eps,
        }
    }

    /// The number of patches of an image; partial patches at the right and bottom are dropped.
    pub fn num_patches(&self) -> i64 {
        (self.image_size / self.patch_size).pow(2)
    }
}

/// A tower up to the last layer that is used.
#[derive(Debug)]
pub struct Vit {
    embeddings: Embeddings,
    pre_layrnorm: Option<LayerNorm>,
    layers: Vec<EncoderLayer>,
    hidden_states: Vec<usize>,
}

impl Vit {
    /// `hidden_states` are the states that [`Vit::forward`] returns: 0 is the input of the first
    /// layer, `n` the output of the `n`th.
    pub fn new(
        path: &Path,
        config: &VitSizes,
        hidden_states: &[usize],
    ) -> Result<Self, ModelError> {
        let pre_layrnorm = match config.family {
            Family::Siglip => None,
            Family::Clip => Some(LayerNorm::new(
                &(path / "pre_layrnorm"),
                config.hidden_size,
                config.layer_norm_eps,
            )?),
        };
        let layers = path / "encoder" / "layers";
        let used = hidden_states.iter().copied().max().unwrap_or(0);
        Ok(Self {
            embeddings: Embeddings::new(&(path / "embeddings"), config)?,
            pre_layrnorm,
            layers: (0..used)
                .map(|index| EncoderLayer::new(&(&layers / index), config))
                .collect::<Result<_, _>>()?,
            hidden_states: hidden_states.to_vec(),
        })
    }

    /// The layers of [`Vit::forward`] separately; a single one if hidden states other than the last
    /// are wanted.
    pub fn links(&self) -> Vec<Layer<'_>> {
        if self.hidden_states != [self.layers.len()] {
            return vec![Box::new(|pixels| self.forward(pixels))];
        }
        let mut links: Vec<Layer<'_>> = vec![Box::new(|pixels| self.embed(pixels))];
        for layer in &self.layers {
            links.push(Box::new(|xs| layer.forward(xs)));
        }
        links
    }

    /// Embeds pixels as the input of the first layer, `[tiles, tokens, hidden]`.
    fn embed(&self, pixels: &Tensor) -> Tensor {
        let xs = self.embeddings.forward(pixels);
        match &self.pre_layrnorm {
            Some(norm) => norm.forward(&xs),
            None => xs,
        }
    }

    /// Maps pixels `[tiles, channels, image_size, image_size]` to the selected hidden states,
    /// concatenated, `[tiles, tokens, hidden * states]`; the class token, if any, is token 0.
    pub fn forward(&self, pixels: &Tensor) -> Tensor {
        let xs = self.embed(pixels);
        let mut states = vec![xs];
        for layer in &self.layers {
            let next = layer.forward(&states[states.len() - 1]);
            if !self.hidden_states.contains(&(states.len() - 1)) {
                // This state is not needed again; free it before the next is computed.
                let last = states.len() - 1;
                states[last] = Tensor::new();
            }
            states.push(next);
        }
        let chosen: Vec<&Tensor> = self
            .hidden_states
            .iter()
            .map(|&index| &states[index])
            .collect();
        Tensor::cat(&chosen, -1)
    }
}

/// Embeddings of patches (and the class token) with their positions.
#[derive(Debug)]
struct Embeddings {
    class_embedding: Option<Tensor>,      // [hidden]
    patch_embedding: Tensor,              // [hidden, channels, patch, patch]
    patch_embedding_bias: Option<Tensor>, // [hidden]
    position_embedding: Tensor,           // [tokens, hidden]
    patch_size: i64,
}

impl Embeddings {
    fn new(path: &Path, config: &VitSizes) -> Result<Self, ModelError> {
        let hidden = config.hidden_size;
        let patch = config.patch_size;
        let patch_embedding = path / "patch_embedding";
        let (class_embedding, patch_embedding_bias) = match config.family {
            Family::Siglip => (None, Some(patch_embedding.take("bias", &[hidden])?)),
            Family::Clip => (Some(path.take("class_embedding", &[hidden])?), None),
        };
        let tokens = config.num_patches() + i64::from(class_embedding.is_some());
        Ok(Self {
            class_embedding,
            patch_embedding: patch_embedding
                .take("weight", &[hidden, config.num_channels, patch, patch])?,
            patch_embedding_bias,
            position_embedding: (path / "position_embedding").take("weight", &[tokens, hidden])?,
            patch_size: patch,
        })
    }

    fn forward(&self, pixels: &Tensor) -> Tensor {
        let kind = pixels.kind();
        let weight = cast_weight(&self.patch_embedding, kind);
        let stride = [self.patch_size, self.patch_size];
        let bias = self.patch_embedding_bias.as_ref();
        let bias = bias.map(|bias| cast_weight(bias, kind));
        let patches = pixels
            .conv2d(&weight, bias, stride, [0, 0], [1, 1], 1) // [tiles, hidden, rows, columns]
            .flatten(2, 3)
            .transpose(1, 2); // [tiles, patches, hidden]
        let tokens = match &self.class_embedding {
            None => patches,
            Some(class) => {
                let class = cast_weight(class, kind);
                let class = class.expand([patches.size()[0], 1, -1], false);
                Tensor::cat(&[class, patches], 1)
            }
        };
        tokens + cast_weight(&self.position_embedding, kind)
    }
}

#[derive(Debug)]
struct EncoderLayer {
    layer_norm1: LayerNorm,
    self_attn: Attention,
    layer_norm2: LayerNorm,
    mlp: Mlp,
}

impl EncoderLayer {
    fn new(path: &Path, config: &VitSizes) -> Result<Self, ModelError> {
        let norm = |name| LayerNorm::new(&(path / name), config.hidden_size, config.layer_norm_eps);
        Ok(Self {
            layer_norm1: norm("layer_norm1")?,
            self_attn: Attention::new(&(path / "self_attn"), config)?,
            layer_norm2: norm("layer_norm2")?,
            mlp: Mlp::new(&(path / "mlp"), config)?,
        })
    }

    fn forward(&self, xs: &Tensor) -> Tensor {
        let xs = xs + self.self_attn.forward(&self.layer_norm1.forward(xs));
        let mixed = self.mlp.forward(&self.layer_norm2.forward(&xs));
        xs + mixed
    }
}

#[derive(Debug)]
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    heads: i64,
}

impl Attention {
    fn new(path: &Path, config: &VitSizes) -> Result<Self, ModelError> {
        let size = config.hidden_size;
        let linear = |name| Linear::new(&(path / name), size, size, Bias::Yes);
        Ok(Self {
            q_proj: linear("q_proj")?,
            k_proj: linear("k_proj")?,
            v_proj: linear("v_proj")?,
            out_proj: linear("out_proj")?,
            heads: config.num_attention_heads,
        })
    }

    /// Every token of a tile attends to every other; `[tiles, tokens, hidden]`.
    fn forward(&self, xs: &Tensor) -> Tensor {
        let heads = |projected: Tensor| {
            projected.unflatten(-1, [self.heads, -1]).transpose(1, 2) // [tiles, heads, tokens, head_dim]
        };
        let q = heads(self.q_proj.forward(xs));
        let k = heads(self.k_proj.forward(xs));
        let v = heads(self.v_proj.forward(xs));
        let mixed = Tensor::scaled_dot_product_attention(
            &q,
            &k,
            &v,
            None::<&Tensor>,
            0.0,
            false,
            None,
            false,
        );
        self.out_proj.forward(&mixed.transpose(1, 2).flatten(2, 3))
    }
}

#[derive(Debug)]
struct Mlp {
    fc1: Linear,
    activation: Activation,
    fc2: Linear,
}

impl Mlp {
    fn new(path: &Path, config: &VitSizes) -> Result<Self, ModelError> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        Ok(Self {
            fc1: Linear::new(&(path / "fc1"), hidden, inner, Bias::Yes)?,
            activation: config.hidden_act,
            fc2: Linear::new(&(path / "fc2"), inner, hidden, Bias::Yes)?,
        })
    }

    fn forward(&self, xs: &Tensor) -> Tensor {
        let inner = self.activation.forward(&self.fc1.forward(xs));
        self.fc2.forward(&inner)
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::super::layers::tests::{FakeSource, noise};
    use super::*;

    fn config(family: Family) -> VitSizes {
        VitSizes {
            family,
            hidden_size: 8,
            intermediate_size: 12,
            num_hidden_layers: 3,
            num_attention_heads: 2,
            num_channels: 3,
            image_size: 11,
            patch_size: 5,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        }
    }

    fn forward(family: Family, hidden_states: &[usize]) -> Tensor {
        let made = FakeSource::new(Kind::Float, 2);
        let vit = Vit::new(&Path::root(&made), &config(family), hidden_states).unwrap();
        vit.forward(&noise(&[2, 3, 11, 11], 9))
    }

    #[test]
    fn pixels_that_fill_no_patch_are_left_out_and_clip_has_one_token_more() {
        assert_eq!(forward(Family::Siglip, &[3]).size(), [2, 4, 8]);
        assert_eq!(forward(Family::Clip, &[3]).size(), [2, 5, 8]);
    }

    #[test]
    fn several_hidden_states_lie_side_by_side_in_the_order_asked_for() {
        let both = forward(Family::Siglip, &[3, 1]);
        assert_eq!(both.narrow(-1, 0, 8), forward(Family::Siglip, &[3]));
        assert_eq!(both.size(), [2, 4, 16]);
        // The weights are fabricated in the order of the requests, so a shorter tower has the same
        // first layers.
        assert_eq!(both.narrow(-1, 8, 8), forward(Family::Siglip, &[1]));
    }

    #[test]
    fn layers_beyond_the_last_that_is_used_are_not_asked_for() {
        let made = FakeSource::new(Kind::Float, 2);
        Vit::new(&Path::root(&made), &config(Family::Siglip), &[2]).unwrap();
        let names = made.names.into_inner();
        let asked = |name: &str| names.iter().any(|(asked, _)| asked.starts_with(name));
        assert!(asked("encoder.layers.1.mlp.fc2.bias"));
        assert!(!asked("encoder.layers.2") && !asked("post_layernorm"));
    }
}
