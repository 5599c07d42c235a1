//! `pipeline status`: show the progress of a run, also from another shell.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::failed::Failed;
use super::file::{read_run, run_folder};
use super::health;
use super::out::{Output, line, say};
use super::progress::duration;
use ovchat_data::store::{TableVersion, lock_holder};
use ovchat_pipeline::run::{best_round, health_of, stale};

/// Show what a run has built so far, and if it is running.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  pipeline status runs/small-world\n  pipeline status small-world --format json"
)]
pub struct Status {
    /// The run: its folder, or its name below runs/.
    run: PathBuf,
    #[command(flatten)]
    output: Output,
}

impl Status {
    pub fn run(&self) -> Result<(), Failed> {
        let folder = run_folder(&self.run);
        let run = read_run(&folder)?;
        let holder = lock_holder(&folder);
        let manifest = run.manifest();
        let stale = stale(manifest);
        if self.output.is_json() {
            let table = |made: &TableVersion, is_staged: bool| {
                json!({
                    "table": made.table, "staged": is_staged, "round": made.round, "kind": made.kind, "complete": made.complete,
                    "rows": made.rows(), "faults": faults(made), "dropped": dropped(made), "key": made.key,
                    "seconds": made.took().map(|took| took.seconds), "computed": made.took().map(|took| took.rows), "expected": made.expected,
                    "checkpoint": made.checkpoint.as_ref().map(|checkpoint| &checkpoint.folder),
                    "inputs_changed": stale.contains(&made), "workers": made.workers, "threads": made.threads,
                })
            };
            let current = manifest.made.iter().map(|made| table(made, false));
            let staged = manifest.staged.iter().map(|made| table(made, true));
            let tables: Vec<Value> = current.chain(staged).collect();
            return line(format_args!(
                "{:#}",
                json!({
                    "pipeline": manifest.pipeline, "running": holder, "tables": tables,
                    "guard": health::conditions(&health_of(&run).unwrap_or_default()),
                    "best_round": best_round(&run).ok().flatten().map(|best| best.round),
                })
            ));
        }
        match holder {
            Some(holder) => line(format_args!("{}: running, {holder}", manifest.pipeline))?,
            None => line(format_args!("{}: not running", manifest.pipeline))?,
        }
        line(format_args!(
            "{:<24} {:>6} {:>10} {:>10} {:>8} {:>8} {:>12} {:>12}  state",
            "table", "round", "rows", "expected", "faulty", "dropped", "time", "expected"
        ))?;
        let staged = manifest.staged.iter().map(|made| (made, " (new version)"));
        for (made, of) in manifest.made.iter().map(|made| (made, "")).chain(staged) {
            let round = made
                .round
                .map_or_else(|| "-".to_owned(), |round| round.to_string());
            let state = match (made.complete, made.states.last(), &made.checkpoint) {
                (true, _, Some(checkpoint)) => format!("done{of}, {}", checkpoint.folder),
                (true, _, None) => format!("done{of}"),
                (false, Some(state), _) => format!("saved at step {}{of}", state.step),
                (false, None, _) => format!("{} parts{of}", made.parts.len()),
            };
            let workers = made.workers.filter(|_| !made.complete);
            let workers = workers.map_or_else(String::new, |count| format!(", {count} workers"));
            let changed = if stale.contains(&made) {
                "; stale: its inputs changed"
            } else {
                ""
            };
            let (table, rows) = (&made.table, made.rows());
            let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
            line(format_args!(
                "{table:<24} {round:>6} {rows:>10} {:>10} {:>8} {:>8} {:>12} {:>12}  {state}{workers}{changed}",
                or_none(made.expected.rows.map(|rows| rows.to_string())),
                faults(made),
                dropped(made),
                or_none(made.took().map(|took| duration(took.seconds))),
                or_none(made.expected.seconds.map(duration)),
            ))?;
        }
        match (health_of(&run), best_round(&run)) {
            (Ok(rounds), Ok(best)) => {
                for words in health::conditions(&rounds) {
                    line(words)?;
                }
                if let Some(best) = best {
                    line(format_args!("best round so far: {}", best.round))?;
                }
            }
            (Err(error), _) | (_, Err(error)) => say!("warning: the health is unreadable: {error}"),
        }
        Ok(())
    }
}

fn faults(made: &TableVersion) -> u64 {
    made.parts.iter().map(|part| part.faults).sum()
}

fn dropped(made: &TableVersion) -> u64 {
    made.parts.iter().map(|part| part.dropped).sum()
}
