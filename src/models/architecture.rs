//! The interface of vision-language architectures, without tensors.
//!
//! An architecture is opened from the config of a checkpoint: it names the tensors, and knows how
//! images and conversations become the network's input. The networks themselves implement
//! `VisionLanguageModel` of the crate `torch`. Everything between the two (sampling, training,
//! memory estimates, token counts) is generic over these two traits.

use std::any::Any;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::checkpoint::names::{self, Tensors};
use crate::checkpoint::{AdapterConfig, CheckpointError, DecoderConfig, Shards, VisionConfig};
use crate::preprocess::{Chat, Packing, Rgb, Tiles};
use crate::{Mask, Part, RowFault};

/// A vision-language architecture with the config of one checkpoint.
pub trait Architecture: fmt::Debug + Send + Sync {
    /// Returns the key of the architecture under `models` in a pipeline file.
    fn name(&self) -> &'static str;

    fn text_config(&self) -> &DecoderConfig;

    fn vision_config(&self) -> &VisionConfig;

    /// Returns the number of layers of the tower that run.
    fn tower_layers(&self) -> usize;

    /// Returns the canonical name and the shape of every tensor that the network needs, in the
    /// order of the forward pass.
    fn tensors(&self) -> Tensors;

    /// Returns the parts that exist, each of which can be trained.
    fn parts(&self) -> &'static [Part];

    /// Returns the conventions for counted tokens that training supports, in addition to
    /// [`Mask::Answer`].
    fn masks(&self) -> &'static [Mask];

    /// Reads the tokenizer in the checkpoint's folder and returns it with the chat format.
    fn chat(&self, folder: &Path) -> Result<Chat, CheckpointError>;

    /// Reads the settings of the image processor in the checkpoint's folder.
    fn images(&self, folder: &Path) -> Result<Arc<dyn ImageProcessor>, CheckpointError>;

    /// Returns the layout of each image of a prompt, whose `[height, width]` are `sizes`.
    fn packings(&self, sizes: &[[usize; 2]]) -> Vec<Packing>;

    /// Returns the layout of a video of this many frames, or the reason why the model takes none.
    fn video_packing(&self, frames: usize) -> Result<Packing, RowFault>;

    /// Returns the minimum number of tokens of an image.
    fn image_tokens_min(&self) -> usize;

    /// Returns the tokens and the tiles of the image that takes the most tokens.
    fn largest_image(&self) -> [usize; 2];

    /// Returns the value itself, for the network that belongs to it.
    fn as_any(&self) -> &dyn Any;
}

/// The image processor of a checkpoint.
pub trait ImageProcessor: fmt::Debug + Send + Sync {
    /// Converts an image of a prompt that has `images` of them to the tower's input.
    fn tiles(&self, image: Rgb, images: usize) -> Result<Tiles, RowFault>;

    /// Converts the frames of a video to the tower's input.
    fn frames(&self, frames: &[Rgb]) -> Result<Tiles, RowFault>;
}

impl dyn Architecture + '_ {
    /// Checks, by the headers, that the files contain every required tensor once and in the right
    /// shape.
    pub fn check(&self, shards: &Shards) -> Result<(), CheckpointError> {
        names::check(&self.tensors(), shards)
    }

    /// Checks, by the headers, that an adapter fits this network.
    pub fn check_adapter(&self, adapter: &AdapterConfig) -> Result<(), CheckpointError> {
        adapter.check(&self.tensors(), names::canonical)
    }
}
