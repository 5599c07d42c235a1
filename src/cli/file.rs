//! The pipeline file that a command is about, and the folder of its run.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use clap::Args;

use ovchat_pipeline::config::{Plan, RenderStyle};

/// A pipeline file and changes to it.
#[derive(Args)]
pub struct PipelineFile {
    /// The pipeline file.
    pub file: PathBuf,
    /// Change a value: --set stages.pairs.select_extremes.margin_min=0.1 (may be given again).
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub sets: Vec<String>,
}

/// Prints what is perhaps not meant.
pub fn warn(plan: &Plan) {
    let look = RenderStyle::detect(std::io::stderr().is_terminal());
    for warning in &plan.warnings {
        eprint!("{}", warning.render(look));
    }
}

/// The folder of a plan's run, unless another is given.
pub fn folder_of(plan: &Plan, given: Option<&Path>) -> PathBuf {
    match given {
        Some(folder) => folder.to_owned(),
        None => PathBuf::from("runs").join(plan.pipeline.as_str()),
    }
}

/// A path as seen from here.
pub fn shown(path: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(&here)
        .unwrap_or(path)
        .display()
        .to_string()
}

/// A word of a shell's command line.
pub fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,".contains(c);
    if word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}
