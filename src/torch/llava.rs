//! LLaVA-RLHF's network: CLIP, a projector, and Llama with a LoRA adapter merged in.
//!
//! It is LLaVA as it was before version 1.5 (github llava-rlhf/LLaVA-RLHF,
//! `llava_setup/README.md`): pictures are padded to squares, CLIP's last layer is left out, the class
//! token is dropped, and the projector is one linear layer. The two-layer projector of LLaVA 1.5 is
//! read as well; the names of the tensors tell which it is.
//!
//! The adapter touches Llama only, and is merged into it while the weights are read ([`super::lora`]).

use tch::{Device, Kind, Tensor};

use super::checkpoint::{Checkpoint, Purpose, Reader, TOWER};
use super::decoder::{Decoder, DecoderSizes};
use super::layers::{Activation, Bias, Linear, Path, WeightSource};
use super::lora::{Adapter, Merged, Names};
use super::vit::{Family, Vit, VitSizes};
use super::weights::refuse;
use ovchat_models::checkpoint::{LlavaRlhfConfig, TWO_LAYERS};
use ovchat_models::preprocess::JudgeIds;
use ovchat_models::{LlavaRlhfSpec, ModelError};

/// The network without a head: pictures and tokens in, hidden states out.
#[derive(Debug)]
pub struct Llava {
    vision_tower: Vit,
    mm_projector: Projector,
    model: Decoder,
}

impl Llava {
    /// Reads the weights of the three folders of `spec`, whose config files `config` describes, the
    /// adapter merged into the base's.
    ///
    /// Fails when a tensor is missing or has another shape than the config says, when there is no
    /// adapter, and when it lacks one of its target modules or holds anything that has no place in
    /// Llama.
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

    /// The network with its tower from `vision` and the rest from `base`. A projector of two layers
    /// has other names than one of one.
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

    /// Pixels `[pictures, 3, side, side]` to the features that stand for `<image>`,
    /// `[pictures, patches, hidden]`.
    pub fn encode_images(&self, pixels: &Tensor) -> Tensor {
        let states = self.vision_tower.forward(pixels); // [pictures, 1 + patches, features]
        let patches = states.size()[1] - 1;
        self.mm_projector.forward(&states.narrow(1, 1, patches))
    }

    /// The first `tokens` of a text, with the picture's features where it belongs,
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

/// The complaint about a reward model that is to score before it was trained to.
pub fn no_adapter(spec: &LlavaRlhfSpec) -> ModelError {
    let problem = "this reward model has no adapter yet; name one, or train it with `train_reward`";
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
            panic!("two layers were there")
        };
        let xs = Tensor::randn([2, 3], (Kind::Float, Device::Cpu));
        let expected = second.forward(&first.forward(&xs).gelu("none"));
        assert_eq!(projector.forward(&xs), expected);
    }
}
