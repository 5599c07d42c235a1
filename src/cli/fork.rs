//! `pipeline fork`: a new run that shares the first rounds of another one.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::failed::Failed;
use super::file::{quoted, read_run, run_folder, shown};
use super::out::{line, say};
use super::verify::refuse_flaws;
use ovchat_data::store::TableVersion;
use ovchat_pipeline::config::load;
use ovchat_pipeline::run::{LAST, LAST_WHOLE, listed, stale};

/// Fork a run: start a new run from a round of an existing one, to try other settings. Files are
/// shared, not copied, and the existing run is unchanged.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  pipeline fork runs/small-world --at 2 --set stages.steps.train_dpo.beta=0.3\n  \
    pipeline fork small-world --at 3 --to runs/longer-answers \\\n    \
    --set stages.candidates.sample.max_new_tokens=256"
)]
pub struct MakeFork {
    /// The run: its folder, or its name below runs/.
    run: PathBuf,
    /// The first round that the new run builds itself; earlier rounds are shared.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    at: u32,
    /// Change a value from that round on (can be repeated).
    #[arg(long = "set", value_name = "PATH=VALUE")]
    sets: Vec<String>,
    /// The folder of the new run [default: next to the existing run].
    #[arg(long)]
    to: Option<PathBuf>,
}

impl MakeFork {
    pub fn run(&self) -> Result<(), Failed> {
        let folder = run_folder(&self.run);
        let run = read_run(&folder)?;
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
        let source = &run.manifest().source;
        let of_last = source[LAST_WHOLE]["file"].as_str();
        let file = of_last.or_else(|| source["file"].as_str());
        let file = file.map(PathBuf::from).filter(|file| file.is_file());
        if let Some(file) = &file {
            load(file, &self.all_sets(&run.manifest().source), false)?;
        }
        let to = match &self.to {
            Some(to) => to.clone(),
            None => beside(&folder, self.at),
        };
        if to.exists() {
            let words = format!(
                "{} already exists; choose another folder with --to",
                to.display()
            );
            return Err(Failed::Words(words));
        }
        let sets = self.all_sets(&run.manifest().source);
        let stale = stale(run.manifest()).into_iter();
        let stale = listed(stale.filter(|made| made.round.is_some_and(|round| round < self.at)));
        let file = file.unwrap_or_else(|| PathBuf::from("PIPELINE.yaml"));
        let quoted_sets = sets.iter().map(|set| format!(" --set {}", quoted(set)));
        let command = format!(
            "pipeline run {} --run {}{}",
            quoted(&shown(&file)),
            quoted(&to.display().to_string()),
            quoted_sets.collect::<String>()
        );
        let mut source = run.manifest().source.clone();
        source[LAST_WHOLE] = Value::Null;
        source[LAST] = json!({ "command": command, "sets": sets });
        let is_shared =
            |made: &&TableVersion| made.complete && made.round.is_none_or(|of| of < self.at);
        refuse_flaws(&run, run.manifest().made.iter().filter(is_shared), true)?;
        run.fork(&to, self.at, source)?;
        if !stale.is_empty() {
            say!(
                "built from earlier versions of their inputs: {stale}; the fork keeps them unchanged"
            );
        }
        say!(
            "{} shares the rounds of {} before {}; to continue, run:",
            to.display(),
            folder.display(),
            self.at
        );
        line(format_args!("{command}"))
    }

    /// Returns the `--set` arguments of the run, except those that the command line overrides,
    /// followed by those of the command line.
    fn all_sets(&self, source: &Value) -> Vec<String> {
        let path = |set: &str| set.split('=').next().unwrap_or(set).to_owned();
        let own: Vec<String> = self.sets.iter().map(|set| path(set)).collect();
        let mut before = [LAST_WHOLE, LAST]
            .into_iter()
            .map(|run| &source[run]["sets"]);
        let before = before.find_map(Value::as_array).into_iter().flatten();
        let mut sets: Vec<String> = before
            .filter_map(|set| set.as_str().map(str::to_owned))
            .filter(|set| !own.contains(&path(set)))
            .collect();
        sets.extend(self.sets.iter().cloned());
        sets
    }
}

/// Returns `runs/demo-fork-2`, or the next unused name.
fn beside(folder: &Path, at: u32) -> PathBuf {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let names = (1..).map(|number| match number {
        1 => folder.with_file_name(format!("{name}-fork-{at}")),
        _ => folder.with_file_name(format!("{name}-fork-{at}-{number}")),
    });
    let mut free = names.filter(|path| !path.exists());
    free.next().expect("the numbers do not run out")
}
