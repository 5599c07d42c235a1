//! The LLaVA networks: a CLIP tower, a projector, and Llama.
//!
//! [`Llava`] is LLaVA-1.5 as transformers has it (`models/llava/modeling_llava.py`).
//!
//! [`LlavaRlhf`] is the body of a reward model, which follows LLaVA before version 1.5 (github
//! llava-rlhf/LLaVA-RLHF, `llava_setup/README.md`): images are padded to squares, CLIP's last layer
//! is left out, the class token is dropped, and the projector is one linear layer. The two-layer
//! projector of LLaVA 1.5 is supported as well; the tensor names tell which one it is. Its adapter
//! applies to Llama only and is merged while the weights are loaded ([`super::lora`]).

use tch::{Device, Kind, Tensor};

use super::checkpoint::{Checkpoint, Parts, Purpose, Reader, TOWER};
use super::decoder::{Decoder, DecoderSizes, LmHead};
use super::error::refuse;
use super::layer_stack::{Layer, SavedActivations};
use super::layers::{Activation, Bias, Linear, Path, WeightSource};
use super::llava_onevision::Projector as TwoLayers;
use super::lora::{Adapter, Merged, Names};
use super::vit::{Family, Vit, VitSizes};
use super::vlm::{EncodedImages, VisionLanguageModel, project_tiles};
use ovchat_models::architectures::llava::LlavaConfig;
use ovchat_models::checkpoint::{LlavaRlhfConfig, TWO_LAYERS};
use ovchat_models::preprocess::{JudgeIds, Tiles};
use ovchat_models::{LlavaRlhfSpec, ModelError};

/// LLaVA-1.5; it has no cache or other state.
#[derive(Debug)]
pub struct Llava {
    vision_tower: Vit,
    drops_class_token: bool,
    multi_modal_projector: TwoLayers,
    language_model: Decoder,
    lm_head: LmHead,
    /// The dtype that it computes in; trained weights are in float32.
    kind: Kind,
}

impl Llava {
    /// Builds the network from the weights of `source`, to compute in dtype `kind`. With `tied`,
    /// the embedding is also the head.
    pub fn new(
        source: &dyn WeightSource,
        config: &LlavaConfig,
        tied: bool,
        kind: Kind,
    ) -> Result<Self, ModelError> {
        let path = &Path::root(source);
        let sizes = DecoderSizes::from(&config.text_config);
        let language_model = Decoder::new(&(path / "language_model" / "model"), &sizes)?;
        let lm_head = if tied {
            LmHead::tied(&language_model)
        } else {
            LmHead::new(&(path / "language_model" / "lm_head"), &sizes)?
        };
        Ok(Self {
            vision_tower: Vit::new(
                &(path / "vision_tower"),
                &VitSizes::new(Family::Clip, &config.vision_config),
                &config.vision_feature_layer,
            )?,
            drops_class_token: config.drops_class_token,
            multi_modal_projector: TwoLayers::new(
                &(path / "multi_modal_projector"),
                config.feature_size() as i64,
                sizes.hidden_size,
                config.multimodal_projector_bias,
            )?,
            language_model,
            lm_head,
            kind,
        })
    }

    /// Maps the tower's states `[images, 1 + patches, features]` to features of the decoder.
    fn project(&self, states: &Tensor) -> Tensor {
        if self.drops_class_token {
            return self
                .multi_modal_projector
                .forward(&without_class_token(states));
        }
        self.multi_modal_projector.forward(states)
    }
}

impl VisionLanguageModel for Llava {
    fn encode(&self, images: &[&Tiles], keep: SavedActivations, parts: Parts) -> EncodedImages<'_> {
        let project = || -> Layer<'_> { Box::new(|states| self.project(states)) };
        let on = (self.device(), self.kind);
        match project_tiles(&self.vision_tower, &project, images, on, (keep, parts)) {
            Some((projected, chains)) => EncodedImages {
                features: projected.unbind(0),
                chains,
            },
            None => EncodedImages {
                features: Vec::new(),
                chains: Vec::new(),
            },
        }
    }

    fn decoder(&self) -> &Decoder {
        &self.language_model
    }

    fn lm_head(&self) -> &LmHead {
        &self.lm_head
    }

    fn kind(&self) -> Kind {
        self.kind
    }
}

/// Drops the class token from a CLIP tower's states, `[images, 1 + patches, features]`.
fn without_class_token(states: &Tensor) -> Tensor {
    states.narrow(1, 1, states.size()[1] - 1)
}

/// The body of a reward model, without a head; maps images and tokens to hidden states.
#[derive(Debug)]
pub struct LlavaRlhf {
    vision_tower: Vit,
    mm_projector: Projector,
    model: Decoder,
}

impl LlavaRlhf {
    /// Loads the weights from the three folders of `spec`, whose config files are in `config`, with
    /// the adapter merged into the base.
    ///
    /// Fails if a tensor is missing or its shape differs from the config, if there is no adapter,
    /// or if the adapter lacks one of its target modules or contains a tensor that does not belong
    /// to Llama.
    pub fn open(
        spec: &LlavaRlhfSpec,
        config: &LlavaRlhfConfig,
        kind: Kind,
        device: Device,
    ) -> Result<Self, ModelError> {
        let tower = Checkpoint::open_clip(&spec.vision)?;
        let vision = Reader::new(&tower, device, kind, Purpose::Inference);
        let adapter = config.adapter.as_ref().ok_or_else(|| no_adapter(spec))?;
        let adapter = Adapter::open(adapter, Names::Same)?;
        let base = Checkpoint::open_base(&spec.base)?;
        let merged = Merged {
            base: Reader::new(&base, device, kind, Purpose::Inference),
            adapter: &adapter,
        };
        let network = Self::new(&vision, &merged, base.has(TWO_LAYERS), config)?;
        adapter.all_used()?;
        Ok(network)
    }

    /// Loads the tower from `vision` and the rest from `base`. The tensor names of a two-layer
    /// projector differ from those of a one-layer projector.
    pub fn new(
        vision: &dyn WeightSource,
        base: &dyn WeightSource,
        two_layers: bool,
        config: &LlavaRlhfConfig,
    ) -> Result<Self, ModelError> {
        let model = &Path::root(base) / "model";
        let text = DecoderSizes::from(&config.text_config);
        let features = config.vision_config.hidden_size as i64;
        Ok(Self {
            vision_tower: Vit::new(
                &(&Path::root(vision) / TOWER.trim_end_matches('.')),
                &VitSizes::new(Family::Clip, &config.vision_config),
                &[config.mm_vision_select_layer],
            )?,
            mm_projector: Projector::new(&model, two_layers, features, text.hidden_size)?,
            model: Decoder::new(&model, &text)?,
        })
    }

    /// Encodes pixels `[images, 3, side, side]` as the features that replace `<image>`,
    /// `[images, patches, hidden]`.
    pub fn encode_images(&self, pixels: &Tensor) -> Tensor {
        let states = self.vision_tower.forward(pixels); // [images, 1 + patches, features]
        self.mm_projector.forward(&without_class_token(&states))
    }

    /// Embeds the first `tokens` of a text, with the image's features in their place,
    /// `[tokens, hidden]`.
    pub fn embed(&self, text: &JudgeIds, tokens: usize, features: Option<&Tensor>) -> Tensor {
        let embed = |ids: &[i64]| {
            let ids = Tensor::from_slice(ids).to_device(self.model.device());
            self.model.embed(&ids)
        };
        match (&text.image, features) {
            (Some(image), Some(features)) => {
                let before = embed(&text.ids[..image.start]);
                let after = embed(&text.ids[image.end..tokens]);
                Tensor::cat(&[&before, features, &after], 0)
            }
            _ => embed(&text.ids[..tokens]),
        }
    }

    /// The Llama decoder, which takes features and token embeddings.
    pub fn decoder(&self) -> &Decoder {
        &self.model
    }
}

/// The projector from CLIP's features to Llama's embeddings.
#[derive(Debug)]
enum Projector {
    Linear(Linear),
    /// `mlp2x_gelu`: two layers with an exact GELU in between.
    Mlp(Linear, Linear),
}

impl Projector {
    fn new(model: &Path, two_layers: bool, features: i64, hidden: i64) -> Result<Self, ModelError> {
        let path = model / "mm_projector";
        if two_layers {
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

/// The error for a reward model that is used for scoring before it was trained.
pub fn no_adapter(spec: &LlavaRlhfSpec) -> ModelError {
    let problem =
        "this reward model has no adapter yet; set `adapter`, or train one with `train_reward`";
    refuse(&spec.base, problem.to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::layers::tests::FakeSource;
    use super::*;

    #[test]
    fn the_projector_of_llava_1_5_has_two_layers_with_an_exact_gelu_between() {
        let made = FakeSource::new(Kind::Float, 4);
        let model = &Path::root(&made) / "model";
        let projector = Projector::new(&model, true, 3, 5).unwrap();
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
            panic!("the file has two layers")
        };
        let xs = Tensor::randn([2, 3], (Kind::Float, Device::Cpu));
        let expected = second.forward(&first.forward(&xs).gelu("none"));
        assert_eq!(projector.forward(&xs), expected);
    }
}
