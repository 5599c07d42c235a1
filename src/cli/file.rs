//! The pipeline file argument of commands, and the folder of a run.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use clap::Args;

use super::failed::Failed;
use super::out::say;
use ovchat_data::store::RunFolder;
use ovchat_pipeline::config::{Plan, RenderStyle};

/// The pipeline file, and changes to it.
#[derive(Args)]
pub struct PipelineFile {
    /// The pipeline file.
    pub file: PathBuf,
    /// Change a value: --set stages.pairs.select_extremes.margin_min=0.1 (can be repeated).
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub sets: Vec<String>,
}

/// Prints the warnings of a plan.
pub fn warn(plan: &Plan) {
    let look = RenderStyle::detect(std::io::stderr().is_terminal());
    for warning in &plan.warnings {
        eprint!("{}", warning.render(look));
    }
}

/// Returns the folder of a plan's run: the given one, or `runs/<pipeline name>`.
pub fn folder_of(plan: &Plan, given: Option<&Path>) -> PathBuf {
    match given {
        Some(folder) => folder.to_owned(),
        None => PathBuf::from("runs").join(plan.pipeline.as_str()),
    }
}

/// Opens a run for reading. A damaged manifest is restored in memory, with a warning.
pub fn read_run(folder: &Path) -> Result<RunFolder, Failed> {
    let run = RunFolder::read(folder)?;
    if let Some(damage) = &run.manifest().damage {
        say!(
            "warning: {damage}; to write the restored manifest, run `pipeline repair {}`",
            folder.display()
        );
    }
    Ok(run)
}

/// Returns the folder of a run given by the user: a path, or the name of a run below `runs/`.
pub fn run_folder(name: &Path) -> PathBuf {
    let named = Path::new("runs").join(name);
    let is_run = |folder: &Path| folder.join("manifest.json").exists();
    if named.is_dir() && (!name.exists() || (!is_run(name) && is_run(&named))) {
        named
    } else {
        name.to_owned()
    }
}

/// Returns a path relative to the current folder, if it is below it.
pub fn shown(path: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(&here)
        .unwrap_or(path)
        .display()
        .to_string()
}

/// Quotes a word for the shell if necessary.
pub fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,".contains(c);
    if word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}
