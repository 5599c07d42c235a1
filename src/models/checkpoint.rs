//! The files of a checkpoint, read without loading tensors: configs, shards, names and shapes of
//! tensors, memory sizes, and the conversion between the layouts of transformers and LLaVA-NeXT.

pub(crate) mod config;
pub(crate) mod conversion;
pub(crate) mod json;
pub(crate) mod memory;
pub(crate) mod names;
pub(crate) mod reward_names;
pub(crate) mod shards;

use std::path::{Path, PathBuf};

pub use config::{
    Activation, AdapterConfig, DecoderConfig, LlavaOnevisionConfig, LlavaRlhfConfig, VisionConfig,
};
pub use conversion::Conversion;
pub use memory::{
    AtOnce, IMAGES_AHEAD, IMAGES_AT_ONCE_MAX, Sizes, TrainingSizes, elements, judge_elements,
    learned_logits, pack_tokens_max, size_in_words,
};
pub use names::{Tensors, canonical, part_of};
pub use reward_names::{HEAD_FILE, TWO_LAYERS, is_module, lora_matrix};
pub use shards::{Element, Shards, TensorInfo, TensorLocation, write_pickle};

use crate::ModelError;

/// A missing or invalid file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub struct CheckpointError {
    /// The file, or the folder that lacks a file.
    pub path: PathBuf,
    /// The problem, and the fix if there is one.
    pub problem: String,
}

impl CheckpointError {
    pub(crate) fn new(path: &Path, problem: impl Into<String>) -> Self {
        Self {
            path: path.to_owned(),
            problem: problem.into(),
        }
    }

    pub(crate) fn io(path: &Path, error: &std::io::Error) -> Self {
        Self::new(path, format!("cannot be read: {error}"))
    }
}

impl From<CheckpointError> for ModelError {
    fn from(error: CheckpointError) -> Self {
        Self::Weights {
            path: error.path,
            problem: error.problem,
        }
    }
}
