//! LLaVA-RLHF's network: CLIP, a projector, and Llama with a LoRA adapter merged in.
//!
//! It is LLaVA as it was before version 1.5 (github llava-rlhf/LLaVA-RLHF,
//! `llava_setup/README.md`): pictures are padded to squares, CLIP's last layer is left out, the class
//! token is dropped, and the projector is one linear layer. The two-layer projector of LLaVA 1.5 is
//! read as well; the names of the tensors tell which it is.
//!
//! The adapter touches Llama only, and is merged into it while the weights are read ([`super::lora`]).

use tch::{Device, Kind, Tensor};

use super::decoder::{Decoder, DecoderConfig};
use super::layers::{Activation, Bias, Linear, Path, Source};
use super::lora::{Adapter, Merged};
use super::vit::{Family, Vit, VitConfig};
use super::weights::{Weights, refuse};
use crate::models::{LlavaRlhf, ModelError};
use crate::prep::{DecoderCard, RewardCard, VisionCard};

/// The network without a head: pictures and tokens in, hidden states out.
#[derive(Debug)]
pub struct Llava {
    vision_tower: Vit,
    mm_projector: Projector,
    model: Decoder,
}

impl Llava {
    /// Reads the weights of the three folders of `spec`, whose config files `card` describes.
    ///
    /// Fails when a tensor is missing or has another shape than the config says, and when the
    /// adapter lacks one of its target modules or holds anything that has no place in Llama.
    pub fn open(
        spec: &LlavaRlhf,
        card: &RewardCard,
        kind: Kind,
        device: Device,
    ) -> Result<Self, ModelError> {
        let vision = Vision::open(&spec.vision, kind, device)?;
        let vision_tower = Vit::new(
            &Path::root(&vision),
            &vit_config(&card.vision_config),
            &[card.mm_vision_select_layer],
        )?;
        let base = Merged {
            base: Weights::open(&spec.base)?,
            adapter: Adapter::open(&card.adapter)?,
            kind,
            device,
        };
        let model = &Path::root(&base) / "model";
        let text = decoder_config(&card.text_config);
        let features = card.vision_config.hidden_size as i64;
        let network = Self {
            vision_tower,
            mm_projector: Projector::new(&model, &base.base, features, text.hidden_size)?,
            model: Decoder::new(&model, &text)?,
        };
        base.adapter.all_used()?;
        Ok(network)
    }

    /// Pixels `[pictures, 3, side, side]` to the features that stand for `<image>`,
    /// `[pictures, patches, hidden]`.
    pub fn encode_images(&self, pixels: &Tensor) -> Tensor {
        let states = self.vision_tower.forward(pixels); // [pictures, 1 + patches, features]
        let patches = states.size()[1] - 1;
        self.mm_projector.forward(&states.narrow(1, 1, patches))
    }

    /// Llama, which reads features and embeddings of tokens.
    pub fn decoder(&self) -> &Decoder {
        &self.model
    }
}

/// CLIP's features to Llama's embeddings.
#[derive(Debug)]
enum Projector {
    Linear(Linear),
    /// `mlp2x_gelu`: two layers and an exact GELU between them.
    Mlp(Linear, Linear),
}

impl Projector {
    fn new(model: &Path, base: &Weights, features: i64, hidden: i64) -> Result<Self, ModelError> {
        let path = model / "mm_projector";
        if base.has("model.mm_projector.0.weight") {
            let first = Linear::new(&(&path / 0), features, hidden, Bias::Yes)?;
            let second = Linear::new(&(&path / 2), hidden, hidden, Bias::Yes)?;
            return Ok(Self::Mlp(first, second));
        }
        Linear::new(&path, features, hidden, Bias::Yes).map(Self::Linear)
    }

    fn forward(&self, xs: &Tensor) -> Tensor {
        match self {
            Self::Linear(linear) => linear.forward(xs),
            Self::Mlp(first, second) => {
                second.forward(&Activation::Gelu.forward(&first.forward(xs)))
            }
        }
    }
}

fn vit_config(card: &VisionCard) -> VitConfig {
    VitConfig {
        family: Family::Clip,
        hidden_size: card.hidden_size as i64,
        intermediate_size: card.intermediate_size as i64,
        num_hidden_layers: card.num_hidden_layers as i64,
        num_attention_heads: card.num_attention_heads as i64,
        num_channels: card.num_channels as i64,
        image_size: card.image_size as i64,
        patch_size: card.patch_size as i64,
        hidden_act: Activation::QuickGelu,
        layer_norm_eps: card.layer_norm_eps,
    }
}

fn decoder_config(card: &DecoderCard) -> DecoderConfig {
    DecoderConfig {
        vocab_size: card.vocab_size as i64,
        hidden_size: card.hidden_size as i64,
        intermediate_size: card.intermediate_size as i64,
        num_hidden_layers: card.num_hidden_layers as i64,
        num_attention_heads: card.num_attention_heads as i64,
        num_key_value_heads: card.num_key_value_heads as i64,
        head_dim: card.head_dim as i64,
        hidden_act: Activation::Silu,
        rms_norm_eps: card.rms_norm_eps,
        rope_theta: card.rope_theta,
        qkv_bias: Bias::No,
    }
}

/// The weights of CLIP's tower, by the names that they have below it.
struct Vision {
    weights: Weights,
    /// What stands before those names: a whole CLIP and transformers up to 4.x write
    /// `vision_model.`, transformers 5.x writes a tower without it.
    prefix: &'static str,
    kind: Kind,
    device: Device,
}

impl Vision {
    fn open(folder: &std::path::Path, kind: Kind, device: Device) -> Result<Self, ModelError> {
        let weights = Weights::open(folder)?;
        let is_there = |prefix: &&str| weights.has(&format!("{prefix}embeddings.class_embedding"));
        let prefix = ["vision_model.", ""].into_iter().find(is_there);
        let prefix = prefix.ok_or_else(|| {
            let problem = "holds no CLIP tower: neither `vision_model.embeddings.class_embedding` \
                           nor `embeddings.class_embedding` is among its tensors";
            refuse(folder, problem.to_owned())
        })?;
        Ok(Self {
            weights,
            prefix,
            kind,
            device,
        })
    }
}

impl Source for Vision {
    fn take(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
        let name = format!("{}{name}", self.prefix);
        self.weights.take(&name, shape, self.kind, self.device)
    }
}

#[cfg(test)]
mod tests {
    use super::super::layers::tests::Made;
    use super::super::weights::save_safetensors;
    use super::*;

    #[test]
    fn the_projector_of_llava_1_5_has_two_layers_with_an_exact_gelu_between() {
        let made = Made::new(Kind::Float, 4);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let mark = [(
            "model.mm_projector.0.weight".to_owned(),
            Tensor::from(0.0_f32),
        )];
        save_safetensors(&path, &mark, &[]).unwrap();
        let base = Weights::open(folder.path()).unwrap();
        let model = &Path::root(&made) / "model";
        let projector = Projector::new(&model, &base, 3, 5).unwrap();
        let shapes = made.names.into_inner();
        let names: Vec<&str> = shapes.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "model.mm_projector.0.weight",
                "model.mm_projector.0.bias",
                "model.mm_projector.2.weight",
                "model.mm_projector.2.bias",
            ]
        );
        let Projector::Mlp(first, second) = &projector else {
            panic!("two layers were there")
        };
        let xs = Tensor::randn([2, 3], (Kind::Float, Device::Cpu));
        let expected = second.forward(&first.forward(&xs).gelu("none"));
        assert_eq!(projector.forward(&xs), expected);
    }
}
