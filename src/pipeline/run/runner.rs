//! A run in progress: its folder, its models, and the versions of the tables that it builds.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::{Path, PathBuf};
use std::time::Instant;

use arrow::datatypes::SchemaRef;
use serde_json::{Value, json};

use super::interrupt::Interrupt;
use super::keys::{Keys, known_key};
use super::models::{Kept, Ready, RunModels};
use super::report::Report;
use super::workers::places::{Workers, processors};
use super::workers::pool::Pool;
use crate::config::{Plan, PlannedStage, View};
use crate::stages::{Failure, InputTables, ModelName, ModelState, TableName};
use ovchat_data::store::{
    CheckpointRecord, Event, FileRecord, Fingerprints, Images, PartRecord, Place, Rates, RunFolder,
    TableVersion, TableWriter, Took, read_file,
};
use ovchat_data::tables::{Reject, RejectClass, Row, Telemetry};
use ovchat_models::ModelLoader;

/// Keys of two entries in the manifest's `source`: the last run that built all tables, and the last
/// run that ended without an error (which may have used `--until`). Each is an object with
/// `command` and `sets`.
pub const LAST_WHOLE: &str = "last_whole";
pub const LAST: &str = "last";

/// A table of the plan, in one round.
pub(super) type Slot<'p> = (&'p PlannedStage, Option<u32>);

/// The failure that ended a run, and its stage.
#[derive(Debug, thiserror::Error)]
#[error("{failure}")]
pub struct RunError {
    pub stage: Option<TableName>,
    pub round: Option<u32>,
    pub failure: Box<Failure>,
}

/// A run in progress.
pub(super) struct Runner<'a> {
    pub(super) plan: &'a Plan,
    pub(super) folder: RunFolder,
    /// The manifest's `source` as the previous run left it, see [`RunFolder::set_source`].
    pub(super) before: Value,
    pub(super) loader: Option<&'a dyn ModelLoader>,
    pub(super) report: &'a mut dyn Report,
    pub(super) interrupt: &'a Interrupt,
    /// The key inputs of the tables, with the keys computed so far.
    pub(super) keys: Keys<'a>,
    /// Notes already printed for stages; each is printed once.
    pub(super) said: HashSet<String>,
    /// The tables reached so far, by round; true if any part of the table was built.
    pub(super) reached: HashMap<(TableName, Option<u32>), bool>,
    /// Files whose checksums have been verified, and files written since, with their SHA-256.
    pub(super) intact: HashSet<(PathBuf, String)>,
    pub(super) rates: Rates,
    /// The policy that the last stage left open.
    pub(super) kept: Kept,
    /// The number of threads of the networks that make the current table; `None` without networks.
    pub(super) threads: Option<u32>,
    /// The workers that compute tables; `None` to compute all in this process.
    pub(super) workers: Option<Workers<'a>>,
    /// Those that the last stage left running.
    pub(super) pool: Option<Pool>,
    /// The rounds whose health this run has.
    pub(super) guarded: HashSet<u32>,
    /// The number of tables that were computed by workers.
    pub(super) jobs: u32,
    /// The end of the names of files that workers write, different in each run.
    pub(super) token: String,
    /// The `--set` arguments of the plan.
    pub(super) sets: Vec<String>,
}

/// The options of a run that it needs from the beginning.
pub(super) struct Opening<'a> {
    pub(super) folder: &'a Path,
    /// The file with the measured rates of this machine.
    pub(super) rates: Option<PathBuf>,
    pub(super) take_over: bool,
    pub(super) workers: Option<Workers<'a>>,
    pub(super) sets: &'a [String],
}

/// The entry of a footer that has the number of threads.
const THREADS: &str = "ovchat.threads";

impl<'a> Runner<'a> {
    /// Opens the run folder.
    pub(super) fn begin(
        plan: &'a Plan,
        opening: &Opening<'a>,
        loader: Option<&'a dyn ModelLoader>,
        report: &'a mut dyn Report,
        interrupt: &'a Interrupt,
    ) -> Result<Self, Failure> {
        let (name, mut say) = (plan.pipeline.as_str(), |text: &str| report.note(text));
        let opened = RunFolder::open_or_wait(opening.folder, name, opening.take_over, &mut say)?;
        let (mut folder, opened) = opened;
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
        Ok(Self {
            before,
            rates: Rates::open(opening.rates.clone()),
            workers: opening.workers.clone(),
            sets: opening.sets.to_vec(),
            ..Self::new(plan, folder, loader, report, interrupt)?
        })
    }

    /// Opens the run folder of another process, as one of its workers.
    pub(super) fn attach(
        plan: &'a Plan,
        folder: &Path,
        loader: Option<&'a dyn ModelLoader>,
        report: &'a mut dyn Report,
        interrupt: &'a Interrupt,
    ) -> Result<Self, Failure> {
        Self::new(plan, RunFolder::read(folder)?, loader, report, interrupt)
    }

    fn new(
        plan: &'a Plan,
        folder: RunFolder,
        loader: Option<&'a dyn ModelLoader>,
        report: &'a mut dyn Report,
        interrupt: &'a Interrupt,
    ) -> Result<Self, Failure> {
        let fingerprints = Fingerprints::open(folder.cache()?.join("fingerprints.json"));
        Ok(Self {
            plan,
            folder,
            before: Value::Null,
            keys: Keys::new(plan, loader, fingerprints),
            loader,
            report,
            interrupt,
            said: HashSet::new(),
            reached: HashMap::new(),
            intact: HashSet::new(),
            rates: Rates::open(None),
            kept: Kept::default(),
            threads: None,
            workers: None,
            pool: None,
            guarded: HashSet::new(),
            jobs: 0,
            token: token(),
            sets: Vec::new(),
        })
    }

    /// Notes the keys of all tables of the folder.
    pub(super) fn know_all(&mut self) {
        for made in &self.folder.manifest().made {
            if made.complete
                && let Some(stage) = self
                    .plan
                    .all()
                    .find(|stage| stage.name.as_str() == made.table)
            {
                let key = known_key(made).to_owned();
                self.keys.know(&stage.name, made.round, key);
            }
        }
    }

    /// Reports a table as up to date, at most once.
    pub(super) fn report_reused(&mut self, table: &TableName, round: Option<u32>, rows: u64) {
        if !self.reached.contains_key(&(table.clone(), round)) {
            self.report.reused(table, round, rows);
        }
    }

    /// Returns the key inputs of a table in a round.
    pub(super) fn because(
        &mut self,
        stage: &PlannedStage,
        round: Option<u32>,
    ) -> Result<Value, Failure> {
        let because = self.keys.because(stage, round)?;
        self.keys.save()?;
        Ok(because)
    }

    /// Completes a table.
    pub(super) fn finish(
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
        let footer = with_oom_retries(self.footer(key.as_deref()), oom_retries);
        Ok(self
            .folder
            .finish(table.as_str(), round, content, checkpoint, &footer)?)
    }

    /// Completes a table whose rows were written in one go.
    pub(super) fn finish_in_one(
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
    pub(super) fn under_way(&self, table: &TableName, round: Option<u32>) -> &TableVersion {
        let made = self.folder.manifest().under_way(table.as_str(), round);
        made.expect("the table was begun")
    }

    /// Sets the number of workers that make a table, and the number of threads of its networks: the one
    /// of its parts or states, if it was begun before, so that the rest is computed to the same bits.
    pub(super) fn fix_processes(
        &mut self,
        stage: &PlannedStage,
        table: &TableName,
        round: Option<u32>,
        workers: Option<u32>,
    ) -> Result<(), Failure> {
        let made = self.under_way(table, round);
        let is_begun = !made.parts.is_empty() || !made.states.is_empty();
        let threads = match made.threads {
            Some(threads) if is_begun => Some(threads),
            _ => {
                let threads = self.keys.threads(stage)?;
                // Workers share the processors.
                let share = processors() / workers.unwrap_or(1) as usize;
                let is_free = std::env::var_os("OMP_NUM_THREADS").is_none();
                threads.map(|threads| match is_free {
                    true => threads.min(share.max(1) as u32),
                    false => threads,
                })
            }
        };
        if made.threads != threads || made.workers != workers {
            let mut made = made.clone();
            (made.threads, made.workers) = (threads, workers);
            self.folder.record(made)?;
        }
        if let Some(loader) = self.loader {
            loader.keep_threads(threads);
        }
        self.threads = threads;
        Ok(())
    }

    /// Commits a part of a table in progress.
    pub(super) fn commit_part(
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

    pub(super) fn stop_if_asked(&self) -> Result<(), Failure> {
        if self.interrupt.raised() {
            Err(Failure::Interrupted)
        } else {
            Ok(())
        }
    }

    /// Returns the files of a stage's inputs in a round, by table.
    pub(super) fn input_files(
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

    pub(super) fn input_tables(
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
    pub(super) fn models(
        &self,
        stage: &PlannedStage,
        round: Option<u32>,
    ) -> Result<RunModels<'a>, Failure> {
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
                backing_model: backing_model.clone(),
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
    pub(super) fn checkpoints(
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
    pub(super) fn writer(
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
    pub(super) fn footer(&self, key: Option<&str>) -> Vec<(&'static str, String)> {
        let mut footer = vec![
            ("ovchat.version", env!("CARGO_PKG_VERSION").to_owned()),
            ("ovchat.pipeline", self.plan.pipeline.as_str().to_owned()),
        ];
        footer.extend(key.map(|key| ("ovchat.key", key.to_owned())));
        if let Some(loader) = self.loader {
            footer.extend(loader.build());
        }
        footer.extend(self.threads.map(|threads| (THREADS, threads.to_string())));
        footer
    }

    pub(super) fn report_finished(&mut self, table: &TableName, round: Option<u32>) {
        if let Some(made) = self.folder.manifest().under_way(table.as_str(), round) {
            let faults = made.parts.iter().map(|part| part.faults).sum();
            let dropped = made.parts.iter().map(|part| part.dropped).sum();
            self.report
                .finished(table, round, made.rows(), faults, dropped);
        }
    }
}

/// Returns the end of the names of files that workers of this run write.
fn token() -> String {
    let random = RandomState::new().build_hasher().finish();
    format!("-{:08x}", random as u32)
}

/// Returns the name of a table in a round, as messages print it.
pub fn titled(table: &TableName, round: Option<u32>) -> String {
    match round {
        Some(round) => format!("{table} (round {round})"),
        None => table.to_string(),
    }
}

/// Writes rows of another kind (such as rejects) that belong to a part of a table.
pub(super) fn write_beside<R: Row>(
    place: &Place,
    kind: &str,
    part: &str,
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
pub(super) fn note_once(said: &mut HashSet<String>, report: &mut dyn Report, text: &str) {
    if said.insert(text.to_owned()) {
        report.note(text);
    }
}

/// Returns the time since `begun`, for a number of computed rows.
pub(super) fn took(begun: Instant, rows: u64) -> Took {
    let seconds = begun.elapsed().as_secs_f64();
    Took { seconds, rows }
}

/// Counts the rejects of a class.
pub(super) fn count(rejects: &[Reject], class: RejectClass) -> u64 {
    rejects
        .iter()
        .filter(|reject| reject.class == class)
        .count() as u64
}

/// Returns the footer, with the number of OOM retries if there were any: after a retry, responses
/// are batched differently than planned, which changes the last bits of their log-probabilities.
pub(super) fn with_oom_retries(
    mut footer: Vec<(&'static str, String)>,
    oom_retries: u64,
) -> Vec<(&'static str, String)> {
    if oom_retries > 0 {
        footer.push(("ovchat.halvings", oom_retries.to_string()));
    }
    footer
}
