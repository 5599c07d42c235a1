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

use std::path::Path;

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

/// Rejects a config of quantized weights.
pub(crate) fn not_quantized(file: &JsonConfig) -> Result<(), CheckpointError> {
    if file.get("quantization_config").is_some() {
        let problem = "is set: quantized weights are not supported; use the original weights";
        return Err(file.fault("quantization_config", problem));
    }
    Ok(())
}

/// Reads `eos_token_id` of `generation_config.json`: one, several, or none if there is no such
/// file.
pub(crate) fn eos_token_id(folder: &Path) -> Result<Vec<i64>, CheckpointError> {
    let path = folder.join("generation_config.json");
    if !path.exists() {
        return Ok(Vec::new());
    }
    JsonConfig::open(&path)?.integers("eos_token_id")
}
