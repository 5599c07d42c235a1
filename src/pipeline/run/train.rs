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

use super::reconcile::tables_of;
use super::report::{Start, Tally, Unit};
use super::runner::{Runner, took};
use crate::config::{Plan, PlannedStage};
use crate::stages::{Failure, StageContext, StageKind, TableName, TrainStage, TrainingRun};
use ovchat_data::store::{
    CheckpointRecord, Event, Key, Lookup, PartRecord, RunFolder, StateRecord, StoreError,
    TableVersion, TableWriter, files_in, hash_file, write_folder,
};

/// The number of rows that are validated at once before the first step.
const VALIDATED_AT_ONCE: usize = 64;

impl Runner<'_> {
    /// Builds a table of steps and its checkpoint: opens the stage, resumes, steps and saves.
    pub(super) fn train(
        &mut self,
        stage: &PlannedStage,
        round: Option<u32>,
        work: &dyn TrainStage,
    ) -> Result<(), Failure> {
        let table = &stage.name;
        let before = self.make_before(stage, round, work)?;
        let made = self
            .folder
            .manifest()
            .under_way(table.as_str(), round)
            .expect("the table was begun")
            .clone();
        let input_round = self.plan.round_of(work.input(), round);
        let mut rows = Lookup::open(
            self.folder.files(work.input().as_str(), input_round),
            "row_key",
        )?;
        if rows.is_empty() {
            return Err(Failure::Other(format!(
                "`{}` has no rows to train on; to see the rejects, run: pipeline sql {} \
                 \"select reason, count(*) from rejects group by reason\"",
                work.input(),
                self.folder.root().display()
            )));
        }
        let mut models = self.models(stage, round)?;
        let mut inputs = self.input_tables(stage, round)?;
        let interrupt = self.interrupt;
        let seed = self.plan.seed;
        let place = self.folder.place(table.as_str(), round);
        let footer = self.footer(Some(&made.key));
        let writer =
            |first: usize| place.writer(&format!("part-{first:05}"), &work.schema(), &footer);
        let report = RefCell::new(&mut *self.report);
        let said = &mut self.said;
        let mut telemetry = ovchat_models::ModelTelemetry::default();
        let mut ctx = StageContext {
            table,
            round,
            seed,
            models: &mut models,
            input_tables: &mut inputs,
            stopping: &|| interrupt.raised(),
            progress: &mut |_| {},
            telemetry: &mut telemetry,
            say: &mut |text| {
                if said.insert(text.to_owned()) {
                    report.borrow_mut().note(text);
                }
            },
        };
        let batches = work.batches(&ctx, &mut rows)?;
        let mut training = work.begin(&mut ctx, batches.len(), before)?;
        for start in (0..rows.len()).step_by(VALIDATED_AT_ONCE) {
            let some = rows.range(start, VALIDATED_AT_ONCE.min(rows.len() - start))?;
            training.validate(&mut ctx, &some)?;
        }
        if let Some(plan) = training.plan() {
            (ctx.say)(&plan);
        }
        let mut note = |text: &str| report.borrow_mut().note(text);
        let mut done = load_newest_state(&mut self.folder, &made, &mut *training, work, &mut note)?;
        let total = Some(batches.len() as u64);
        report.borrow_mut().start(Start {
            table,
            round,
            unit: Unit::Steps,
            total,
            done: done as u64,
        });
        let mut steps: Vec<RecordBatch> = Vec::new();
        let mut tally = Tally::default();
        let mut first = done;
        let mut begun = Instant::now();
        while done < batches.len() {
            let (epoch, positions) = &batches[done];
            let batch = gather(&mut rows, positions)?;
            let number = done as u32 + 1;
            let step = training.step(&mut ctx, number, *epoch, &batch)?;
            done += 1;
            tally.step(&step, positions.len() as u64);
            steps.push(step);
            report.borrow_mut().figures(&tally.figures);
            report.borrow_mut().progress(done as u64);
            let last = done == batches.len();
            if !last && (done % work.save_every() as usize == 0 || interrupt.raised()) {
                let state = write_state(&self.folder, &made.key, done, &mut *training, work)?;
                let part = part(writer(first), first, &std::mem::take(&mut steps), begun)?;
                begun = Instant::now();
                commit_state(
                    &mut self.folder,
                    (table, round),
                    part,
                    state,
                    work.keep_last(),
                )?;
                first = done;
            }
            if !last && interrupt.raised() {
                return Err(Failure::Interrupted);
            }
        }
        let below = place.checkpoint(&checkpoint_name(self.plan, stage, round));
        let folder = self.folder.root().join(&below);
        write_folder(&folder, |to| -> Result<(), Failure> {
            let saved = training.trainer().save(to);
            saved.map_err(Failure::of(work.model()))
        })?;
        drop(training);
        let part = part(writer(first), first, &steps, begun)?;
        self.folder.commit(Event::Part {
            table: table.to_string(),
            round,
            part,
            state: None,
        })?;
        let checkpoint = checkpoint_record(&folder, below, work)?;
        let over = states(&self.folder, table, round);
        self.finish(table, round, None, Some(checkpoint))?;
        for state in over {
            let _ = fs::remove_dir_all(self.folder.root().join(state));
        }
        Ok(())
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
            let base = Key::new("row").with_json(&because);
            self.map(stage, &name, round, &*map, &base)?;
            self.finish(&name, round, None, None)?;
        }
        // It becomes current together with the training that it belongs to.
        let made = self.folder.manifest().under_way(name.as_str(), round);
        let files = made.map_or_else(Vec::new, |made| self.folder.checked(made.files()));
        let files = files.into_iter().map(|file| file.path).collect();
        Ok(Some(Lookup::open(files, "pair")?))
    }
}

/// Returns the name of a round's checkpoint: `round-2`, plus the table's name if the pipeline has
/// Loads the newest state that can be read, and notes the problems of newer ones. Returns its step,
/// or 0 if there are no states. Steps that no state covers are removed from the record, to be
/// repeated. Fails if no state can be read.
fn load_newest_state(
    folder: &mut RunFolder,
    made: &TableVersion,
    training: &mut dyn TrainingRun,
    work: &dyn TrainStage,
    note: &mut dyn FnMut(&str),
) -> Result<usize, Failure> {
    let mut is_newest = true;
    for state in made.states.iter().rev() {
        let path = folder.root().join(&state.folder);
        match training.trainer().load_state(&path) {
            Ok(()) => {
                if !is_newest {
                    folder.record(made.clone().back_at(state))?;
                }
                return Ok(state.step as usize);
            }
            Err(error) if state.step == made.states[0].step => {
                return Err(Failure::of(work.model())(error));
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

/// Writes the state after `step` steps below `.cache`; it counts once it is committed.
fn write_state(
    folder: &RunFolder,
    key: &str,
    step: usize,
    training: &mut dyn TrainingRun,
    work: &dyn TrainStage,
) -> Result<StateRecord, Failure> {
    let path = folder.cache()?.join(format!("state-{key}-{step}"));
    write_folder(&path, |to| -> Result<(), Failure> {
        let saved = training.trainer().save_state(to);
        saved.map_err(Failure::of(work.model()))
    })?;
    Ok(StateRecord {
        step: step as u64,
        files: files_in(&path)?,
        folder: below(folder.root(), &path),
    })
}

/// Commits the rows up to a state together with the state, and removes states beyond `keep_last`.
fn commit_state(
    folder: &mut RunFolder,
    (table, round): (&TableName, Option<u32>),
    part: PartRecord,
    state: StateRecord,
    keep_last: u32,
) -> Result<(), Failure> {
    let before = states(folder, table, round);
    folder.commit(Event::Part {
        table: table.to_string(),
        round,
        part,
        state: Some((state, keep_last)),
    })?;
    let now = states(folder, table, round);
    for stale in before.difference(&now) {
        let _ = fs::remove_dir_all(folder.root().join(stale));
    }
    Ok(())
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
fn states(folder: &RunFolder, table: &TableName, round: Option<u32>) -> BTreeSet<String> {
    let made = folder.manifest().under_way(table.as_str(), round);
    let states = made.into_iter().flat_map(|made| &made.states);
    states.map(|state| state.folder.clone()).collect()
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

/// Writes the rows of the steps from `first` on, which began at `begun`.
fn part(
    mut writer: TableWriter,
    first: usize,
    steps: &[RecordBatch],
    begun: Instant,
) -> Result<PartRecord, Failure> {
    for step in steps {
        writer.write(step)?;
    }
    Ok(PartRecord {
        part: first as u32,
        rows_in: steps.len() as u64,
        files: writer.finish()?,
        rejects: Vec::new(),
        telemetry: Vec::new(),
        faults: 0,
        dropped: 0,
        took: Some(took(begun, steps.len() as u64)),
    })
}
