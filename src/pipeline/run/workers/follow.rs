//! The ranks of a cluster that compute parts for the run of rank 0.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::dispatch::{Cuts, Dispatch, Drawing, Happened, lost_board};
use super::messages::{
    BEAT_EVERY, Begin, END, ENDED, FAILED, RankReply, STARTS, TABLES, TableOrder, WorkerFailure,
};
use super::places::{Ranks, Workers, devices_of, environments, number_of};
use super::pool::Pool;
use super::worker::{read_settled, with_work};
use crate::config::{Plan, PlanTexts, PlannedStage};
use crate::run::groups::{groups_of, id_columns};
use crate::run::interrupt::Interrupt;
use crate::run::report::{Masked, Report};
use crate::run::runner::titled;
use crate::stages::Failure;
use ovchat_models::ModelLoader;

/// The time between two looks at the board.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Computes parts for the run of rank 0, until that ends.
pub fn follow(
    plan: &Plan,
    sets: &[String],
    folder: &Path,
    loader: Option<&dyn ModelLoader>,
    workers: &Workers<'_>,
    report: &mut dyn Report,
    interrupt: &Interrupt,
) -> Result<(), Failure> {
    let ranks = workers.ranks.expect("a rank of a cluster");
    let mut follower = Follower {
        plan,
        sets,
        folder: std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned()),
        loader,
        workers,
        ranks,
        report: Masked {
            report,
            secrets: &plan.secrets,
        },
        interrupt,
        pool: None,
        beat: None,
        replies: 0,
    };
    ranks.board.add(STARTS, 1).map_err(lost_board)?;
    let ended = follower.follow();
    // Rank 0 need not wait for this rank.
    let _ = ranks.board.add(ENDED, 1);
    ended.map_err(|failure| match failure {
        Failure::Interrupted => failure,
        failure => Failure::Other(plan.secrets.hide(&failure.to_string())),
    })
}

/// A rank other than 0.
struct Follower<'f> {
    plan: &'f Plan,
    sets: &'f [String],
    folder: PathBuf,
    loader: Option<&'f dyn ModelLoader>,
    workers: &'f Workers<'f>,
    ranks: Ranks<'f>,
    report: Masked<'f>,
    interrupt: &'f Interrupt,
    /// The workers that the last table left running.
    pool: Option<Pool>,
    /// The time of the last sign of life.
    beat: Option<Instant>,
    /// The number of replies about the current table.
    replies: u64,
}

/// The reason to leave a table.
enum Left {
    /// No part is left to draw.
    Done,
    /// Rank 0 has given the table or the run up.
    GivenUp,
}

impl Follower<'_> {
    fn follow(&mut self) -> Result<(), Failure> {
        // The parts of earlier tables are drawn.
        let tables = self.ranks.board.add(TABLES, 0).map_err(lost_board)?;
        let first = u32::try_from(tables - 1).unwrap_or(0);
        for job in first.. {
            let prefix = format!("table/{job}");
            let order = loop {
                if let Some(order) = self.get(&prefix)? {
                    break order;
                }
                match self.get(END)? {
                    None => {}
                    Some(end) if end == FAILED => {
                        return Err(Failure::Other("rank 0 has ended with an error".to_owned()));
                    }
                    Some(_) => return Ok(()),
                }
                self.pause()?;
                thread::sleep(LOOK_EVERY);
            };
            let order: TableOrder = serde_json::from_slice(&order).map_err(|error| {
                Failure::Other(format!("`{prefix}` of rank 0 is invalid: {error}"))
            })?;
            self.replies = 0;
            let left = self.compute(job, &order);
            if !matches!(left, Ok(Left::Done)) {
                self.pool = None;
            }
            if let Err(failure) = left {
                if matches!(failure, Failure::Interrupted) {
                    return Err(failure);
                }
                // Rank 0 decides if the run goes on.
                let failure = WorkerFailure::from(&failure).hide(&self.plan.secrets);
                self.reply(job, &RankReply::Failed(failure))?;
            }
            let left = format!("{prefix}/left");
            self.ranks.board.add(&left, 1).map_err(lost_board)?;
        }
        unreachable!("the run ends")
    }

    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Failure> {
        self.ranks.board.get(key).map_err(lost_board)
    }

    /// Gives a sign of life. Fails if this process was interrupted.
    fn pause(&mut self) -> Result<(), Failure> {
        if self.interrupt.raised() {
            return Err(Failure::Interrupted);
        }
        if self.beat.is_none_or(|beat| beat.elapsed() >= BEAT_EVERY) {
            self.beat = Some(Instant::now());
            let key = format!("beat/{}", self.ranks.rank);
            self.ranks.board.add(&key, 1).map_err(lost_board)?;
        }
        Ok(())
    }

    fn reply(&mut self, job: u32, told: &RankReply) -> Result<(), Failure> {
        let told = serde_json::to_vec(told).expect("plain data");
        let (rank, number) = (self.ranks.rank, self.replies);
        self.replies += 1;
        let key = format!("table/{job}/reply/{rank}/{number}");
        self.ranks.board.set(&key, &told).map_err(lost_board)
    }

    /// Computes parts of one table until none is left to draw.
    fn compute(&mut self, job: u32, order: &TableOrder) -> Result<Left, Failure> {
        let plan = self.plan;
        let stage = plan.stage(&order.stage).ok_or_else(|| {
            let name = &order.stage;
            Failure::Other(format!(
                "this rank has another pipeline than rank 0: it has no stage `{name}`"
            ))
        })?;
        let title = titled(&order.table, order.round);
        let rank = self.ranks.rank;
        self.report.note(&format!("rank {rank}: computing {title}"));
        let groups = with_work(stage, &order.table, |work| {
            let input = work.input();
            let round = plan.round_of(input, order.round);
            let folder = read_settled(&self.folder, input, round, order)?;
            let files = folder.files(input.as_str(), round);
            groups_of(files, id_columns(work), order.made.is_gathered)
        })?;
        let mut pool = self.pool_for(stage)?;
        pool.open(order.clone());
        let existing = order.existing.iter().copied();
        let cuts = Cuts::new(groups, order.made.part_groups, existing);
        let prefix = format!("table/{job}");
        let over = format!("{prefix}/over");
        let drawing = Drawing::new(cuts, Some((self.ranks.board, prefix)));
        let mut dispatch = Dispatch::new(&mut pool, drawing);
        loop {
            dispatch.hand_out()?;
            if dispatch.is_done() {
                break;
            }
            let told = match dispatch.wait(LOOK_EVERY)? {
                None | Some(Happened::Progress) => None,
                Some(Happened::Note(text)) => {
                    let text = plan.secrets.hide(&text);
                    Some(RankReply::Note(format!("rank {rank}: {text}")))
                }
                Some(Happened::Part(done)) => Some(RankReply::Part(done)),
                Some(Happened::Lost(lost)) => Some(RankReply::Lost(lost)),
            };
            if let Some(told) = told {
                self.reply(job, &told)?;
            } else if self.get(END)?.is_some() || self.get(&over)?.is_some() {
                return Ok(Left::GivenUp);
            }
            self.pause()?;
        }
        self.pool = Some(pool);
        Ok(Left::Done)
    }

    /// The workers for a stage: those of the last table, if they are as many.
    fn pool_for(&mut self, stage: &PlannedStage) -> Result<Pool, Failure> {
        let asked = self.workers.asked;
        let count = number_of(self.plan, stage, self.loader, asked, true)?.unwrap_or(1);
        let last = self.pool.take();
        if let Some(pool) = last.filter(|pool| pool.size() == count as usize) {
            return Ok(pool);
        }
        let begin = Begin {
            texts: PlanTexts::of(self.plan, self.sets),
            folder: self.folder.clone(),
        };
        let devices = devices_of(self.plan, stage, self.loader)?;
        let environments = environments(count, &devices, &|name| std::env::var(name).ok());
        Ok(Pool::new(
            self.workers.command.clone(),
            &begin,
            environments,
        ))
    }
}
