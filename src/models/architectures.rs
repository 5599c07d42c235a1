//! The list of vision-language architectures.

pub mod llava;
pub mod llava_onevision;

use std::path::Path;
use std::sync::Arc;

use self::llava::Llava;
use self::llava_onevision::LlavaOnevision;
use crate::architecture::Architecture;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::json::JsonConfig;

/// Tells whether a config belongs to an architecture, and opens the checkpoint.
struct Entry {
    name: &'static str,
    is_of: fn(&JsonConfig) -> Result<bool, CheckpointError>,
    open: fn(&Path) -> Result<Arc<dyn Architecture>, CheckpointError>,
    text: ChatText,
}

/// The text of a chat format, to compare with a checkpoint's chat template.
#[derive(Debug, Clone, Copy)]
pub struct ChatText {
    /// Returns the text of one question about one image.
    pub rendered: fn(&str) -> String,
    /// The system text that is used by default.
    pub system: Option<&'static str>,
}

/// All architectures.
const ALL: [Entry; 2] = [
    Entry {
        name: llava_onevision::NAME,
        is_of: llava_onevision::is_of,
        open: |folder| Ok(Arc::new(LlavaOnevision::open(folder)?)),
        text: ChatText {
            rendered: llava_onevision::rendered,
            system: Some(llava_onevision::SYSTEM),
        },
    },
    Entry {
        name: llava::NAME,
        is_of: llava::is_of,
        open: |folder| Ok(Arc::new(Llava::open(folder)?)),
        text: ChatText {
            rendered: llava::rendered,
            system: None,
        },
    },
];

/// Returns the architecture of the checkpoint in `folder`, by its `config.json`.
fn entry(folder: &Path) -> Result<&'static Entry, CheckpointError> {
    let file = JsonConfig::open(&folder.join("config.json"))?;
    for entry in &ALL {
        if (entry.is_of)(&file)? {
            return Ok(entry);
        }
    }
    let names = "expected `llava_onevision`, `llava_qwen` (LLaVA-NeXT) or `llava`";
    Err(match file.text("model_type")? {
        Some(other) => file.fault("model_type", format!("is `{other}`, {names}")),
        None => file.fault("model_type", format!("is missing, {names}")),
    })
}

/// Returns the name of the architecture of the checkpoint in `folder`.
pub fn name_of(folder: &Path) -> Result<&'static str, CheckpointError> {
    Ok(entry(folder)?.name)
}

/// Returns the text of the chat format of the checkpoint in `folder`.
pub fn chat_text(folder: &Path) -> Result<ChatText, CheckpointError> {
    Ok(entry(folder)?.text)
}

/// Opens the architecture of the checkpoint in `folder` from its config.
pub fn open(folder: &Path) -> Result<Arc<dyn Architecture>, CheckpointError> {
    (entry(folder)?.open)(folder)
}
