//! The runner: builds the tables and checkpoints of a plan in a run folder.
//!
//! The runner goes through the plan's stages, round by round. For each table it computes a key from
//! the table's key inputs. A table that exists under that key is reused, an unfinished one is
//! resumed, and one built under another key is archived and rebuilt, row by row, reusing every row
//! of the old version that is still valid. Each kind of work (`load`, `map`, `query`, `command`,
//! `train`) has its own file.

mod announce;
mod await_labels;
mod command;
mod compute;
mod duplicates;
mod expect;
mod forecast;
mod groups;
mod health;
mod integrity;
mod interrupt;
mod keys;
mod load;
mod models;
mod options;
mod query;
mod reconcile;
mod report;
mod rows;
mod runner;
mod sql_judge;
mod stale;
mod stop;
mod train;
mod workers;

pub use announce::listed;
pub use command::withheld;
pub use forecast::{Action, Estimate, Forecast, forecast, forecast_of_run};
pub use health::{BestRound, best_round, has_health, health_of, rounded};
pub use interrupt::Interrupt;
pub use keys::{Reason, explain};
pub use options::Options;
use report::Masked;
pub use report::{Figures, Report, Start, Unit};
pub use runner::{LAST, LAST_WHOLE, RunError, titled};
pub use stale::stale;
pub use workers::places::{Ranks, Workers, number_of as workers_of};
pub use workers::pool::WorkerCommand;
pub use workers::{follow, work};

use std::collections::HashSet;
use std::path::Path;

use serde_json::{Value, json};

use crate::config::{Plan, PlannedStage};
use crate::stages::{Failure, StageKind, TableName};
use keys::{known_key, table_key};
use ovchat_data::store::TableVersion;
use ovchat_models::ModelLoader;
use runner::{Opening, Runner, Slot};

/// The counts of tables that a run built and reused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Tables that were built or completed, counted once per round.
    pub made: usize,
    /// Tables that were already up to date.
    pub reused: usize,
}

/// Runs a plan in its folder, resuming where an earlier run stopped.
pub fn run<'a>(
    plan: &'a Plan,
    options: &'a Options<'a>,
    loader: Option<&'a dyn ModelLoader>,
    report: &mut dyn Report,
    interrupt: &Interrupt,
) -> Result<Summary, RunError> {
    let report = &mut Masked {
        report,
        secrets: &plan.secrets,
    };
    if let Some(loader) = loader {
        announce::say_placements(plan, options.until.as_ref(), loader, report)?;
    }
    announce::say_workers(plan, options, loader, report)?;
    let opening = Opening {
        folder: &options.folder,
        rates: options.rates.clone(),
        take_over: options.take_over,
        workers: options.workers.clone(),
        sets: &options.sets,
    };
    let begun = Runner::begin(plan, &opening, loader, report, interrupt);
    let failed = |failure| RunError {
        stage: None,
        round: None,
        failure: Box::new(failure),
    };
    let mut runner = begun.map_err(failed)?;
    let ended = run_all(&mut runner, plan, options);
    let has_failed = ended
        .as_ref()
        .is_err_and(|error| !matches!(*error.failure, Failure::Interrupted | Failure::Waiting(_)));
    runner.end_ranks(has_failed);
    ended
}

fn run_all(
    runner: &mut Runner<'_>,
    plan: &Plan,
    options: &Options<'_>,
) -> Result<Summary, RunError> {
    let slots = plan.slots();
    let failed = |failure| RunError {
        stage: None,
        round: None,
        failure: Box::new(failure),
    };
    runner.announce(options, &slots);
    let mut mended = HashSet::new();
    let last = loop {
        let ended = runner.go_through(&slots, options.until.as_ref());
        let corrupt = ended.as_ref().err().and_then(RunError::corrupt);
        // A file that is corrupt a second time would be so a third time.
        let corrupt = corrupt.filter(|path| mended.insert(path.to_path_buf()));
        let Some(corrupt) = corrupt.map(Path::to_owned) else {
            break ended?;
        };
        if !runner.mend(&corrupt).map_err(failed)? {
            ended?;
        }
    };
    runner.end(options, &slots, last).map_err(failed)?;
    Ok(runner.summary())
}

impl Runner<'_> {
    /// Builds all tables in order, or those up to `until`. Returns the last round if
    /// `rounds.stop_when` ended the rounds.
    fn go_through(
        &mut self,
        slots: &[Slot<'_>],
        until: Option<&TableName>,
    ) -> Result<Option<u32>, RunError> {
        let mut round_before = None;
        let failed = |failure| RunError {
            stage: None,
            round: None,
            failure: Box::new(failure),
        };
        self.look_at_media().map_err(failed)?;
        for &(stage, round) in slots {
            if let Some(ended) = round_before.filter(|&ended| round > Some(ended)) {
                self.guard(ended).map_err(failed)?;
                if ended > 0 && self.is_last(ended).map_err(failed)? {
                    return Ok(Some(ended));
                }
            }
            round_before = round;
            let made = self.make(stage, round).map_err(|failure| RunError {
                stage: Some(stage.name.clone()),
                round,
                failure: Box::new(failure),
            })?;
            let reached = self.reached.entry((stage.name.clone(), round));
            *reached.or_default() |= made;
            if until == Some(&stage.name) {
                return Ok(None);
            }
        }
        if let Some(ended) = round_before {
            self.guard(ended).map_err(failed)?;
        }
        Ok(None)
    }

    /// Records the end of a run. After a complete run, tables that it did not reach are archived.
    fn end(
        &mut self,
        options: &Options<'_>,
        slots: &[Slot<'_>],
        last: Option<u32>,
    ) -> Result<(), Failure> {
        let is_whole = options.until.is_none();
        if is_whole {
            let is_reached = |slot: &&Slot<'_>| last.is_none() || slot.1 <= last;
            let reached: Vec<Slot<'_>> = slots.iter().filter(is_reached).copied().collect();
            if let Some(last) = last {
                self.announce_end(options, last, &reached);
            }
            self.archive_unplanned(&reached)?;
        }
        if let Some(best) = best_round(&self.folder)?.filter(|_| is_whole) {
            self.report.note(&format!(
                "round {} is the best of {}, with {}: `pipeline export {} checkpoint` takes it",
                best.round,
                best.values.len(),
                rounded(best.value),
                self.folder.root().display()
            ));
        }
        self.keys.save()?;
        let mut source = self.folder.manifest().source.clone();
        let hidden = |text: &String| self.plan.secrets.hide(text);
        let sets: Vec<String> = options.sets.iter().map(hidden).collect();
        let mut done = json!({ "command": hidden(&options.command), "sets": sets });
        done["content"] = json!(self.keys.fingerprints().file(&self.plan.path).ok());
        if is_whole {
            // If a later run fails, readers must not see its file and views.
            done["file"] = source["file"].clone();
            done["views"] = source["views"].clone();
            source[LAST_WHOLE] = done.clone();
        }
        source[LAST] = done;
        Ok(self.folder.set_source(source)?)
    }

    fn summary(&self) -> Summary {
        let made = self.reached.values().filter(|&&made| made).count();
        Summary {
            made,
            reused: self.reached.len() - made,
        }
    }

    /// Builds one table in one round unless it is up to date. Returns true if anything was built.
    fn make(&mut self, stage: &PlannedStage, round: Option<u32>) -> Result<bool, Failure> {
        self.stop_if_asked()?;
        let manifest = self.folder.manifest();
        if let Some(made) = manifest.find(stage.name.as_str(), round)
            && manifest.is_kept(round)
        {
            let rows = made.rows();
            self.look_at_own(stage, round)?;
            self.remember(&stage.name, round);
            self.report_reused(&stage.name, round, rows);
            return Ok(false);
        }
        let because = self.because(stage, round)?;
        let key = table_key(&because);
        let kind = stage.kind;
        let checkpoint = train::checkpoint_of(self.plan, stage, round);
        if !self.reconcile(
            &stage.name,
            round,
            kind,
            &key,
            &because,
            checkpoint.as_deref(),
        )? {
            self.look_at_own(stage, round)?;
            self.restore_before(stage, round)?;
            self.accept(stage, round)?;
            let made = self.folder.manifest().find(stage.name.as_str(), round);
            let rows = made.map_or(0, TableVersion::rows);
            self.report_reused(&stage.name, round, rows);
            return Ok(false);
        }
        self.look_at_inputs(stage, round)?;
        self.refuse_repeated(stage, round)?;
        self.wait_for_people(stage, round)?;
        self.threads = None;
        if self.workers(stage)?.is_none() && !stage.spec.as_stage().uses().is_empty() {
            // Its models are opened here, and need the memory.
            self.pool = None;
        }
        match stage.spec.as_stage().work() {
            StageKind::Load(mut work) => self.load(stage, &mut *work)?,
            StageKind::Rows(work) => {
                let because = of_rows(because);
                self.map(stage, &stage.name, round, &*work, &because)?;
                self.finish(&stage.name, round, None, None)?;
            }
            StageKind::Query(work) => self.query(stage, round, &work)?,
            StageKind::Compute(work) => self.compute_whole(stage, round, &*work)?,
            StageKind::Command(work) => self.command(stage, round, &work)?,
            StageKind::Train(work) => self.train(stage, round, &*work)?,
        }
        self.note_pace(stage, round);
        self.report_finished(&stage.name, round);
        self.accept(stage, round)?;
        let written = self.folder.manifest().find(stage.name.as_str(), round);
        self.intact
            .extend(written.into_iter().flat_map(integrity::all_of));
        Ok(true)
    }

    /// Checks a complete version against the pipeline's expectations and its limit on rejects, then
    /// makes it the version that readers and later stages see.
    fn accept(&mut self, stage: &PlannedStage, round: Option<u32>) -> Result<(), Failure> {
        self.check_rejects(&stage.name, round)?;
        self.expect(stage, round)?;
        for table in reconcile::tables_of(stage) {
            self.folder.replace_by_staged(table.as_str(), round)?;
        }
        self.remember(&stage.name, round);
        self.note_stamps(stage, round);
        Ok(())
    }

    /// Records the time that the rows of a table took. An unwritable cache does not stop the run.
    fn note_pace(&mut self, stage: &PlannedStage, round: Option<u32>) {
        let made = self.folder.manifest().under_way(stage.name.as_str(), round);
        let took = made.and_then(|made| Some((made.took()?, made.bytes(), made.rows())));
        if let (Some((took, bytes, rows)), Ok(pace)) = (took, self.keys.pace(stage)) {
            // Reused rows took no time, but are part of the table like the others.
            let computed = (bytes as f64 * took.rows as f64 / rows.max(1) as f64) as u64;
            drop(self.rates.note(pace, took.rows, took.seconds, computed));
        }
    }

    /// Records the key under which the readers of this table know it.
    fn remember(&mut self, table: &TableName, round: Option<u32>) {
        let made = self
            .folder
            .manifest()
            .find(table.as_str(), round)
            .expect("the table exists");
        let key = known_key(made).to_owned();
        self.keys.know(table, round, key);
    }
}

/// Returns the key inputs of single rows: the table's without those of its inputs, in whose place each
/// row has its group.
fn of_rows(mut because: Value) -> Value {
    because["inputs"] = Value::Null;
    because
}
