//! The row stages: parts of a table's groups are computed, committed and resumed in order.

use std::cell::RefCell;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use serde_json::Value;

use super::groups::{Groups, Taken, id_columns};
use super::models::RunModels;
use super::report::{Start, Tally, Unit};
use super::runner::{Runner, count, note_once, took, with_oom_retries, write_beside};
use crate::config::PlannedStage;
use crate::stages::{
    BatchStage, Failure, InputTables, Outcome, StageContext, StageSpec, TableName, rejects,
};
use ovchat_data::store::{FileRecord, Key, Lookup, PartRecord, Place, TableVersion, Took};
use ovchat_data::tables::{RejectClass, Telemetry};
use ovchat_io::mask::Mask;
use ovchat_models as models;

/// A table in progress.
pub(super) struct Mapping<'w> {
    table: &'w TableName,
    round: Option<u32>,
    work: &'w dyn BatchStage,
    base: &'w Key,
    pub(super) groups: Groups,
    models: RunModels<'w>,
    inputs: InputTables,
    reuse: Vec<Lookup>,
    /// The number of input rows.
    total: u64,
    is_started: bool,
    pub(super) tally: Tally,
}

/// A part that has been computed but not yet written.
pub(super) struct Parcel {
    pub(super) part: u32,
    /// The number of input groups in the part.
    pub(super) groups: u64,
    pub(super) outcomes: Vec<Outcome<RecordBatch>>,
    pub(super) telemetry: Option<Telemetry>,
    pub(super) oom_retries: u64,
    pub(super) took: Took,
    /// The number of input rows done once the part is written.
    pub(super) done: u64,
}

impl<'a> Runner<'a> {
    /// Builds the missing parts of `table`: the stage's own table, or one that it needs first. Each
    /// part is written while the next one is computed. `because` has the key inputs of its rows:
    /// everything that determines a row besides its group, namely the stage's settings and models and,
    /// if it samples, seed, round and table.
    pub(super) fn map(
        &mut self,
        stage: &PlannedStage,
        table: &TableName,
        round: Option<u32>,
        work: &dyn BatchStage,
        because: &Value,
    ) -> Result<(), Failure> {
        let input_round = self.plan.round_of(work.input(), round);
        let files = self.folder.files(work.input().as_str(), input_round);
        let workers = self.workers(stage)?;
        let columns = match workers {
            Some(_) => id_columns(work),
            None => work.reads(),
        };
        let groups = Groups::open(files, columns)?;
        self.fix_processes(stage, table, round, workers)?;
        let part_groups = self.part_groups(stage, work)?;
        let made = self.cut(table, round, part_groups, groups.is_gathered())?;
        if workers.is_some() {
            return self.map_on_workers(stage, table, work, &made, groups, because);
        }
        let base = Key::new("row").with_json(because);
        let pen = Arc::new(self.pen(table, &made, work.schema(), ""));
        let mut mapping = self.mapping(stage, table, work, &base, &made, groups)?;
        let mut writing: Option<Writing> = None;
        let mut done = 0;
        for part in 0.. {
            let taken = match mapping.groups.take(made.part_groups as usize) {
                Ok(taken) => taken,
                Err(failure) => {
                    self.commit_written(table, round, writing)?;
                    return Err(failure);
                }
            };
            if taken.lengths.is_empty() {
                break;
            }
            let done_before = done;
            done += taken.lengths.iter().sum::<usize>() as u64;
            if made.parts.iter().any(|there| there.part == part) {
                continue;
            }
            let computed = self.compute(&mut mapping, part, &taken, done_before);
            // Whatever the outcome of this part, the previous one is complete.
            self.commit_written(table, round, writing.take())?;
            writing = Some(Writing::start(&pen, computed?));
        }
        self.commit_written(table, round, writing)
    }

    fn commit_written(
        &mut self,
        table: &TableName,
        round: Option<u32>,
        writing: Option<Writing>,
    ) -> Result<(), Failure> {
        if let Some(writing) = writing {
            let done = writing.done;
            let written = writing.join()?;
            self.commit_part(table, round, written)?;
            self.report.progress(done);
        }
        Ok(())
    }

    /// Prepares the computation of parts of a version.
    pub(super) fn mapping<'w>(
        &mut self,
        stage: &PlannedStage,
        table: &'w TableName,
        work: &'w dyn BatchStage,
        base: &'w Key,
        made: &TableVersion,
        groups: Groups,
    ) -> Result<Mapping<'w>, Failure>
    where
        'a: 'w,
    {
        let round = made.round;
        let manifest = self.folder.manifest();
        let input_round = self.plan.round_of(work.input(), round);
        let input = manifest.find(work.input().as_str(), input_round);
        Ok(Mapping {
            table,
            round,
            work,
            base,
            groups,
            total: input.map_or(0, TableVersion::rows),
            models: self.models(stage, round)?,
            inputs: self.input_tables(stage, round)?,
            reuse: self.reuse(table, round)?,
            is_started: false,
            tally: Tally::default(),
        })
    }

    /// Returns the number of groups of a part. Answers are batched within a part, and a GPU takes more of
    /// them at once.
    fn part_groups(&self, stage: &PlannedStage, work: &dyn BatchStage) -> Result<u32, Failure> {
        let StageSpec::Sample(sample) = &stage.spec else {
            return Ok(work.part_groups());
        };
        let room = match self.loader {
            Some(loader) => loader
                .room(&self.plan.models[&sample.model])
                .map_err(Failure::of(&sample.model))?,
            None => None,
        };
        Ok(sample.part(room.is_some_and(|room| room.on_gpu)).get())
    }

    /// Returns the version in progress, with the size of its parts: existing parts keep the size of
    /// the run that began them. Parts that an earlier version cut differently are dropped, to be
    /// rebuilt.
    fn cut(
        &mut self,
        table: &TableName,
        round: Option<u32>,
        part_groups: u32,
        is_gathered: bool,
    ) -> Result<TableVersion, Failure> {
        let mut made = self.under_way(table, round).clone();
        if is_gathered && !made.is_gathered {
            made.is_gathered = true;
            made.parts.clear();
            self.folder.record(made.clone())?;
        }
        if made.parts.is_empty() && made.part_groups != part_groups {
            made.part_groups = part_groups;
            self.folder.record(made.clone())?;
        }
        Ok(made)
    }

    /// Returns the writer of the parts of a version, whose file names end in `token`.
    pub(super) fn pen(
        &self,
        table: &TableName,
        made: &TableVersion,
        schema: SchemaRef,
        token: &str,
    ) -> Pen {
        Pen {
            place: self.folder.place(table.as_str(), made.round),
            table: table.clone(),
            round: made.round,
            schema,
            footer: self.footer(None),
            key: made.key.clone(),
            token: token.to_owned(),
            mask: self.plan.secrets.mask(),
        }
    }

    /// Computes a part from its groups. `done_before` is the number of input rows before them.
    pub(super) fn compute(
        &mut self,
        mapping: &mut Mapping<'_>,
        part: u32,
        taken: &Taken,
        done_before: u64,
    ) -> Result<Parcel, Failure> {
        let (table, round) = (mapping.table, mapping.round);
        let Taken { rows, lengths } = taken;
        if !mapping.is_started {
            mapping.is_started = true;
            self.report.start(Start {
                table,
                round,
                unit: Unit::Rows,
                total: Some(mapping.total),
                done: done_before,
            });
        }
        self.stop_if_asked()?;
        let begun = Instant::now();
        let report = RefCell::new(&mut *self.report);
        let interrupt = self.interrupt;
        let said = &mut self.said;
        let mut telemetry = models::ModelTelemetry::default();
        let mut ctx = StageContext {
            table,
            round,
            seed: self.plan.seed,
            models: &mut mapping.models,
            input_tables: &mut mapping.inputs,
            stopping: &|| interrupt.raised(),
            progress: &mut |rows| report.borrow_mut().progress(done_before + rows),
            telemetry: &mut telemetry,
            say: &mut |text| note_once(said, &mut **report.borrow_mut(), text),
        };
        let reuse = &mut mapping.reuse;
        let mut known = |key: &str| {
            for making in reuse.iter_mut() {
                if let Some(rows) = making.get(key)? {
                    return Ok(Some(rows));
                }
            }
            Ok(None)
        };
        let work = mapping.work;
        let (outcomes, computed) = work.make(&mut ctx, rows, lengths, mapping.base, &mut known)?;
        for outcome in &outcomes {
            if let Outcome::Rows(rows) = outcome {
                mapping.tally.rewards(rows);
            }
        }
        report.borrow_mut().figures(&mapping.tally.figures);
        let has_telemetry = telemetry.prompts > 0;
        let device = self.loader.and_then(|loader| loader.peak_device_memory());
        let row = || {
            let row = row_of(&telemetry, table, round, part, begun.elapsed());
            Telemetry {
                peak_device_memory: device.map(u64::cast_signed),
                ..row
            }
        };
        Ok(Parcel {
            part,
            groups: lengths.len() as u64,
            outcomes,
            telemetry: has_telemetry.then(row),
            oom_retries: telemetry.oom_retries,
            took: took(begun, computed),
            done: done_before + lengths.iter().sum::<usize>() as u64,
        })
    }

    /// Returns the rows of superseded versions of this table by row key, latest version first. Each
    /// version has its own index, because the rows of one key are together within one version.
    fn reuse(&self, table: &TableName, round: Option<u32>) -> Result<Vec<Lookup>, Failure> {
        let manifest = self.folder.manifest();
        // The version that a staged one will replace is the latest.
        let current = manifest.find(table.as_str(), round);
        let replaced = current.filter(|_| manifest.staged(table.as_str(), round).is_some());
        let archived = manifest
            .archived
            .iter()
            .rev()
            .map(|archived| &archived.made);
        let mut versions = Vec::new();
        for made in replaced.into_iter().chain(archived) {
            if made.table == table.as_str() && made.round == round {
                let path = |file: &FileRecord| self.folder.root().join(&file.file);
                let files: Vec<_> = made.files().map(path).collect();
                versions.push(Lookup::open(files, "row_key")?);
            }
        }
        Ok(versions)
    }
}

/// A writer of the parts of a table.
pub(super) struct Pen {
    place: Place,
    table: TableName,
    round: Option<u32>,
    schema: SchemaRef,
    footer: Vec<(&'static str, String)>,
    key: String,
    token: String,
    mask: Mask,
}

impl Pen {
    pub(super) fn write(&self, parcel: Parcel) -> Result<PartRecord, Failure> {
        let Parcel { part, .. } = parcel;
        let mut footer = self.footer.clone();
        footer.push(("ovchat.key", self.key.clone()));
        let footer = with_oom_retries(footer, parcel.oom_retries);
        let name = format!("{part:05}{}", self.token);
        let rows = format!("part-{name}");
        let mut writer = self.place.writer(&rows, &self.schema, &footer);
        let mut set_aside = Vec::new();
        for outcome in parcel.outcomes {
            match outcome {
                Outcome::Rows(rows) => writer.write(&rows)?,
                Outcome::SetAside { id, class, reason } => set_aside.push((id, class, reason)),
            }
        }
        let rejects = rejects(&self.table, self.round, set_aside, &self.mask);
        let telemetry = match parcel.telemetry {
            Some(row) => write_beside(&self.place, "telemetry", &name, &self.footer, &[row])?,
            None => Vec::new(),
        };
        Ok(PartRecord {
            part,
            rows_in: parcel.groups,
            files: writer.finish()?,
            rejects: write_beside(&self.place, "rejects", &name, &self.footer, &rejects)?,
            telemetry,
            faults: count(&rejects, RejectClass::Fault),
            dropped: count(&rejects, RejectClass::Dropped),
            took: Some(parcel.took),
        })
    }
}

/// A part that a thread writes.
pub(super) struct Writing {
    thread: JoinHandle<Result<PartRecord, Failure>>,
    /// The number of input rows done once the part is written.
    done: u64,
}

impl Writing {
    pub(super) fn start(pen: &Arc<Pen>, parcel: Parcel) -> Self {
        let (pen, done) = (Arc::clone(pen), parcel.done);
        let thread = thread::spawn(move || pen.write(parcel));
        Self { thread, done }
    }

    /// Waits until the part is written.
    pub(super) fn join(self) -> Result<PartRecord, Failure> {
        self.thread
            .join()
            .expect("the writer thread does not panic")
    }
}

fn row_of(
    telemetry: &models::ModelTelemetry,
    table: &TableName,
    round: Option<u32>,
    part: u32,
    took: Duration,
) -> Telemetry {
    let count = |number: u64| number as i64;
    let places = telemetry.steps * telemetry.rows_max;
    Telemetry {
        stage: table.to_string(),
        round: round.map(u32::cast_signed),
        part: part.cast_signed(),
        prompts: count(telemetry.prompts),
        pictures: count(telemetry.images),
        tower_passes: count(telemetry.tower_passes),
        prompt_tokens: count(telemetry.prompt_tokens),
        shared_tokens: count(telemetry.shared_tokens),
        answer_tokens: count(telemetry.answer_tokens),
        steps: count(telemetry.steps),
        occupancy: (places > 0).then(|| telemetry.step_rows as f64 / places as f64),
        retries: count(telemetry.retries),
        rows_max: count(telemetry.rows_max),
        tokens_max: count(telemetry.tokens_max),
        halvings: count(telemetry.oom_retries),
        seconds_pictures: telemetry.seconds_images,
        seconds_waiting: telemetry.seconds_waiting,
        seconds_tower: telemetry.seconds_tower,
        seconds_prefill: telemetry.seconds_prefill,
        seconds_decode: telemetry.seconds_decode,
        seconds: took.as_secs_f64(),
        peak_memory: peak_memory(),
        peak_device_memory: None,
    }
}

/// Returns the peak memory of this process so far, in bytes; `None` outside Linux.
fn peak_memory() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: i64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}
