//! Configs in checkpoint folders, read before any tensor is loaded.
//!
//! Fields are named as in `config.json`. transformers 4.x omits from nested configs whatever equals
//! a class default, so those defaults (`configuration_qwen2.py`, `configuration_llama.py`,
//! `configuration_siglip.py`, `configuration_clip.py`) are part of the format and defined here,
//! each set in one constant.

mod decoder;
mod llava_next_tower;
mod llava_onevision;
mod llava_rlhf;
mod vision;

pub use decoder::DecoderConfig;
pub(super) use llava_next_tower::KNOWN as KNOWN_TOWERS;
pub use llava_onevision::LlavaOnevisionConfig;
pub(crate) use llava_onevision::pinpoints;
pub use llava_rlhf::{AdapterConfig, LlavaRlhfConfig};
pub use vision::{Activation, VisionConfig};

use crate::checkpoint::CheckpointError;
use crate::checkpoint::json::JsonConfig;

/// Returns `dtype` (transformers 5.x) or `torch_dtype` (4.x), if the file has it.
fn dtype(file: &JsonConfig) -> Result<Option<String>, CheckpointError> {
    let found = match file.text("dtype")? {
        Some(name) => Some(name),
        None => file.text("torch_dtype")?,
    };
    Ok(found.map(|name| name.strip_prefix("torch.").unwrap_or(name).to_owned()))
}
