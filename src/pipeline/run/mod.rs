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
mod duplicates;
mod expect;
mod forecast;
mod groups;
mod integrity;
mod interrupt;
mod keys;
mod load;
mod models;
mod query;
mod reconcile;
mod report;
mod rows;
mod sql_judge;
mod stale;
mod stop;
mod train;

pub use announce::listed;
pub use command::withheld;
pub use forecast::{Action, Estimate, Forecast, forecast, forecast_of_run};
pub use interrupt::Interrupt;
pub use keys::{Reason, explain};
use report::Masked;
pub use report::{Figures, Report, Start, Unit};
pub use stale::stale;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use arrow::datatypes::SchemaRef;
use serde_json::{Value, json};

use crate::config::{Plan, PlannedStage, View};
use crate::stages::{Failure, InputTables, ModelName, ModelState, StageKind, TableName};
use keys::{Keys, known_key, table_key};
use models::{Kept, Ready, RunModels};
use ovchat_data::store::{
    CheckpointRecord, Event, FileRecord, Fingerprints, Images, PartRecord, Place, Rates, RunFolder,
    TableVersion, TableWriter, Took, read_file,
};
use ovchat_data::tables::{Reject, RejectClass, Row, Telemetry};
use ovchat_models::ModelLoader;

/// The options of a run.
pub struct Options {
    /// The run's folder.
    pub folder: PathBuf,
    /// Stop once this table has been built for the first time.
    pub until: Option<TableName>,
    /// The [`forecast`] of this run, used to name the tables that it replaces.
    pub forecasts: Vec<Forecast>,
    /// The command line that repeats this run; recorded when the run ends, so that a later run can
    /// print it.
    pub command: String,
    /// The `--set` arguments of this run, recorded in the same way.
    pub sets: Vec<String>,
    /// The file with the measured rates of this machine, see [`ovchat_data::store::Rates`].
    pub rates: Option<PathBuf>,
}

/// Keys of two entries in the manifest's `source`: the last run that built all tables, and the last
/// run that ended without an error (which may have used `--until`). Each is an object with
/// `command` and `sets`.
pub const LAST_WHOLE: &str = "last_whole";
pub const LAST: &str = "last";

/// A table of the plan, in one round.
type Slot<'p> = (&'p PlannedStage, Option<u32>);

/// The counts of tables that a run built and reused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Tables that were built or completed, counted once per round.
    pub made: usize,
    /// Tables that were already up to date.
    pub reused: usize,
}

/// The failure that ended a run, and its stage.
#[derive(Debug, thiserror::Error)]
#[error("{failure}")]
pub struct RunError {
    pub stage: Option<TableName>,
    pub round: Option<u32>,
    pub failure: Box<Failure>,
}

/// Runs a plan in its folder, resuming where an earlier run stopped.
pub fn run(
    plan: &Plan,
    options: &Options,
    loader: Option<&dyn ModelLoader>,
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
    let begun = Runner::begin(plan, options, loader, report, interrupt);
    let mut runner = begun.map_err(|failure| RunError {
        stage: None,
        round: None,
        failure: Box::new(failure),
    })?;
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

/// A run in progress.
struct Runner<'a> {
    plan: &'a Plan,
    folder: RunFolder,
    /// The manifest's `source` as the previous run left it, see [`RunFolder::set_source`].
    before: Value,
    loader: Option<&'a dyn ModelLoader>,
    report: &'a mut dyn Report,
    interrupt: &'a Interrupt,
    /// The key inputs of the tables, with the keys computed so far.
    keys: Keys<'a>,
    /// Notes already printed for stages; each is printed once.
    said: HashSet<String>,
    /// The tables reached so far, by round; true if any part of the table was built.
    reached: HashMap<(TableName, Option<u32>), bool>,
    /// Files whose checksums have been verified, and files written since, with their SHA-256.
    intact: HashSet<(PathBuf, String)>,
    rates: Rates,
    /// The policy that the last stage left open.
    kept: Kept,
}

impl<'a> Runner<'a> {
    fn begin(
        plan: &'a Plan,
        options: &Options,
        loader: Option<&'a dyn ModelLoader>,
        report: &'a mut dyn Report,
        interrupt: &'a Interrupt,
    ) -> Result<Self, Failure> {
        let (mut folder, opened) = RunFolder::open(&options.folder, plan.pipeline.as_str())?;
        if let Some(damage) = opened.damage {
            report.note(&damage);
        }
        for table in opened.lost {
            report.note(&format!(
                "files of `{table}` are missing or corrupt; rebuilding them"
            ));
        }
        let view = |(name, view): &(TableName, View)| json!({ "name": name.as_str(), "query": plan.secrets.hide(&view.query) });
        let views: Vec<Value> = plan.report.iter().map(view).collect();
        let before = folder.manifest().source.clone();
        let mut source = json!({
            "file": plan.path, "pipeline": plan.pipeline.as_str(), "seed": plan.seed, "views": views
        });
        for key in [LAST_WHOLE, LAST] {
            source[key] = before[key].clone();
        }
        folder.set_source(source)?;
        let fingerprints = Fingerprints::open(folder.cache()?.join("fingerprints.json"));
        Ok(Self {
            plan,
            folder,
            before,
            keys: Keys::new(plan, loader, fingerprints),
            loader,
            report,
            interrupt,
            said: HashSet::new(),
            reached: HashMap::new(),
            intact: HashSet::new(),
            rates: Rates::open(options.rates.clone()),
            kept: Kept::default(),
        })
    }

    /// Builds all tables in order, or those up to `until`. Returns the last round if
    /// `rounds.stop_when` ended the rounds.
    fn go_through(
        &mut self,
        slots: &[Slot<'_>],
        until: Option<&TableName>,
    ) -> Result<Option<u32>, RunError> {
        let mut round_before = None;
        self.look_at_images().map_err(|failure| RunError {
            stage: None,
            round: None,
            failure: Box::new(failure),
        })?;
        for &(stage, round) in slots {
            if let Some(ended) = round_before.filter(|&ended| round > Some(ended) && ended > 0)
                && self.is_last(ended).map_err(|failure| RunError {
                    stage: None,
                    round: None,
                    failure: Box::new(failure),
                })?
            {
                return Ok(Some(ended));
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
                break;
            }
        }
        Ok(None)
    }

    /// Records the end of a run. After a complete run, tables that it did not reach are archived.
    fn end(
        &mut self,
        options: &Options,
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

    /// Reports a table as up to date, at most once.
    fn report_reused(&mut self, table: &TableName, round: Option<u32>, rows: u64) {
        if !self.reached.contains_key(&(table.clone(), round)) {
            self.report.reused(table, round, rows);
        }
    }

    /// Returns the key inputs of a table in a round.
    fn because(&mut self, stage: &PlannedStage, round: Option<u32>) -> Result<Value, Failure> {
        let because = self.keys.because(stage, round)?;
        self.keys.save()?;
        Ok(because)
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
        match stage.spec.as_stage().work() {
            StageKind::Load(mut work) => self.load(stage, &mut *work)?,
            StageKind::Rows(work) => {
                let base = self.row_base(stage, round)?;
                self.map(stage, &stage.name, round, &*work, &base)?;
                self.finish(&stage.name, round, None, None)?;
            }
            StageKind::Query(work) => self.query(stage, round, &work)?,
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

    /// Completes a table.
    fn finish(
        &mut self,
        table: &TableName,
        round: Option<u32>,
        content: Option<String>,
        checkpoint: Option<CheckpointRecord>,
    ) -> Result<(), Failure> {
        let made = self.folder.manifest().under_way(table.as_str(), round);
        let key = made.map(|made| made.key.clone());
        let mut oom_retries = 0;
        for file in made.into_iter().flat_map(TableVersion::telemetry) {
            let rows = read_file::<Telemetry>(&self.folder.root().join(&file.file))?;
            oom_retries += rows
                .iter()
                .map(|row| row.halvings.cast_unsigned())
                .sum::<u64>();
        }
        let footer = rows::with_oom_retries(self.footer(key.as_deref()), oom_retries);
        Ok(self
            .folder
            .finish(table.as_str(), round, content, checkpoint, &footer)?)
    }

    /// Completes a table whose rows were written in one go.
    fn finish_in_one(
        &mut self,
        table: &TableName,
        round: Option<u32>,
        rows_in: u64,
        files: Vec<FileRecord>,
        took: Took,
    ) -> Result<(), Failure> {
        let part = PartRecord {
            part: 0,
            rows_in,
            files,
            rejects: Vec::new(),
            telemetry: Vec::new(),
            faults: 0,
            dropped: 0,
            took: Some(took),
        };
        self.commit_part(table, round, part)?;
        self.finish(table, round, None, None)
    }

    /// Returns the version of a table in progress.
    fn under_way(&self, table: &TableName, round: Option<u32>) -> &TableVersion {
        let made = self.folder.manifest().under_way(table.as_str(), round);
        made.expect("the table was begun")
    }

    /// Commits a part of a table in progress.
    fn commit_part(
        &mut self,
        table: &TableName,
        round: Option<u32>,
        part: PartRecord,
    ) -> Result<(), Failure> {
        Ok(self.folder.commit(Event::Part {
            table: table.to_string(),
            round,
            part,
            state: None,
        })?)
    }

    fn stop_if_asked(&self) -> Result<(), Failure> {
        if self.interrupt.raised() {
            Err(Failure::Interrupted)
        } else {
            Ok(())
        }
    }

    /// Returns the files of a stage's inputs in a round, by table.
    fn input_files(
        &self,
        stage: &PlannedStage,
        round: Option<u32>,
    ) -> HashMap<TableName, Vec<PathBuf>> {
        let files = |table: &TableName| {
            self.folder
                .files(table.as_str(), self.plan.round_of(table, round))
        };
        stage
            .inputs
            .iter()
            .map(|(_, table)| (table.clone(), files(table)))
            .collect()
    }

    fn input_tables(
        &self,
        stage: &PlannedStage,
        round: Option<u32>,
    ) -> Result<InputTables, Failure> {
        let images = Images::open(self.folder.root(), &self.folder.manifest().images)?;
        Ok(InputTables::new(
            images,
            self.input_files(stage, round),
            self.folder.root().to_owned(),
        ))
    }

    /// Returns the models as they are in a round, for a stage of `stages` or of `evaluate`.
    fn models(&self, stage: &PlannedStage, round: Option<u32>) -> Result<RunModels<'a>, Failure> {
        let mut models = HashMap::new();
        for used in stage.spec.as_stage().uses() {
            let fingerprint = self.keys.model(stage, &used, round)?;
            let named = &self.plan.models[used.model];
            let backing_model = self.plan.backing_model(used.model);
            let mut spec = self.plan.models[backing_model].clone().opened();
            if used.state == ModelState::Now {
                for checkpoint in self.checkpoints(stage, used.model, round) {
                    let folder = self.folder.root().join(&checkpoint.folder);
                    spec = spec.with_checkpoint(&folder);
                }
            }
            let ready = Ready {
                spec,
                prompt_settings: named.prompt_settings().cloned(),
                fingerprint,
            };
            models.insert((used.model.clone(), used.state), ready);
        }
        Ok(RunModels::new(
            self.loader,
            models,
            self.folder.calls(),
            self.plan.secrets.mask(),
            self.kept.clone(),
        ))
    }

    /// Returns the checkpoints of this run that make up a model for a stage in a round, oldest
    /// first: each training may write a different part of the model.
    fn checkpoints(
        &self,
        stage: &PlannedStage,
        model: &ModelName,
        round: Option<u32>,
    ) -> Vec<&CheckpointRecord> {
        let mut checkpoints = Vec::new();
        let mut training = self.plan.training(stage, model, round);
        while let Some((table, round)) = training {
            let made = self.folder.manifest().find(table.as_str(), Some(round));
            checkpoints.extend(made.and_then(|made| made.checkpoint.as_ref()));
            let stage = self.plan.stage(table).expect("the plan names every table");
            training = self.plan.training(stage, model, Some(round));
        }
        checkpoints.reverse();
        checkpoints
    }

    /// Opens a writer for the rows of a table in progress; the footer records the version and key.
    fn writer(
        &self,
        table: &TableName,
        round: Option<u32>,
        name: &str,
        schema: &SchemaRef,
    ) -> TableWriter {
        let made = self.folder.manifest().under_way(table.as_str(), round);
        let footer = self.footer(made.map(|made| made.key.as_str()));
        let place = self.folder.place(table.as_str(), round);
        place.writer(name, schema, &footer)
    }

    /// Returns the footer metadata of a table's files: version, pipeline, key and build.
    fn footer(&self, key: Option<&str>) -> Vec<(&'static str, String)> {
        let mut footer = vec![
            ("ovchat.version", env!("CARGO_PKG_VERSION").to_owned()),
            ("ovchat.pipeline", self.plan.pipeline.as_str().to_owned()),
        ];
        footer.extend(key.map(|key| ("ovchat.key", key.to_owned())));
        if let Some(loader) = self.loader {
            footer.extend(loader.build());
        }
        footer
    }

    fn report_finished(&mut self, table: &TableName, round: Option<u32>) {
        if let Some(made) = self.folder.manifest().under_way(table.as_str(), round) {
            let faults = made.parts.iter().map(|part| part.faults).sum();
            let dropped = made.parts.iter().map(|part| part.dropped).sum();
            self.report
                .finished(table, round, made.rows(), faults, dropped);
        }
    }
}

/// Returns the name of a table in a round, as messages print it.
pub fn titled(table: &TableName, round: Option<u32>) -> String {
    match round {
        Some(round) => format!("{table} (round {round})"),
        None => table.to_string(),
    }
}

/// Writes rows of another kind (such as rejects) that belong to a part of a table.
fn write_beside<R: Row>(
    place: &Place,
    kind: &str,
    part: u32,
    footer: &[(&'static str, String)],
    rows: &[R],
) -> Result<Vec<FileRecord>, Failure> {
    let mut writer = place.beside(kind, part, &R::schema(), footer);
    if !rows.is_empty() {
        writer.write(&R::to_batch(rows))?;
    }
    Ok(writer.finish()?)
}

/// Shows a note, unless it is in `said` already.
fn note_once(said: &mut HashSet<String>, report: &mut dyn Report, text: &str) {
    if said.insert(text.to_owned()) {
        report.note(text);
    }
}

/// Returns the time since `begun`, for a number of computed rows.
fn took(begun: Instant, rows: u64) -> Took {
    let seconds = begun.elapsed().as_secs_f64();
    Took { seconds, rows }
}

/// Counts the rejects of a class.
fn count(rejects: &[Reject], class: RejectClass) -> u64 {
    rejects
        .iter()
        .filter(|reject| reject.class == class)
        .count() as u64
}
