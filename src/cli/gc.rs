//! `pipeline gc`: remove the archived tables of a run.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::failed::Failed;
use super::file::{read_run, run_folder};
use super::out::{Output, line, say};
use super::progress::duration;
use ovchat_data::store::{RunFolder, TableVersion};
use ovchat_models::checkpoint::size_in_words as size;

/// Remove archived tables and checkpoints, which a run keeps when its pipeline changes. Shows the
/// space that this frees and the time to rebuild them, and asks for confirmation.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  pipeline gc runs/small-world\n  pipeline gc small-world --yes\n  \
    pipeline gc small-world --format json"
)]
pub struct Gc {
    /// The run: its folder, or its name below runs/.
    run: PathBuf,
    /// Do not ask for confirmation.
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    output: Output,
}

impl Gc {
    pub fn run(&self) -> Result<(), Failed> {
        let folder = run_folder(&self.run);
        let run = read_run(&folder)?;
        let archived = run
            .manifest()
            .archived
            .iter()
            .map(|archived| &archived.made);
        let archived: Vec<&TableVersion> = archived.collect();
        if self.output.is_json() {
            let tables: Vec<_> = archived.iter().map(|made| to_json(made)).collect();
            let removed = if self.yes { archived.len() } else { 0 };
            if removed > 0 {
                remove(&folder, &run)?;
            }
            let run = folder.display().to_string();
            return line(format_args!(
                "{:#}",
                json!({ "run": run, "set_aside": tables, "removed": removed })
            ));
        }
        if archived.is_empty() {
            say!("{}: no archived tables", folder.display());
            return Ok(());
        }
        line(format_args!(
            "{:<22} {:>5} {:>9} {:>10} {:>14}",
            "table", "round", "rows", "frees", "took"
        ))?;
        let (mut bytes, mut seconds) = (0, 0.0);
        for made in &archived {
            let of_table = bytes_of(made);
            let took = made.took().map_or(0.0, |took| took.seconds);
            bytes += of_table;
            seconds += took;
            line(format_args!(
                "{:<22} {:>5} {:>9} {:>10} {:>14}",
                made.table,
                made.round
                    .map_or_else(|| "-".to_owned(), |round| round.to_string()),
                made.rows(),
                size(of_table),
                duration(took)
            ))?;
        }
        line(format_args!(
            "{} archived tables that the run does not use now; removing them frees {}, rebuilding \
             them takes about {}",
            archived.len(),
            size(bytes),
            duration(seconds)
        ))?;
        if !self.yes && !agreed()? {
            return Ok(());
        }
        let gone = remove(&folder, &run)?;
        say!("removed {gone} tables");
        Ok(())
    }
}

/// Removes the archived tables; returns their number.
fn remove(folder: &Path, run: &RunFolder) -> Result<usize, Failed> {
    let (mut run, opened) = RunFolder::open(folder, &run.manifest().pipeline)?;
    for table in opened.lost {
        say!("files of `{table}` are missing or corrupt; the next run rebuilds them");
    }
    Ok(run.forget_archived()?.len())
}

/// Returns the bytes of a table and its checkpoint.
fn bytes_of(made: &TableVersion) -> u64 {
    let checkpoint = made.checkpoint.iter();
    let checkpoint = checkpoint.flat_map(|checkpoint| checkpoint.files.values());
    made.bytes() + checkpoint.sum::<u64>()
}

fn to_json(made: &TableVersion) -> Value {
    json!({
        "table": made.table, "round": made.round, "rows": made.rows(), "bytes": bytes_of(made),
        "seconds": made.took().map(|took| took.seconds),
    })
}

/// Asks for confirmation on a terminal; elsewhere points to --yes and returns false.
fn agreed() -> Result<bool, Failed> {
    if !std::io::stdin().is_terminal() {
        say!("nothing removed; pass --yes to remove them");
        return Ok(false);
    }
    eprint!("remove them? [y/N] ");
    let asked = std::io::stderr().flush();
    let mut answer = String::new();
    let read = asked.and_then(|()| std::io::stdin().read_line(&mut answer));
    read.map_err(|error| Failed::Words(format!("cannot ask: {error}")))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
