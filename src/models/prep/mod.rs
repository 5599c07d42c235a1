//! Pictures and text become numbers, without tensors: what the networks take in, counted exactly.
//!
//! In the order in which a row meets them: a checkpoint's folder says what it is (`section`, `card`,
//! `shards`, `layout`, `processor`), a picture is decoded and resized (`picture`,
//! `resize`), cut for the network that looks at it (`anyres` for the policy, `clip` for the judge),
//! and the text around it becomes token ids (`tokenizer` with `sentencepiece`,
//! `chat`, `vicuna`). [`PolicyPrep`] and [`JudgePrep`] put
//! these together for one checkpoint, and `conversion` lays a policy's out for another program. Nothing here opens a tensor, so `check` and `plan` can count
//! tokens with the very code that the networks run on.

mod section;

mod card;
mod judge_layout;
mod layout;
mod memory;
mod processor;
mod shards;

mod picture;
mod resize;

mod anyres;
mod clip;

mod sentencepiece;
mod tokenizer;

mod chat;
mod template;
mod vicuna;

mod judge;
mod policy;

mod conversion;

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod testbed;

use std::path::{Path, PathBuf};

pub use anyres::{Anyres, Grid, Packing, Tiles};
pub use card::{Activation, AdapterCard, DecoderCard, OnevisionCard, RewardCard, VisionCard};
pub use chat::{Chat, PromptIds};
pub use clip::Clip;
pub use conversion::Conversion;
pub use judge::{JudgeLesson, JudgePrep, Judged};
pub use judge_layout::{HEAD_FILE, TWO_LAYERS, is_module, lora_matrix};
pub use layout::{canonical, part_of};
pub use memory::{
    AtOnce, PACK_TOKENS_MAX, PICTURES_AHEAD, PICTURES_AT_ONCE_MAX, Sizes, TrainingSizes, elements,
    judge_elements, learned_logits, size_in_words,
};
pub use picture::{PIXELS_MAX, Probe, Rgb, decode, probe};
pub use policy::{PolicyLesson, PolicyPrep, Prepared, Written};
pub use processor::Processor;
pub use resize::Bicubic;
pub use shards::{Element, Place, Shards, TensorInfo, write_pickle};
pub use template::{OtherText, other_text};
pub use tokenizer::PlainTokenizer;
pub use vicuna::{IMAGE_TOKEN_INDEX, JudgeIds, Vicuna};

use crate::ModelError;

/// A file of a checkpoint is missing or does not say what it must.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub struct PrepError {
    /// The file, or the folder when a file is missing from it.
    pub path: PathBuf,
    /// What is wrong, and the way out where there is one.
    pub problem: String,
}

impl PrepError {
    fn new(path: &Path, problem: impl Into<String>) -> Self {
        Self {
            path: path.to_owned(),
            problem: problem.into(),
        }
    }

    fn io(path: &Path, error: &std::io::Error) -> Self {
        Self::new(path, format!("can't be read: {error}"))
    }
}

impl From<PrepError> for ModelError {
    fn from(error: PrepError) -> Self {
        Self::Weights {
            path: error.path,
            problem: error.problem,
        }
    }
}
