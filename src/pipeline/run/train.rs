//! Running a training: its steps, the states from which it resumes, and the final checkpoint.
//!
//! A state (weights, optimizer, step count) is saved every `save_every` steps together with the
//! `steps` rows up to it, in one commit; a killed training resumes at the last readable state. The
//! final step has no state of its own: the checkpoint is written first, then one commit adds the rows
//! and the checkpoint.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Instant;

use arrow::array::RecordBatch;
use rayon::prelude::*;
use serde_json::Value;

use super::interrupt::Interrupt;
use super::reconcile::tables_of;
use super::report::{Report, Start, Tally, Unit};
use super::runner::{Runner, note_once, took};
use crate::config::{Plan, PlannedStage};
use crate::stages::{Failure, StageContext, StageKind, TableName, TrainStage, TrainingRun};
use ovchat_data::store::{
    CheckpointRecord, Event, Key, Lookup, PartRecord, Place, RunFolder, StateRecord, StoreError,
    TableVersion, files_in, hash_file, write_folder,
};
use ovchat_models::ModelTelemetry;

/// The number of rows that are validated at once before the first step.
const VALIDATED_AT_ONCE: usize = 64;

impl Runner<'_> {
    /// Builds a table of steps and its checkpoint. Validates the examples, resumes from the newest
    /// state, and saves states on the way.
    pub(super) fn train(
        &mut self,
        stage: &PlannedStage,
        round: Option<u32>,
        work: &dyn TrainStage,
    ) -> Result<(), Failure> {
        let before = self.make_before(stage, round, work)?;
        // The trainer needs the memory of the workers' models.
        self.pool = None;
        self.fix_processes(stage, &stage.name, round, None)?;
        let output = self.output(&stage.name, round);
        let examples = self.examples(work, round)?;
        let mut models = self.models(stage, round)?;
        let mut input_tables = self.input_tables(stage, round)?;
        let (interrupt, said) = (self.interrupt, &mut self.said);
        let report = RefCell::new(&mut *self.report);
        let mut ctx = StageContext {
            table: &stage.name,
            round,
            seed: self.plan.seed,
            models: &mut models,
            input_tables: &mut input_tables,
            stopping: &|| interrupt.raised(),
            progress: &mut |_| {},
            telemetry: &mut ModelTelemetry::default(),
            say: &mut |text| note_once(said, &mut **report.borrow_mut(), text),
        };
        let mut training = Training::open(work, output, examples, before, &mut ctx)?;
        training.validate(&mut ctx)?;
        training.resume(&mut self.folder, &mut |text| report.borrow_mut().note(text))?;
        report.borrow_mut().start(training.start(&stage.name));
        while !training.is_done() {
            training.step(&mut ctx)?;
            training.report(&mut **report.borrow_mut());
            if training.is_state_due(interrupt) {
                training.commit_state(&mut self.folder)?;
            }
            if interrupt.raised() && !training.is_done() {
                return Err(Failure::Interrupted);
            }
        }
        let name = checkpoint_name(self.plan, stage, round);
        let checkpoint = training.commit_last(&mut self.folder, &name)?;
        let over = states(&self.folder, stage.name.as_str(), round);
        self.finish(&stage.name, round, None, Some(checkpoint))?;
        remove_states(&self.folder, &over);
        Ok(())
    }

    /// Returns the version of a training's table in progress, and where its files go.
    fn output(&self, table: &TableName, round: Option<u32>) -> Output {
        let made = self.under_way(table, round).clone();
        Output {
            place: self.folder.place(table.as_str(), round),
            footer: self.footer(Some(&made.key)),
            made,
        }
    }

    /// Opens the rows to train on; fails if there are none.
    fn examples(&self, work: &dyn TrainStage, round: Option<u32>) -> Result<Lookup, Failure> {
        let table = work.input();
        let input_round = self.plan.round_of(table, round);
        let rows = Lookup::open(self.folder.files(table.as_str(), input_round), "row_key")?;
        if rows.is_empty() {
            return Err(Failure::Other(format!(
                "`{table}` has no rows to train on; to see the rejects, run: pipeline sql {} \
                 \"select reason, count(*) from rejects group by reason\"",
                self.folder.root().display()
            )));
        }
        Ok(rows)
    }

    /// Returns the key inputs of the table that a training needs before its first step, and its
    /// key. Of the stage's settings, only `settings` affect it.
    fn key_inputs_before(
        &mut self,
        stage: &PlannedStage,
        round: Option<u32>,
        settings: Value,
    ) -> Result<(Value, String), Failure> {
        let mut because = self.because(stage, round)?;
        because["settings"] = settings;
        let key = Key::new("before").with_json(&because).finish();
        Ok((because, key))
    }

    /// Restores the tables that belong to a training that was archived and has been restored
    /// complete.
    pub(super) fn restore_before(
        &mut self,
        stage: &PlannedStage,
        round: Option<u32>,
    ) -> Result<(), Failure> {
        for name in tables_of(stage).iter().skip(1) {
            let StageKind::Train(work) = stage.spec.as_stage().work() else {
                continue;
            };
            let settings = work.before_settings();
            let (_, key) = self.key_inputs_before(stage, round, settings)?;
            let manifest = self.folder.manifest();
            let staged = manifest.staged(name.as_str(), round);
            if staged.is_some_and(|made| made.key == key) {
                continue;
            }
            let current = manifest.find(name.as_str(), round);
            let is_there = current.is_some_and(|made| made.key == key);
            self.folder.archive_staged(name.as_str(), round)?;
            if !is_there {
                self.folder.restore(name.as_str(), round, &key, None)?;
            }
        }
        Ok(())
    }

    /// Builds the table that the work needs before its first step, and opens it.
    fn make_before(
        &mut self,
        stage: &PlannedStage,
        round: Option<u32>,
        work: &dyn TrainStage,
    ) -> Result<Option<Lookup>, Failure> {
        let Some((name, map)) = work.before(&stage.name) else {
            return Ok(None);
        };
        let settings = work.before_settings();
        let (mut because, key) = self.key_inputs_before(stage, round, settings)?;
        let kind = map.schema().metadata().get("kind").cloned();
        if self.reconcile(&name, round, kind.as_deref(), &key, &because, None)? {
            because["inputs"] = Value::Null;
            self.map(stage, &name, round, &*map, &because)?;
            self.finish(&name, round, None, None)?;
        }
        // It becomes current together with the training that it belongs to.
        let made = self.folder.manifest().under_way(name.as_str(), round);
        let files = made.map_or_else(Vec::new, |made| self.folder.checked(made.files()));
        let files = files.into_iter().map(|file| file.path).collect();
        Ok(Some(Lookup::open(files, "pair")?))
    }
}

/// The version that a training builds, and where the files of its table go.
struct Output {
    /// The version as this run found it.
    made: TableVersion,
    place: Place,
    footer: Vec<(&'static str, String)>,
}

/// A training in progress.
struct Training<'w> {
    work: &'w dyn TrainStage,
    output: Output,
    /// The rows to train on.
    examples: Lookup,
    /// The epoch and the positions of the examples of each step.
    batches: Vec<(u32, Vec<u32>)>,
    run: Box<dyn TrainingRun + 'w>,
    /// The number of steps done.
    done: usize,
    /// The rows of the steps since the last commit, which was at `since`.
    uncommitted: Vec<RecordBatch>,
    since: Instant,
    tally: Tally,
}

impl<'w> Training<'w> {
    /// Opens the trainer. `before` is the table that it needs before the first step.
    fn open(
        work: &'w dyn TrainStage,
        output: Output,
        mut examples: Lookup,
        before: Option<Lookup>,
        ctx: &mut StageContext<'_>,
    ) -> Result<Self, Failure> {
        let batches = work.batches(ctx, &mut examples)?;
        let run = work.begin(ctx, batches.len(), before)?;
        Ok(Self {
            work,
            output,
            examples,
            batches,
            run,
            done: 0,
            uncommitted: Vec::new(),
            since: Instant::now(),
            tally: Tally::default(),
        })
    }

    /// Validates all examples, and then describes how the training runs.
    fn validate(&mut self, ctx: &mut StageContext<'_>) -> Result<(), Failure> {
        let total = self.examples.len();
        for start in (0..total).step_by(VALIDATED_AT_ONCE) {
            let some = self
                .examples
                .range(start, VALIDATED_AT_ONCE.min(total - start))?;
            self.run.validate(ctx, &some)?;
        }
        if let Some(plan) = self.run.plan() {
            (ctx.say)(&plan);
        }
        Ok(())
    }

    /// Resumes from the newest state that can be read, and notes the problems of newer ones. Steps
    /// that no state covers are removed from the record, to be repeated. Fails if there are states
    /// and none can be read.
    fn resume(
        &mut self,
        folder: &mut RunFolder,
        note: &mut dyn FnMut(&str),
    ) -> Result<(), Failure> {
        self.done = self.load_newest_state(folder, note)?;
        self.since = Instant::now();
        Ok(())
    }

    /// Loads the newest state that can be read. Returns its step, or 0 if there are no states.
    fn load_newest_state(
        &mut self,
        folder: &mut RunFolder,
        note: &mut dyn FnMut(&str),
    ) -> Result<usize, Failure> {
        let made = &self.output.made;
        let mut is_newest = true;
        for state in made.states.iter().rev() {
            let path = folder.root().join(&state.folder);
            match self.run.trainer().load_state(&path) {
                Ok(()) => {
                    if !is_newest {
                        folder.record(made.clone().back_at(state))?;
                    }
                    return Ok(state.step as usize);
                }
                Err(error) if state.step == made.states[0].step => {
                    return Err(Failure::of(self.work.model())(error));
                }
                Err(error) => {
                    is_newest = false;
                    note(&format!("{error}; resuming from the previous state"));
                }
            }
        }
        if !made.parts.is_empty() {
            let mut made = made.clone();
            made.parts.clear();
            folder.record(made)?;
        }
        Ok(0)
    }

    /// Returns the report of the start, or of the resumption.
    fn start<'t>(&self, table: &'t TableName) -> Start<'t> {
        Start {
            table,
            round: self.output.made.round,
            unit: Unit::Steps,
            total: Some(self.batches.len() as u64),
            done: self.done as u64,
        }
    }

    fn is_done(&self) -> bool {
        self.done >= self.batches.len()
    }

    /// Runs the next step.
    fn step(&mut self, ctx: &mut StageContext<'_>) -> Result<(), Failure> {
        let (epoch, positions) = &self.batches[self.done];
        let batch = gather(&mut self.examples, positions)?;
        let number = self.done as u32 + 1;
        let step = self.run.step(ctx, number, *epoch, &batch)?;
        self.tally.step(&step, positions.len() as u64);
        self.uncommitted.push(step);
        self.done += 1;
        Ok(())
    }

    /// Reports the figures of the last step.
    fn report(&self, report: &mut dyn Report) {
        report.figures(&self.tally.figures);
        report.progress(self.done as u64);
    }

    /// True if the state after the last step is to be saved: every `save_every` steps, and at an
    /// interrupt. The final step has the checkpoint in its place.
    fn is_state_due(&self, interrupt: &Interrupt) -> bool {
        let is_due = self.done.is_multiple_of(self.work.save_every() as usize);
        !self.is_done() && (is_due || interrupt.raised())
    }

    /// Saves the state after the last step together with the rows up to it, and removes states
    /// beyond `keep_last`.
    fn commit_state(&mut self, folder: &mut RunFolder) -> Result<(), Failure> {
        let state = self.write_state(folder)?;
        let part = self.write_part()?;
        let (table, round) = (self.output.made.table.clone(), self.output.made.round);
        let before = states(folder, &table, round);
        folder.commit(Event::Part {
            table: table.clone(),
            round,
            part,
            state: Some((state, self.work.keep_last())),
        })?;
        let now = states(folder, &table, round);
        remove_states(folder, before.difference(&now));
        Ok(())
    }

    /// Writes the checkpoint `name`, then commits the rows up to the final step. Returns the record
    /// of the checkpoint, which counts once the table is finished.
    fn commit_last(
        mut self,
        folder: &mut RunFolder,
        name: &str,
    ) -> Result<CheckpointRecord, Failure> {
        let below = self.output.place.checkpoint(name);
        let path = folder.root().join(&below);
        write_folder(&path, |to| -> Result<(), Failure> {
            let saved = self.run.trainer().save(to);
            saved.map_err(Failure::of(self.work.model()))
        })?;
        let part = self.write_part()?;
        drop(self.run);
        folder.commit(Event::Part {
            table: self.output.made.table,
            round: self.output.made.round,
            part,
            state: None,
        })?;
        Ok(checkpoint_record(&path, below, self.work)?)
    }

    /// Writes the state after the last step below `.cache`; it counts once it is committed.
    fn write_state(&mut self, folder: &RunFolder) -> Result<StateRecord, Failure> {
        let name = format!("state-{}-{}", self.output.made.key, self.done);
        let path = folder.cache()?.join(name);
        write_folder(&path, |to| -> Result<(), Failure> {
            let saved = self.run.trainer().save_state(to);
            saved.map_err(Failure::of(self.work.model()))
        })?;
        Ok(StateRecord {
            step: self.done as u64,
            files: files_in(&path)?,
            folder: below(folder.root(), &path),
        })
    }

    /// Writes the rows of the steps since the last commit.
    fn write_part(&mut self) -> Result<PartRecord, Failure> {
        let steps = std::mem::take(&mut self.uncommitted);
        let first = self.done - steps.len();
        let Output { place, footer, .. } = &self.output;
        let mut writer = place.writer(&format!("part-{first:05}"), &self.work.schema(), footer);
        for step in &steps {
            writer.write(step)?;
        }
        let part = PartRecord {
            part: first as u32,
            rows_in: steps.len() as u64,
            files: writer.finish()?,
            rejects: Vec::new(),
            telemetry: Vec::new(),
            faults: 0,
            dropped: 0,
            took: Some(took(self.since, steps.len() as u64)),
        };
        self.since = Instant::now();
        Ok(part)
    }
}

/// Returns the record of a written checkpoint, with the hash of each of its files.
fn checkpoint_record(
    folder: &Path,
    below: String,
    work: &dyn TrainStage,
) -> Result<CheckpointRecord, StoreError> {
    let files = files_in(folder)?;
    let sha256: BTreeMap<String, String> = files
        .par_iter()
        .map(|(name, _)| Ok((name.clone(), hash_file(&folder.join(name))?)))
        .collect::<Result<_, StoreError>>()?;
    Ok(CheckpointRecord {
        model: work.model().to_string(),
        files,
        sha256,
        folder: below,
    })
}

/// Returns the name of a round's checkpoint: `round-2`, plus the table's name if the pipeline has
/// several training stages.
fn checkpoint_name(plan: &Plan, stage: &PlannedStage, round: Option<u32>) -> String {
    let round = round.unwrap_or(1);
    match plan.trainings().count() {
        1 => format!("round-{round}"),
        _ => format!("round-{round}-{}", stage.name),
    }
}

/// Returns the folder of the checkpoint that a training writes, relative to the run folder; `None`
/// for other stages.
pub(super) fn checkpoint_of(
    plan: &Plan,
    stage: &PlannedStage,
    round: Option<u32>,
) -> Option<String> {
    stage.trained()?;
    Some(format!(
        "checkpoints/{}",
        checkpoint_name(plan, stage, round)
    ))
}

/// Returns the folders of a training's saved states.
fn states(folder: &RunFolder, table: &str, round: Option<u32>) -> BTreeSet<String> {
    let made = folder.manifest().under_way(table, round);
    let states = made.into_iter().flat_map(|made| &made.states);
    states.map(|state| state.folder.clone()).collect()
}

/// Removes the folders of states; one that stays is not in the manifest and does not count.
fn remove_states<'s>(folder: &RunFolder, states: impl IntoIterator<Item = &'s String>) {
    for state in states {
        let _ = fs::remove_dir_all(folder.root().join(state));
    }
}

/// Returns a path relative to the run folder, as the manifest stores it.
fn below(root: &Path, path: &Path) -> String {
    path.strip_prefix(root)
        .unwrap_or(path)
        .to_string_lossy()
        .into_owned()
}

/// Returns the rows at the given positions, as one batch.
fn gather(rows: &mut Lookup, positions: &[u32]) -> Result<RecordBatch, Failure> {
    let batches: Vec<RecordBatch> = positions
        .iter()
        .map(|&position| rows.range(position as usize, 1))
        .collect::<Result<_, _>>()?;
    let schema = batches[0].schema();
    Ok(arrow::compute::concat_batches(&schema, &batches)
        .expect("rows of one table have one schema"))
}
