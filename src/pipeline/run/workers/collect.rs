//! The run's side of a table that workers compute: it gives out the parts and commits them.

use std::collections::HashMap;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::dispatch::{Cuts, Dispatch, Drawing, Happened, lost_board};
use super::messages::{
    BEAT_EVERY, Begin, DONE, END, ENDED, FAILED, Lost, PartDone, RankReply, STARTS, TABLES,
    TableOrder,
};
use super::places::{Ranks, devices_of, environments, number_of};
use super::pool::Pool;
use crate::config::{PlanTexts, PlannedStage};
use crate::run::groups::{Groups, groups_of, id_columns};
use crate::run::models::Kept;
use crate::run::report::{Start, Tally, Unit};
use crate::run::rows::Parcel;
use crate::run::runner::{Runner, note_once};
use crate::stages::{BatchStage, Failure, Outcome, TableName};
use ovchat_data::store::{Event, PartRecord, StoreError, TableVersion, Took};

/// The time between two looks at interrupts and at the board.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Parts are committed together, at most this many and, in a cluster, this often.
const COMMIT_PARTS: usize = 64;
const COMMIT_EVERY: Duration = Duration::from_secs(1);

/// The time that the other ranks have to notice the end of the run.
const RANKS_END_WITHIN: Duration = Duration::from_secs(10);

/// The time without a sign of life after which a rank is lost.
const LOST_AFTER: Duration = Duration::from_secs(120);

impl<'a> Runner<'a> {
    /// Returns the number of workers that compute a stage; `None` if the process of the run does it.
    pub(in crate::run) fn workers(&self, stage: &PlannedStage) -> Result<Option<u32>, Failure> {
        let Some(workers) = &self.workers else {
            return Ok(None);
        };
        number_of(
            self.plan,
            stage,
            self.loader,
            workers.asked,
            workers.ranks.is_some(),
        )
    }

    /// Computes the missing parts of a table on workers, and commits them.
    pub(in crate::run) fn map_on_workers(
        &mut self,
        stage: &PlannedStage,
        table: &TableName,
        work: &dyn BatchStage,
        made: &TableVersion,
        groups: Groups,
        because: &Value,
    ) -> Result<(), Failure> {
        // What this process has opened before takes the memory of a GPU that a worker needs.
        self.kept = Kept::default();
        if let Some(loader) = self.loader {
            loader.release();
        }
        let input = self.plan.round_of(work.input(), made.round);
        let input = self.folder.manifest().find(work.input().as_str(), input);
        let order = TableOrder {
            input: input.map_or_else(Default::default, |input| (input.key.clone(), input.rows())),
            token: self.token.clone(),
            stage: stage.name.clone(),
            table: table.clone(),
            round: made.round,
            existing: made.parts.iter().map(|part| part.part).collect(),
            made: TableVersion {
                parts: Vec::new(),
                ..made.clone()
            },
            because: because.clone(),
        };
        let count = made.workers.unwrap_or(1);
        let mut pool = match self
            .pool
            .take()
            .filter(|pool| pool.size() == count as usize)
        {
            Some(pool) => pool,
            None => self.new_pool(stage, count)?,
        };
        let ranks = self.workers.as_ref().and_then(|workers| workers.ranks);
        let job = self.jobs;
        self.jobs += 1;
        if let Some(ranks) = ranks {
            let order = serde_json::to_vec(&order).expect("plain data");
            let set = ranks.board.set(&format!("table/{job}"), &order);
            set.map_err(lost_board)?;
            ranks.board.add(TABLES, 1).map_err(lost_board)?;
        }
        pool.open(order.clone());
        let cuts = Cuts::new(groups, made.part_groups, order.existing.iter().copied());
        let board = ranks.map(|ranks| (ranks.board, format!("table/{job}")));
        let dispatch = Dispatch::new(&mut pool, Drawing::new(cuts, board));
        let mut collected = Collected {
            stage,
            order: &order,
            work,
            waiting: Vec::new(),
            since: Instant::now(),
            parts: 0,
            rows: 0,
            replies: vec![0; ranks.map_or(0, |ranks| ranks.world as usize)],
            beats: Beats::default(),
            tally: Tally::default(),
        };
        let done = self.collect(dispatch, &mut collected, ranks.map(|ranks| (ranks, job)));
        if done.is_err() {
            for part in pool.end() {
                collected.add(part);
            }
        }
        let committed = self.commit_waiting(&mut collected);
        if let Err(failure) = done {
            if let Some(ranks) = ranks {
                leave(ranks, job);
            }
            return Err(self.relative(failure));
        }
        committed?;
        // The next stage may use the same workers.
        self.pool = Some(pool);
        Ok(())
    }

    /// Names a corrupt file as this process does: workers know the absolute folder.
    fn relative(&self, failure: Failure) -> Failure {
        let root = self.folder.root();
        match (failure, std::path::absolute(root)) {
            (Failure::Store(StoreError::Corrupt { path }), Ok(absolute)) => {
                let path = match path.strip_prefix(absolute) {
                    Ok(name) => root.join(name),
                    Err(_) => path,
                };
                Failure::Store(StoreError::Corrupt { path })
            }
            (failure, _) => failure,
        }
    }

    fn new_pool(&mut self, stage: &PlannedStage, count: u32) -> Result<Pool, Failure> {
        let workers = self.workers.as_ref().expect("the stage has workers");
        let begin = Begin {
            texts: PlanTexts::of(self.plan, &self.sets),
            folder: std::path::absolute(self.folder.root())
                .unwrap_or_else(|_| self.folder.root().to_owned()),
        };
        let devices = devices_of(self.plan, stage, self.loader)?;
        let environments = environments(count, &devices, &|name| std::env::var(name).ok());
        Ok(Pool::new(workers.command.clone(), &begin, environments))
    }

    /// Gives out the parts and collects what becomes of them, until all are committed.
    fn collect(
        &mut self,
        mut dispatch: Dispatch<'_>,
        collected: &mut Collected<'_>,
        ranks: Option<(Ranks<'_>, u32)>,
    ) -> Result<(), Failure> {
        let order = collected.order;
        let input = collected.work.input();
        let input = self
            .folder
            .manifest()
            .find(input.as_str(), self.plan.round_of(input, order.round));
        let total = input.map_or(0, TableVersion::rows);
        let mut is_started = false;
        loop {
            dispatch.hand_out()?;
            if !is_started {
                is_started = true;
                self.report.start(Start {
                    table: &order.table,
                    round: order.round,
                    unit: Unit::Rows,
                    total: Some(total),
                    done: dispatch.rows(),
                });
            }
            if dispatch.missing() == Some(collected.parts) && dispatch.is_done() {
                return Ok(());
            }
            let mut happened = dispatch.wait(LOOK_EVERY)?;
            while let Some(one) = happened {
                match one {
                    Happened::Progress => {}
                    Happened::Note(text) => note_once(&mut self.said, self.report, &text),
                    Happened::Part(done) => collected.add(*done),
                    Happened::Lost(lost) => {
                        let done = self.rejected(collected, &lost)?;
                        collected.add(done);
                    }
                }
                happened = dispatch.wait(Duration::ZERO)?;
            }
            if let Some((ranks, job)) = ranks {
                self.collect_from_ranks(ranks, job, collected)?;
                no_rank_again(ranks)?;
                collected.beats.check(ranks)?;
            }
            self.stop_if_asked()?;
            let is_due = collected.since.elapsed() >= COMMIT_EVERY || ranks.is_none();
            if is_due || collected.waiting.len() >= COMMIT_PARTS || dispatch.is_done() {
                self.commit_waiting(collected)?;
            }
            self.report.progress(collected.rows + dispatch.rows());
        }
    }

    /// Takes the replies of the other ranks from the board.
    fn collect_from_ranks(
        &mut self,
        ranks: Ranks<'_>,
        job: u32,
        collected: &mut Collected<'_>,
    ) -> Result<(), Failure> {
        for rank in 1..ranks.world {
            loop {
                let number = collected.replies[rank as usize];
                let key = format!("table/{job}/reply/{rank}/{number}");
                let Some(reply) = ranks.board.get(&key).map_err(lost_board)? else {
                    break;
                };
                collected.replies[rank as usize] += 1;
                let reply: RankReply = serde_json::from_slice(&reply).map_err(|error| {
                    Failure::Other(format!("`{key}` of the other ranks is invalid: {error}"))
                })?;
                match reply {
                    RankReply::Part(done) => collected.add(*done),
                    RankReply::Note(text) => note_once(&mut self.said, self.report, &text),
                    RankReply::Lost(lost) => {
                        let done = self.rejected(collected, &lost)?;
                        collected.add(done);
                    }
                    RankReply::Failed(failure) => return Err(failure.into()),
                }
            }
        }
        Ok(())
    }

    /// Commits the parts that wait for it.
    fn commit_waiting(&mut self, collected: &mut Collected<'_>) -> Result<(), Failure> {
        collected.since = Instant::now();
        if collected.waiting.is_empty() {
            return Ok(());
        }
        let order = collected.order;
        let parts = collected.waiting.drain(..);
        let events = parts.map(|part| Event::Part {
            table: order.table.to_string(),
            round: order.round,
            part,
            state: None,
        });
        self.folder.commit_all(events.collect())?;
        self.report.figures(&collected.tally.figures);
        Ok(())
    }

    /// Writes a part whose rows are all rejected.
    fn rejected(&mut self, collected: &Collected<'_>, lost: &Lost) -> Result<PartDone, Failure> {
        let order = collected.order;
        let input = collected.work.input();
        let files = self
            .folder
            .files(input.as_str(), self.plan.round_of(input, order.round));
        let mut groups = groups_of(files, id_columns(collected.work), order.made.is_gathered)?;
        groups.seek(lost.cut.first_row)?;
        let ids = groups.ids(order.made.part_groups as usize)?;
        let title = &collected.stage.name;
        let note = format!("{title}: {} rows are rejected: {}", ids.len(), lost.reason);
        note_once(&mut self.said, self.report, &note);
        let parcel = Parcel {
            part: lost.cut.part,
            groups: ids.len() as u64,
            outcomes: ids
                .iter()
                .map(|id| Outcome::fault(id, &lost.reason))
                .collect(),
            telemetry: None,
            oom_retries: 0,
            took: Took::default(),
            done: 0,
        };
        let schema = collected.work.schema();
        let pen = self.pen(&order.table, &order.made, schema, &order.token);
        Ok(PartDone {
            record: pen.write(parcel)?,
            rows: lost.cut.rows,
            rewards: (0.0, 0),
        })
    }

    /// Tells the other ranks that the run has ended, and waits until they know.
    pub(in crate::run) fn end_ranks(&self, has_failed: bool) {
        let Some(ranks) = self.workers.as_ref().and_then(|workers| workers.ranks) else {
            return;
        };
        let end = if has_failed { FAILED } else { DONE };
        if ranks.board.set(END, end).is_ok() {
            wait_for_all(ranks, ENDED);
        }
    }
}

/// Tells the other ranks to leave a table that has failed, and waits until they have.
fn leave(ranks: Ranks<'_>, job: u32) {
    if ranks
        .board
        .set(&format!("table/{job}/over"), b"over")
        .is_ok()
    {
        wait_for_all(ranks, &format!("table/{job}/left"));
    }
}

/// Waits until all ranks that were started have added to a number, for some seconds.
fn wait_for_all(ranks: Ranks<'_>, key: &str) {
    let until = Instant::now() + RANKS_END_WITHIN;
    while Instant::now() < until {
        let started = match key {
            // One that starts late has to find the end.
            ENDED => Ok(i64::from(ranks.world) - 1),
            _ => ranks.board.add(STARTS, 0),
        };
        match (started, ranks.board.add(key, 0)) {
            (Ok(started), Ok(there)) if there < started => thread::sleep(LOOK_EVERY),
            _ => return,
        }
    }
}

/// The last signs of life of the other ranks.
#[derive(Default)]
struct Beats {
    checked: Option<Instant>,
    /// The number that each rank counts up, and the time when it last changed.
    last: HashMap<u32, (i64, Instant)>,
}

impl Beats {
    /// Fails if a rank that has started gives no sign of life any more.
    fn check(&mut self, ranks: Ranks<'_>) -> Result<(), Failure> {
        if self.checked.is_some_and(|at| at.elapsed() < BEAT_EVERY) {
            return Ok(());
        }
        self.checked = Some(Instant::now());
        for rank in 1..ranks.world {
            let beat = ranks.board.add(&format!("beat/{rank}"), 0);
            let beat = beat.map_err(lost_board)?;
            let last = self.last.entry(rank).or_insert((beat, Instant::now()));
            if last.0 != beat || beat == 0 {
                *last = (beat, Instant::now());
            }
            if last.1.elapsed() >= LOST_AFTER {
                return Err(Failure::Other(format!(
                    "rank {rank} has given no sign of life for {} seconds, and the parts that it had are lost; \
                     start all ranks again: committed parts are kept",
                    LOST_AFTER.as_secs()
                )));
            }
        }
        Ok(())
    }
}

/// Fails if a rank was started again, as by Kubernetes: the parts that it had drawn are lost.
fn no_rank_again(ranks: Ranks<'_>) -> Result<(), Failure> {
    let starts = ranks.board.add(STARTS, 0).map_err(lost_board)?;
    if starts < i64::from(ranks.world) {
        return Ok(());
    }
    Err(Failure::Other(
        "a rank was started again, and the parts that it had are lost; start all ranks again: committed \
         parts are kept"
            .to_owned(),
    ))
}

/// The parts of a table that were computed, and those of them that wait for a commit.
struct Collected<'c> {
    stage: &'c PlannedStage,
    order: &'c TableOrder,
    work: &'c dyn BatchStage,
    waiting: Vec<PartRecord>,
    /// The time of the last commit.
    since: Instant,
    parts: u64,
    rows: u64,
    /// The number of replies that were read, by rank.
    replies: Vec<u64>,
    beats: Beats,
    tally: Tally,
}

impl Collected<'_> {
    fn add(&mut self, done: PartDone) {
        self.parts += 1;
        self.rows += done.rows;
        self.tally.add(done.rewards);
        self.waiting.push(done.record);
    }
}
