//! The interface of vision-language networks.
//!
//! Sampling, scoring in text and training are generic over it. A network owns no cache or other
//! state. What an architecture adds to a prompt besides embeddings goes into [`EncodedImages`] and
//! [`VisionLanguageModel::embed_prompt`]: features that enter several layers of the decoder, or
//! positions of more than one number a token.

use std::fmt;
use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::checkpoint::Parts;
use super::decoder::{Decoder, LmHead};
use super::layer_stack::{Layer, LayerStack, SavedActivations, without_gradients};
use super::vit::Vit;
use ovchat_models::Part;
use ovchat_models::preprocess::{PromptIds, Tiles};

/// A vision-language network: a tower and a projector, a decoder, and its head.
pub trait VisionLanguageModel: fmt::Debug {
    /// Encodes images for training some `parts`, or with [`Parts::NONE`] for inference. Tiles are
    /// batched through the tower across images.
    fn encode(&self, images: &[&Tiles], keep: SavedActivations, parts: Parts) -> EncodedImages<'_>;

    fn decoder(&self) -> &Decoder;

    fn lm_head(&self) -> &LmHead;

    /// The dtype that the network computes in; trained weights are in float32.
    fn kind(&self) -> Kind;

    fn device(&self) -> Device {
        self.decoder().device()
    }

    /// Encodes images for inference, `[tokens, hidden]` each.
    fn image_features(&self, images: &[&Tiles]) -> Vec<Tensor> {
        let keep = SavedActivations::Nothing;
        self.encode(images, keep, Parts::NONE).features
    }

    /// The embeddings of a prompt, `[tokens, hidden]`; `features` are those of its images.
    fn embed_prompt(&self, text: &PromptIds, features: &[Tensor]) -> Tensor {
        let ids = Tensor::from_slice(&text.ids).to_device(self.device());
        let words = |range: Range<usize>| {
            let ids = ids.narrow(0, range.start as i64, range.len() as i64);
            self.decoder().embed(&ids).to_kind(self.kind())
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
}

/// Image features, and the layer stacks for their backward pass.
pub struct EncodedImages<'a> {
    /// The features that represent each image in the sequence, `[tokens, hidden]`.
    pub features: Vec<Tensor>,
    /// The passes of the tiles through tower and projector.
    pub chains: Vec<LayerStack<'a>>,
}

/// The number of tiles that go through the tower at once. The widest activation of the tower is
/// that of its MLP, 12.5 MB per tile in float32 for the published tower of LLaVA-OneVision.
const TILES_AT_ONCE: i64 = 8;

/// Runs the tiles of images through a tower and a projector. Returns the projected features,
/// `[tiles of all, patches, hidden]`, and the layer stacks; `None` without images. No gradients
/// propagate through parts that are not trained.
pub fn project_tiles<'a>(
    tower: &'a Vit,
    project: &dyn Fn() -> Layer<'a>,
    images: &[&Tiles],
    (device, kind): (Device, Kind),
    (keep, parts): (SavedActivations, Parts),
) -> Option<(Tensor, Vec<LayerStack<'a>>)> {
    let pixels: Vec<Tensor> = images
        .iter()
        .map(|tiles| {
            let (count, side) = (tiles.packing.tiles() as i64, tiles.side as i64);
            Tensor::from_slice(&tiles.pixels).view([count, 3, side, side])
        })
        .collect();
    if pixels.is_empty() {
        return None;
    }
    let pass = |pixels: &Tensor| {
        if parts.has(Part::VisionTower) {
            let mut links = tower.links();
            links.push(project());
            return LayerStack::run(links, pixels, keep);
        }
        let features = without_gradients(|| tower.forward(pixels));
        let keep = if parts.has(Part::Projector) {
            keep
        } else {
            SavedActivations::Nothing
        };
        LayerStack::run(vec![project()], &features, keep)
    };
    let pixels = Tensor::cat(&pixels, 0).split(TILES_AT_ONCE, 0);
    let chains: Vec<LayerStack<'a>> = pixels
        .into_iter()
        .map(|pixels| pass(&pixels.to_device(device).to_kind(kind)))
        .collect();
    let projected: Vec<&Tensor> = chains.iter().map(LayerStack::output).collect();
    Some((Tensor::cat(&projected, 0), chains))
}
