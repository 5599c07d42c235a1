//! `pipeline fork`: a run that goes on from a round of another one.

use std::path::{Path, PathBuf};

use clap::Args;

use super::file::{quoted, shown};
use super::out::line;
use super::{Failed, run_folder};
use crate::config::load;
use crate::store::RunFolder;

/// Begins a run that has the first rounds of another one, to try something else from there on. Its files
/// are shared, not copied, and the other run stays as it is.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  pipeline fork runs/small-world --at 2 --set stages.steps.train_dpo.beta=0.3\n  \
    pipeline fork small-world --at 3 --to runs/longer-answers \\\n    \
    --set stages.candidates.sample.max_new_tokens=256"
)]
pub struct MakeFork {
    /// The run: its folder, or its name below runs/.
    run: PathBuf,
    /// The first round that the new run makes itself; those before stay as they are.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    at: u32,
    /// What is different from there on (may be given again).
    #[arg(long = "set", value_name = "PATH=VALUE")]
    sets: Vec<String>,
    /// The folder of the new run; beside the other one if left out.
    #[arg(long)]
    to: Option<PathBuf>,
}

impl MakeFork {
    pub fn run(&self) -> Result<(), Failed> {
        let folder = run_folder(&self.run);
        let run = RunFolder::read(&folder)?;
        let made = &run.manifest().made;
        let rounds = made.iter().filter(|made| made.complete);
        let last = rounds.filter_map(|made| made.round).max().unwrap_or(0);
        if self.at > last + 1 {
            return Err(Failed::Usage(format!(
                "--at {}: the last round of {} is {last}",
                self.at,
                folder.display()
            )));
        }
        let file = run.manifest().source["file"].as_str();
        let file = file.map(PathBuf::from).filter(|file| file.is_file());
        if let Some(file) = &file {
            load(file, &self.sets, false)?;
        }
        let to = match &self.to {
            Some(to) => to.clone(),
            None => beside(&folder, self.at),
        };
        if to.exists() {
            let words = format!("{} exists; give another folder with --to", to.display());
            return Err(Failed::Words(words));
        }
        run.fork(&to, self.at)?;
        let file = file.unwrap_or_else(|| PathBuf::from("PIPELINE.yaml"));
        let sets: Vec<String> = self
            .sets
            .iter()
            .map(|set| format!(" --set {}", quoted(set)))
            .collect();
        eprintln!(
            "{} has the rounds of {} before {}; go on with:",
            to.display(),
            folder.display(),
            self.at
        );
        let (file, to) = (quoted(&shown(&file)), quoted(&to.display().to_string()));
        line(format_args!(
            "pipeline run {file} --run {to}{}",
            sets.concat()
        ))
    }
}

/// `runs/demo-fork-2`, or the next name that is free.
fn beside(folder: &Path, at: u32) -> PathBuf {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let names = (1..).map(|number| match number {
        1 => folder.with_file_name(format!("{name}-fork-{at}")),
        _ => folder.with_file_name(format!("{name}-fork-{at}-{number}")),
    });
    let mut free = names.filter(|path| !path.exists());
    free.next().expect("there are names enough")
}
