//! The LLaVA-OneVision network: a SigLIP tower, a projector, the packing of tiles, and a Qwen2
//! decoder.
//!
//! Li et al. 2024, *LLaVA-OneVision: Easy Visual Task Transfer*, arXiv 2408.03326; transformers'
//! `models/llava_onevision/modeling_llava_onevision.py` (`get_image_features`,
//! `pack_image_features`).

use tch::{Kind, Tensor};

use super::casts::cast_weight;
use super::checkpoint::Parts;
use super::decoder::{Decoder, DecoderSizes, LmHead};
use super::layer_stack::{Layer, SavedActivations};
use super::layers::{Activation, Bias, Linear, Path, WeightSource};
use super::vit::{Family, Vit, VitSizes};
use super::vlm::{EncodedImages, VisionLanguageModel, project_tiles};
use ovchat_models::ModelError;
use ovchat_models::checkpoint::LlavaOnevisionConfig;
use ovchat_models::preprocess::{AnyresPacking, FramesPacking, Packing, Tiles};

/// The network; it has no cache or other state.
#[derive(Debug)]
pub struct LlavaOnevision {
    pub vision_tower: Vit,
    pub multi_modal_projector: Projector,
    image_newline: Tensor, // [hidden]
    language_model: Decoder,
    lm_head: LmHead,
    /// The dtype that it computes in; trained weights are in float32.
    kind: Kind,
}

impl LlavaOnevision {
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
            multi_modal_projector: Projector::new(
                &(path / "multi_modal_projector"),
                config.feature_size() as i64,
                hidden,
                config.multimodal_projector_bias,
            )?,
            image_newline: path.take("image_newline", &[hidden])?,
            language_model,
            lm_head,
            kind,
        })
    }
}

impl VisionLanguageModel for LlavaOnevision {
    fn encode(&self, images: &[&Tiles], keep: SavedActivations, parts: Parts) -> EncodedImages<'_> {
        let project =
            || -> Layer<'_> { Box::new(|features| self.multi_modal_projector.forward(features)) };
        let on = (self.device(), self.kind);
        let passes = project_tiles(&self.vision_tower, &project, images, on, (keep, parts));
        let mut features = Vec::with_capacity(images.len());
        let Some((projected, chains)) = passes else {
            let chains = Vec::new();
            return EncodedImages { features, chains };
        };
        let mut first = 0;
        for tiles in images {
            let count = tiles.packing.tiles() as i64;
            let own = projected.narrow(0, first, count);
            let newline = cast_weight(&self.image_newline, self.kind);
            features.push(match &tiles.packing {
                Packing::Anyres(packing) => pack(&own, packing, &newline),
                Packing::Frames(packing) => pack_frames(&own, *packing, &newline),
                Packing::Plain(_) => {
                    unreachable!("the processor of LLaVA-OneVision cuts images into tiles")
                }
            });
            first += count;
        }
        EncodedImages { features, chains }
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

/// `linear_2(gelu(linear_1(features)))`.
#[derive(Debug)]
pub struct Projector {
    linear_1: Linear,
    linear_2: Linear,
}

impl Projector {
    /// Loads the projector from features of size `features` to embeddings of size `hidden`.
    pub fn new(path: &Path, features: i64, hidden: i64, bias: bool) -> Result<Self, ModelError> {
        let bias = if bias { Bias::Yes } else { Bias::No };
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
fn pack(features: &Tensor, packing: &AnyresPacking, newline: &Tensor) -> Tensor {
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

/// Pools the features of a video's frames (`[frames, patches², hidden]`, bilinear, `align_corners`
/// false, no antialias) and arranges them as its tokens (`[tokens, hidden]`), ended by `newline`.
fn pack_frames(features: &Tensor, packing: FramesPacking, newline: &Tensor) -> Tensor {
    let (side, pooled) = (packing.patches as i64, packing.pooled() as i64);
    let pooled = features
        .transpose(1, 2)
        .unflatten(2, [side, side]) // [frames, hidden, patches, patches]
        .upsample_bilinear2d([pooled, pooled], false, None, None)
        .flatten(2, 3)
        .transpose(1, 2) // [frames, pooled², hidden]
        .flatten(0, 1);
    Tensor::cat(&[&pooled, &newline.unsqueeze(0)], 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ovchat_models::preprocess::Grid;
    use tch::Device;

    /// Numbered features, one per patch, in the tower's order: tile by tile, row by row within a
    /// tile.
    fn numbered(tiles: i64, side: i64) -> Tensor {
        Tensor::arange(tiles * side * side, (Kind::Float, Device::Cpu)).view([
            tiles,
            side * side,
            1,
        ])
    }

    fn packed(packing: &AnyresPacking) -> Vec<f32> {
        let features = numbered(packing.tiles() as i64, packing.patches as i64);
        let newline = Tensor::from_slice(&[-1.0f32]);
        Vec::try_from(pack(&features, packing, &newline).flatten(0, 1)).unwrap()
    }

    #[test]
    fn tiles_lie_side_by_side_without_padding_and_rows_end_in_newlines() {
        let packing = AnyresPacking {
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
        let packing = AnyresPacking {
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
        let packing = AnyresPacking {
            patches: 2,
            grid: None,
        };
        assert_eq!(packed(&packing), [0., 1., 2., 3., -1.]);
    }

    /// Values of transformers' `apply_pooling` for 27 patches per side.
    #[test]
    fn frames_are_pooled_as_by_the_reference() {
        let packing = FramesPacking {
            frames: 2,
            patches: 27,
        };
        let ramp = Tensor::arange(27, (Kind::Float, Device::Cpu));
        let ramps = ramp.expand([2, 27, 27], false).reshape([2, 27 * 27, 1]);
        let found = pack_frames(&ramps, packing, &Tensor::from_slice(&[-1.0f32]));
        assert_eq!(found.size(), [packing.tokens() as i64, 1]);
        assert_eq!(packing.tokens(), 393);
        let row = Vec::<f32>::try_from(found.narrow(0, 196 + 14, 14).flatten(0, 1)).unwrap();
        let expected = [
            0.464_286, 2.392_857, 4.321_429, 6.25, 8.178_572, 10.107_143, 12.035_714, 13.964_286,
            15.892_859, 17.821_428, 19.75, 21.678_572, 23.607_143, 25.535_715,
        ];
        for (found, expected) in row.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-5, "{found} {expected}");
        }
        assert_eq!(found.double_value(&[392, 0]), -1.0);
        let impulse = |row: i64, column: i64| {
            let frame = Tensor::zeros([1, 27, 27], (Kind::Float, Device::Cpu));
            let _ = frame.narrow(1, row, 1).narrow(2, column, 1).fill_(1.0);
            let packing = FramesPacking {
                frames: 1,
                patches: 27,
            };
            let newline = Tensor::zeros([1], (Kind::Float, Device::Cpu));
            let found = pack_frames(&frame.reshape([1, 27 * 27, 1]), packing, &newline);
            found.narrow(0, 0, 196).view([14, 14])
        };
        let found = impulse(3, 5);
        assert!((found.double_value(&[1, 2]) - 0.126_276).abs() < 1e-6);
        assert!((found.sum(Kind::Double).double_value(&[]) - 0.126_276).abs() < 1e-6);
        let found = impulse(13, 13);
        for place in [[6, 6], [6, 7], [7, 6], [7, 7]] {
            assert!((found.double_value(&place) - 0.001_275_5).abs() < 1e-7);
        }
    }
}
