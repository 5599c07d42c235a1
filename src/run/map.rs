//! Mapping: parts of a table's groups are computed, committed and resumed, one after the other.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use arrow::array::RecordBatch;

use super::groups::{Groups, Taken};
use super::{Runner, count, took};
use crate::config::PlannedStage;
use crate::models;
use crate::run::{Start, Unit};
use crate::stages::{Failure, MapWork, Outcome, Scope, TableName, rejects};
use crate::store::{Event, FileRecord, Key, Lookup, Made, PartRecord, RunFolder, TableWriter};
use crate::tables::{RejectClass, Telemetry};

impl Runner<'_> {
    /// Makes what is missing of `table`, the stage's own table or one that it needs before.
    pub(super) fn map(
        &mut self,
        stage: &PlannedStage,
        table: &TableName,
        round: Option<u32>,
        work: &dyn MapWork,
        base: &Key,
    ) -> Result<(), Failure> {
        let made = self
            .folder
            .manifest()
            .find(table.as_str(), round)
            .expect("a table that was begun")
            .clone();
        let input_round = self.plan.round_of(work.input(), round);
        let total = self
            .folder
            .manifest()
            .find(work.input().as_str(), input_round)
            .map_or(0, Made::rows);
        // Parts that exist were cut as the run that began them was told to.
        let part_groups = if made.parts.is_empty() {
            work.part_groups()
        } else {
            made.part_groups
        };
        if made.part_groups != part_groups {
            self.folder.commit(Event::Begin(Made {
                part_groups,
                ..made.clone()
            }))?;
        }
        let mut reuse = self.reuse(table, round)?;
        let mut models = self.models(stage, round)?;
        let mut shelf = self.shelf(stage, round)?;
        let mut groups = Groups::new(self.folder.reader(work.input().as_str(), input_round));
        let mut rows_done = 0;
        let mut started = false;
        for part in 0.. {
            let Taken { rows, lengths } = groups.take(part_groups as usize)?;
            if lengths.is_empty() {
                break;
            }
            let part_rows = lengths.iter().sum::<usize>() as u64;
            if made.parts.iter().any(|done| done.part == part) {
                rows_done += part_rows;
                continue;
            }
            if !started {
                started = true;
                self.report.start(Start {
                    table,
                    round,
                    unit: Unit::Rows,
                    total: Some(total),
                    done: rows_done,
                });
            }
            self.stop_if_asked()?;
            let begun = Instant::now();
            let report = RefCell::new(&mut *self.report);
            let interrupt = self.interrupt;
            let said = &mut self.said;
            let mut telemetry = models::Telemetry::default();
            let mut scope = Scope {
                table,
                round,
                seed: self.plan.seed,
                models: &mut models,
                shelf: &mut shelf,
                stopping: &|| interrupt.raised(),
                progress: &mut |rows| report.borrow_mut().progress(rows_done + rows),
                telemetry: &mut telemetry,
                say: &mut |text| {
                    if said.insert(text.to_owned()) {
                        report.borrow_mut().note(text);
                    }
                },
            };
            let rows_in = lengths.len() as u64;
            let mut known = |key: &str| {
                for making in &mut reuse {
                    if let Some(rows) = making.get(key)? {
                        return Ok(Some(rows));
                    }
                }
                Ok(None)
            };
            let (outcomes, computed) = work.make(&mut scope, &rows, &lengths, base, &mut known)?;
            rows_done += part_rows;
            let halvings = telemetry.halvings;
            let mut record = self.write_part(
                table, round, part, rows_in, work, outcomes, &made.key, halvings,
            )?;
            record.took = Some(took(begun, computed));
            if telemetry.prompts > 0 {
                let row = row_of(&telemetry, table, round, part, begun.elapsed());
                record.telemetry = self.write_beside("telemetry", table, round, part, &[row])?;
            }
            self.folder.commit(Event::Part {
                table: table.to_string(),
                round,
                part: record,
                state: None,
            })?;
            self.report.progress(rows_done);
        }
        Ok(())
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "each names one thing that a part's file needs"
    )]
    fn write_part(
        &self,
        table: &TableName,
        round: Option<u32>,
        part: u32,
        rows_in: u64,
        work: &dyn MapWork,
        outcomes: Vec<Outcome<RecordBatch>>,
        key: &str,
        halvings: u64,
    ) -> Result<PartRecord, Failure> {
        let stem = format!(
            "{}/part-{part:05}",
            RunFolder::table_folder(table.as_str(), round)
        );
        let footer = with_halvings(self.footer(Some(key)), halvings);
        let mut writer = TableWriter::new(self.folder.root(), &stem, work.schema(), &footer);
        let mut set_aside = Vec::new();
        for outcome in outcomes {
            match outcome {
                Outcome::Made(rows) => writer.write(&rows)?,
                Outcome::SetAside { id, class, reason } => set_aside.push((id, class, reason)),
            }
        }
        let rejects = rejects(table, round, set_aside);
        Ok(PartRecord {
            part,
            rows_in,
            files: writer.finish()?,
            rejects: self.write_beside("rejects", table, round, part, &rejects)?,
            telemetry: Vec::new(),
            faults: count(&rejects, RejectClass::Fault),
            dropped: count(&rejects, RejectClass::Dropped),
            took: None,
        })
    }

    /// What decides a row beside its group: the stage's settings and models and, where it draws,
    /// seed, round and table.
    pub(super) fn row_base(
        &mut self,
        stage: &PlannedStage,
        round: Option<u32>,
    ) -> Result<Key, Failure> {
        let mut because = self.because(stage, round)?;
        because["inputs"] = serde_json::Value::Null;
        Ok(Key::new("row").with_json(&because))
    }

    /// The rows of superseded makings of this table, by their keys; the latest making first. Each has
    /// an index of its own: rows of one key lie together in one making, not in several.
    fn reuse(&self, table: &TableName, round: Option<u32>) -> Result<Vec<Lookup>, Failure> {
        let parked = self.folder.manifest().parked.iter().rev();
        let mut makings = Vec::new();
        for made in parked.map(|parked| &parked.made) {
            if made.table == table.as_str() && made.round == round {
                let path = |file: &FileRecord| self.folder.root().join(&file.file);
                let files: Vec<_> = made.files().map(path).collect();
                makings.push(Lookup::open(files, "row_key")?);
            }
        }
        Ok(makings)
    }
}

fn row_of(
    telemetry: &models::Telemetry,
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
        pictures: count(telemetry.pictures),
        tower_passes: count(telemetry.tower_passes),
        prompt_tokens: count(telemetry.prompt_tokens),
        answer_tokens: count(telemetry.answer_tokens),
        steps: count(telemetry.steps),
        occupancy: (places > 0).then(|| telemetry.step_rows as f64 / places as f64),
        rows_max: count(telemetry.rows_max),
        tokens_max: count(telemetry.tokens_max),
        halvings: count(telemetry.halvings),
        seconds_pictures: telemetry.seconds_pictures,
        seconds_waiting: telemetry.seconds_waiting,
        seconds_tower: telemetry.seconds_tower,
        seconds_prefill: telemetry.seconds_prefill,
        seconds_decode: telemetry.seconds_decode,
        seconds: took.as_secs_f64(),
        peak_memory: peak_memory(),
    }
}

/// A footer that says that memory ran out, if it did: answers then had other neighbors than planned,
/// which shows in the last bits of their log-probabilities.
pub(super) fn with_halvings(
    mut footer: Vec<(&'static str, String)>,
    halvings: u64,
) -> Vec<(&'static str, String)> {
    if halvings > 0 {
        footer.push(("ovchat.halvings", halvings.to_string()));
    }
    footer
}

/// The most memory that this process took so far, in bytes, where Linux tells.
fn peak_memory() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: i64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}
