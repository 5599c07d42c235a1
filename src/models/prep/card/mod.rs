//! What checkpoint folders say before any tensor is opened.
//!
//! Fields are named as in `config.json`. transformers 4.x leaves out of the nested configs whatever
//! equals a class default, so those defaults (`configuration_qwen2.py`, `configuration_llama.py`,
//! `configuration_siglip.py`, `configuration_clip.py`) are part of the format and stand here, each
//! set in one constant.

mod decoder;
mod next_tower;
mod onevision;
mod reward;
mod vision;

pub use decoder::DecoderCard;
pub(super) use next_tower::KNOWN as KNOWN_TOWERS;
pub use onevision::OnevisionCard;
pub(super) use onevision::pinpoints;
pub use reward::{AdapterCard, RewardCard};
pub use vision::{Activation, VisionCard};

use super::PrepError;
use super::section::Section;

/// `dtype` (transformers 5.x) or `torch_dtype` (4.x), if the file says.
fn dtype(file: &Section) -> Result<Option<String>, PrepError> {
    let found = match file.text("dtype")? {
        Some(name) => Some(name),
        None => file.text("torch_dtype")?,
    };
    Ok(found.map(|name| name.strip_prefix("torch.").unwrap_or(name).to_owned()))
}
