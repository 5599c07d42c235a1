//! Writing files, with errors that name them.

use std::fs;
use std::path::Path;

use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::PrettyFormatter;

/// The result of a step of this program; the error is meant for the user.
pub type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Writes `bytes` to `path` and creates its folder first.
pub fn write(path: &Path, bytes: &[u8]) -> Outcome<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(())
}

/// Writes `value` as JSON, indented by one space, ending in a newline.
pub fn write_json(path: &Path, value: &impl Serialize) -> Outcome<()> {
    let mut text = Vec::new();
    let formatter = PrettyFormatter::with_indent(b" ");
    value.serialize(&mut Serializer::with_formatter(&mut text, formatter))?;
    text.push(b'\n');
    write(path, &text)
}
