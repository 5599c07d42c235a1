//! The LLaVA-OneVision network: a SigLIP tower, a projector, the packing of tiles, and a Qwen2
//! decoder.
//!
//! Li et al. 2024, *LLaVA-OneVision: Easy Visual Task Transfer*, arXiv 2408.03326; transformers'
//! `models/llava_onevision/modeling_llava_onevision.py` (`get_image_features`,
//! `pack_image_features`).

use std::borrow::Borrow;
use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::checkpoint::{Checkpoint, HEAD, Parts, Purpose, Reader};
use super::decoder::{Decoder, DecoderSizes, LmHead};
use super::layer_stack::{Layer, LayerStack, SavedActivations};
use super::layers::{Activation, Bias, Linear, Path, WeightSource};
use super::lora::{Adapter, Merged, Names};
use super::optimizer::Parameter;
use super::vit::{Family, Vit, VitSizes};
use ovchat_models::checkpoint::{AdapterConfig, LlavaOnevisionConfig};
use ovchat_models::preprocess::{Packing, PromptIds, Tiles};
use ovchat_models::{self as models, ModelError, Part};

/// The number of tiles that go through the tower at once. The widest activation of the tower is
/// that of its MLP, 12.5 MB per tile in float32 for the published tower.
const TILES_AT_ONCE: i64 = 8;

/// The network; it has no cache or other state.
#[derive(Debug)]
pub struct LlavaOnevision {
    pub vision_tower: Vit,
    pub multi_modal_projector: Projector,
    image_newline: Tensor, // [hidden]
    pub language_model: Decoder,
    pub lm_head: LmHead,
    /// The dtype that it computes in; trained weights are in float32.
    kind: Kind,
}

/// Image features, and the layer stacks for their backward pass.
pub struct Seen<'a> {
    /// The features of each image, `[tokens, hidden]`.
    pub features: Vec<Tensor>,
    /// The passes of the tiles through tower and projector.
    pub chains: Vec<LayerStack<'a>>,
}

impl LlavaOnevision {
    /// Loads the network from `checkpoint`; returns the parameters that are trained, too.
    pub fn open(
        checkpoint: &Checkpoint,
        config: &LlavaOnevisionConfig,
        device: Device,
        kind: Kind,
        purpose: Purpose,
    ) -> Result<(Self, Vec<Parameter>), ModelError> {
        let reader = Reader::new(checkpoint, device, kind, purpose);
        let network = Self::new(&reader, config, is_tied(checkpoint, config), kind)?;
        Ok((network, reader.into_parameters()))
    }

    /// Loads the network of a spec for inference, with its adapter, if any, merged.
    pub fn open_merged(
        spec: &models::LlavaOnevisionSpec,
        checkpoint: &Checkpoint,
        config: &LlavaOnevisionConfig,
        device: Device,
        kind: Kind,
    ) -> Result<Self, ModelError> {
        let base = Reader::new(checkpoint, device, kind, Purpose::Inference);
        let tied = is_tied(checkpoint, config);
        let Some(folder) = &spec.adapter else {
            return Self::new(&base, config, tied, kind);
        };
        let adapter = Adapter::open(&AdapterConfig::open(folder)?, Names::Onevision)?;
        let merged = Merged {
            base,
            adapter: &adapter,
        };
        let network = Self::new(&merged, config, tied, kind)?;
        adapter.all_used()?;
        Ok(network)
    }

    /// Builds the network from the weights of `source`, to compute in dtype `kind`. With `tied`,
    /// the embedding is also the head.
    pub fn new(
        source: &dyn WeightSource,
        config: &LlavaOnevisionConfig,
        tied: bool,
        kind: Kind,
    ) -> Result<Self, ModelError> {
        let path = &Path::root(source);
        let hidden = config.text_config.hidden_size as i64;
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
                &VitSizes::new(Family::Siglip, &config.vision_config),
                &config.vision_feature_layer,
            )?,
            multi_modal_projector: Projector::new(&(path / "multi_modal_projector"), config)?,
            image_newline: path.take("image_newline", &[hidden])?,
            language_model,
            lm_head,
            kind,
        })
    }

    /// Encodes the tiles of images as the features that represent each in the sequence,
    /// `[tokens, hidden]`. Tiles are batched through the tower across images. For inference.
    pub fn image_features<T: Borrow<Tiles>>(&self, images: &[T]) -> Vec<Tensor> {
        self.see(images, SavedActivations::Nothing, Parts::NONE)
            .features
    }

    /// Like [`LlavaOnevision::image_features`], for training some `parts`.
    pub fn see<T: Borrow<Tiles>>(
        &self,
        images: &[T],
        keep: SavedActivations,
        parts: Parts,
    ) -> Seen<'_> {
        let pixels: Vec<Tensor> = images
            .iter()
            .map(|tiles| {
                let tiles = tiles.borrow();
                let (count, side) = (tiles.packing.tiles() as i64, tiles.side as i64);
                Tensor::from_slice(&tiles.pixels).view([count, 3, side, side])
            })
            .collect();
        let (mut chains, mut features) = (Vec::new(), Vec::new());
        if pixels.is_empty() {
            return Seen { features, chains };
        }
        for pixels in Tensor::cat(&pixels, 0).split(TILES_AT_ONCE, 0) {
            let pixels = pixels.to_device(self.device()).to_kind(self.kind);
            chains.push(self.look(&pixels, keep, parts));
        }
        let projected: Vec<&Tensor> = chains.iter().map(LayerStack::output).collect();
        let projected = Tensor::cat(&projected, 0); // [tiles of all, patches, hidden]
        let mut first = 0;
        for tiles in images {
            let tiles = tiles.borrow();
            let count = tiles.packing.tiles() as i64;
            let own = projected.narrow(0, first, count);
            let newline = self.image_newline.to_kind(self.kind);
            features.push(pack(&own, &tiles.packing, &newline));
            first += count;
        }
        Seen { features, chains }
    }

    /// Runs tiles through tower and projector, `[tiles, patches, hidden]`. No gradients propagate
    /// through parts that are not trained.
    fn look(&self, pixels: &Tensor, keep: SavedActivations, parts: Parts) -> LayerStack<'_> {
        let project: Layer<'_> = Box::new(|features| self.multi_modal_projector.forward(features));
        if parts.has(Part::VisionTower) {
            let mut links = self.vision_tower.links();
            links.push(project);
            return LayerStack::run(links, pixels, keep);
        }
        let features = tch::no_grad(|| self.vision_tower.forward(pixels));
        let keep = if parts.has(Part::Projector) {
            keep
        } else {
            SavedActivations::Nothing
        };
        LayerStack::run(vec![project], &features, keep)
    }

    /// The embeddings of a prompt, `[tokens, hidden]`; `features` are those of its images.
    pub fn embed_prompt(&self, text: &PromptIds, features: &[Tensor]) -> Tensor {
        let ids = Tensor::from_slice(&text.ids).to_device(self.device());
        let words = |range: Range<usize>| {
            let ids = ids.narrow(0, range.start as i64, range.len() as i64);
            self.language_model.embed(&ids).to_kind(self.kind)
        };
        // Slices and one `cat` instead of a scatter by index: their gradients are deterministic.
        let mut runs = Vec::new();
        let mut next = 0;
        for (place, features) in text.images.iter().zip(features) {
            assert_eq!(
                features.size()[0],
                place.len() as i64,
                "one feature per token"
            );
            runs.push(words(next..place.start));
            runs.push(features.shallow_clone());
            next = place.end;
        }
        runs.push(words(next..text.ids.len()));
        Tensor::cat(&runs, 0)
    }

    pub fn device(&self) -> Device {
        self.image_newline.device()
    }

    /// The dtype that it computes in.
    pub fn kind(&self) -> Kind {
        self.kind
    }
}

/// True if the checkpoint's embedding is also its head.
pub fn is_tied(checkpoint: &Checkpoint, config: &LlavaOnevisionConfig) -> bool {
    config.tie_word_embeddings || !checkpoint.has(HEAD)
}

/// `linear_2(gelu(linear_1(features)))`.
#[derive(Debug)]
pub struct Projector {
    linear_1: Linear,
    linear_2: Linear,
}

impl Projector {
    fn new(path: &Path, config: &LlavaOnevisionConfig) -> Result<Self, ModelError> {
        let bias = if config.multimodal_projector_bias {
            Bias::Yes
        } else {
            Bias::No
        };
        let hidden = config.text_config.hidden_size as i64;
        let features = config.feature_size() as i64;
        Ok(Self {
            linear_1: Linear::new(&(path / "linear_1"), features, hidden, bias)?,
            linear_2: Linear::new(&(path / "linear_2"), hidden, hidden, bias)?,
        })
    }

    /// Maps `[tiles, patches, features]` to `[tiles, patches, hidden]`.
    pub fn forward(&self, features: &Tensor) -> Tensor {
        let inner = Activation::Gelu.forward(&self.linear_1.forward(features));
        self.linear_2.forward(&inner)
    }
}

/// Arranges the features of an image's tiles (`[tiles, patches², hidden]`) as its tokens
/// (`[tokens, hidden]`): the base tile, then the grid row by row, each row ended by `newline`.
fn pack(features: &Tensor, packing: &Packing, newline: &Tensor) -> Tensor {
    let base = features.get(0); // [patches², hidden]
    let Some(grid) = &packing.grid else {
        return Tensor::cat(&[&base, &newline.unsqueeze(0)], 0);
    };
    let [down, across] = grid.tiles.map(|tiles| tiles as i64);
    let side = packing.patches as i64;
    let mut plane = features
        .narrow(0, 1, down * across)
        .view([down, across, side, side, -1])
        .permute([4, 0, 2, 1, 3])
        .reshape([-1, down * side, across * side]) // [hidden, rows, columns]
        .narrow(1, grid.rows.start as i64, grid.rows.len() as i64)
        .narrow(2, grid.columns.start as i64, grid.columns.len() as i64);
    if let Some(size) = grid.scaled {
        let size = size.map(|length| length as i64);
        plane = plane
            .unsqueeze(0)
            .upsample_bilinear2d(size, false, None, None)
            .squeeze_dim(0);
    }
    let rows = plane.size()[1];
    let newlines = newline.view([-1, 1, 1]).expand([-1, rows, 1], false);
    let lines = Tensor::cat(&[&plane, &newlines], 2); // [hidden, rows, columns + 1]
    Tensor::cat(&[base, lines.flatten(1, 2).transpose(0, 1)], 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ovchat_models::preprocess::Grid;

    /// Numbered features, one per patch, in the tower's order: tile by tile, row by row within a
    /// tile.
    fn numbered(tiles: i64, side: i64) -> Tensor {
        Tensor::arange(tiles * side * side, (Kind::Float, Device::Cpu)).view([
            tiles,
            side * side,
            1,
        ])
    }

    fn packed(packing: &Packing) -> Vec<f32> {
        let features = numbered(packing.tiles() as i64, packing.patches as i64);
        let newline = Tensor::from_slice(&[-1.0f32]);
        Vec::try_from(pack(&features, packing, &newline).flatten(0, 1)).unwrap()
    }

    #[test]
    fn tiles_lie_side_by_side_without_padding_and_rows_end_in_newlines() {
        let packing = Packing {
            patches: 2,
            grid: Some(Grid {
                tiles: [1, 2],
                rows: 0..1,
                columns: 1..4,
                scaled: None,
            }),
        };
        // Base tile 0..4; the grid's first row is 4 5 | 8 9, of which column 0 is padding.
        assert_eq!(packed(&packing), [0., 1., 2., 3., 5., 8., 9., -1.]);
        assert_eq!(packing.tokens(), 8);
    }

    #[test]
    fn a_large_grid_is_scaled_down_before_the_newlines() {
        let packing = Packing {
            patches: 2,
            grid: Some(Grid {
                tiles: [2, 1],
                rows: 0..4,
                columns: 0..2,
                scaled: Some([2, 1]),
            }),
        };
        // Rows 4 5 / 6 7 / 8 9 / 10 11: means of two rows and two columns.
        assert_eq!(packed(&packing), [0., 1., 2., 3., 5.5, -1., 9.5, -1.]);
    }

    #[test]
    fn one_of_several_images_is_its_base_tile_and_a_newline() {
        let packing = Packing {
            patches: 2,
            grid: None,
        };
        assert_eq!(packed(&packing), [0., 1., 2., 3., -1.]);
    }
}
