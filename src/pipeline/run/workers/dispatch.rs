//! Giving out the parts of a table, and what becomes of them.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use super::messages::{Cut, Lost, PartDone, Reply};
use super::pool::{Event, Pool};
use crate::run::groups::{Groups, Taken};
use crate::stages::Failure;
use ovchat_models::Board;

/// The parts that a worker has at once: while it computes one, it is not without the next.
const IN_FLIGHT: usize = 2;

/// The deaths of workers over one part after which its rows are rejected.
const DEATHS_MAX: u32 = 3;

/// The deaths of one worker in a row after which it gets no more parts.
const WORKER_DEATHS_MAX: u32 = 5;

/// The parts of a table that are missing, in order.
pub struct Cuts {
    groups: Groups,
    part_groups: usize,
    existing: HashSet<u32>,
    part: u32,
    /// The number of missing parts returned so far.
    returned: i64,
    /// The rows of existing parts that were passed.
    pub existing_rows: u64,
}

impl Cuts {
    /// `groups` has at least the column `prompt_id`.
    pub fn new(groups: Groups, part_groups: u32, existing: impl IntoIterator<Item = u32>) -> Self {
        Self {
            groups,
            part_groups: part_groups as usize,
            existing: existing.into_iter().collect(),
            part: 0,
            returned: 0,
            existing_rows: 0,
        }
    }

    /// Returns the next missing part.
    fn next(&mut self) -> Result<Option<Cut>, Failure> {
        loop {
            let first_row = self.groups.position();
            let Taken { lengths, .. } = self.groups.take(self.part_groups)?;
            if lengths.is_empty() {
                return Ok(None);
            }
            let part = self.part;
            self.part += 1;
            let rows = lengths.iter().sum::<usize>() as u64;
            if !self.existing.contains(&part) {
                self.returned += 1;
                return Ok(Some(Cut {
                    part,
                    first_row,
                    rows,
                }));
            }
            self.existing_rows += rows;
        }
    }

    /// Returns the missing part with this number among the missing ones, which come in order.
    fn nth_missing(&mut self, number: i64) -> Result<Option<Cut>, Failure> {
        loop {
            let cut = self.next()?;
            if cut.is_none() || self.returned > number {
                return Ok(cut);
            }
        }
    }
}

/// The parts that this machine draws.
pub struct Drawing<'a> {
    cuts: Cuts,
    /// The board on which the ranks draw parts, and the prefix of its keys; `None` for one machine.
    board: Option<(&'a dyn Board, String)>,
    /// True if there are no more missing parts to draw.
    is_over: bool,
}

impl<'a> Drawing<'a> {
    pub fn new(cuts: Cuts, board: Option<(&'a dyn Board, String)>) -> Self {
        Self {
            cuts,
            board,
            is_over: false,
        }
    }

    /// Draws the next part that nobody has drawn.
    fn draw(&mut self) -> Result<Option<Cut>, Failure> {
        if self.is_over {
            return Ok(None);
        }
        let cut = match &self.board {
            None => self.cuts.next()?,
            Some((board, prefix)) => {
                let drawn = board.add(&format!("{prefix}/drawn"), 1);
                self.cuts.nth_missing(drawn.map_err(lost_board)? - 1)?
            }
        };
        self.is_over = cut.is_none();
        Ok(cut)
    }
}

/// An event of the parts of a table.
pub enum Happened {
    Progress,
    Note(String),
    Part(Box<PartDone>),
    /// The workers of a part have ended again and again.
    Lost(Lost),
}

/// The parts of a table that the workers of this machine compute.
pub struct Dispatch<'a> {
    pool: &'a mut Pool,
    drawing: Drawing<'a>,
    /// Parts whose worker has ended, each with the number of the last one.
    again: VecDeque<(Cut, usize)>,
    /// The workers that have ended while they computed a part.
    deaths: HashMap<u32, Vec<usize>>,
    /// The deaths of each worker since it last finished a part.
    in_a_row: Vec<u32>,
    /// True if any part was finished.
    has_finished: bool,
    /// The rows done of the parts in progress, by worker.
    in_progress: Vec<u64>,
}

impl<'a> Dispatch<'a> {
    pub fn new(pool: &'a mut Pool, drawing: Drawing<'a>) -> Self {
        let pool_size = pool.size();
        Self {
            in_progress: vec![0; pool_size],
            pool,
            drawing,
            again: VecDeque::new(),
            deaths: HashMap::new(),
            in_a_row: vec![0; pool_size],
            has_finished: false,
        }
    }

    /// Gives parts to workers that have room for them.
    pub fn hand_out(&mut self) -> Result<(), Failure> {
        for depth in 0..IN_FLIGHT {
            for worker in 0..self.pool.size() {
                if self.pool.parts(worker) > depth || self.is_out(worker) {
                    continue;
                }
                if let Some(cut) = self.draw(worker)? {
                    self.pool.give(worker, cut)?;
                }
            }
        }
        Ok(())
    }

    /// True for a worker that only ends, as on a GPU that is broken.
    fn is_out(&self, worker: usize) -> bool {
        self.in_a_row[worker] >= WORKER_DEATHS_MAX
    }

    /// Draws a part for a worker. One that another worker has not survived comes first.
    fn draw(&mut self, worker: usize) -> Result<Option<Cut>, Failure> {
        let others = (0..self.pool.size()).filter(|other| *other != worker && !self.is_out(*other));
        let is_alone = others.count() == 0;
        let mut again = self.again.iter();
        match again.position(|(_, last)| is_alone || *last != worker) {
            Some(place) => Ok(self.again.remove(place).map(|(cut, _)| cut)),
            None => self.drawing.draw(),
        }
    }

    /// True if no part is left to draw, and none is with a worker.
    pub fn is_done(&self) -> bool {
        let is_with_a_worker = (0..self.pool.size()).any(|worker| self.pool.parts(worker) > 0);
        self.drawing.is_over && self.again.is_empty() && !is_with_a_worker
    }

    /// The number of missing parts, once all are drawn.
    pub fn missing(&self) -> Option<u64> {
        let missing = self.drawing.cuts.returned.cast_unsigned();
        self.drawing.is_over.then_some(missing)
    }

    /// The rows of parts that existed, as far as known, and of parts in progress here.
    pub fn rows(&self) -> u64 {
        self.drawing.cuts.existing_rows + self.in_progress.iter().sum::<u64>()
    }

    /// Waits for something to happen; `None` after `at_most`.
    pub fn wait(&mut self, at_most: Duration) -> Result<Option<Happened>, Failure> {
        Ok(match self.pool.wait(at_most) {
            None => None,
            Some(Event::Reply(worker, Reply::Progress(rows))) => {
                self.in_progress[worker] = rows;
                Some(Happened::Progress)
            }
            Some(Event::Reply(_, Reply::Began(_))) => Some(Happened::Progress),
            Some(Event::Reply(_, Reply::Note(text))) => Some(Happened::Note(text)),
            Some(Event::Reply(worker, Reply::Part(done))) => {
                self.in_progress[worker] = 0;
                self.in_a_row[worker] = 0;
                self.has_finished = true;
                Some(Happened::Part(done))
            }
            Some(Event::Reply(_, Reply::Failed(failure))) => return Err(failure.into()),
            Some(Event::Ended(worker, how, parts)) => {
                self.in_progress[worker] = 0;
                self.has_ended(worker, &how, parts)?
            }
        })
    }

    /// Decides what becomes of the parts of a worker that has ended.
    fn has_ended(
        &mut self,
        worker: usize,
        how: &str,
        mut parts: VecDeque<Cut>,
    ) -> Result<Option<Happened>, Failure> {
        self.in_a_row[worker] += 1;
        let first = parts.pop_front();
        self.again
            .extend(parts.into_iter().map(|cut| (cut, worker)));
        // Where no worker finishes anything, the rows are not to blame.
        let all: u32 = self.in_a_row.iter().sum();
        let are_out = (0..self.pool.size()).all(|worker| self.is_out(worker));
        if are_out || (!self.has_finished && all >= DEATHS_MAX) {
            return Err(Failure::Other(format!(
                "{all} workers have ended without finishing a part, the last one with {how}; the lines above \
                 may say why. If memory is short, use fewer with --workers"
            )));
        }
        let Some(cut) = first else {
            return Ok(None);
        };
        let deaths = self.deaths.entry(cut.part).or_default();
        deaths.push(worker);
        let on_one = deaths.iter().all(|other| *other == worker);
        let count = deaths.len();
        if count < DEATHS_MAX as usize || (on_one && self.pool.size() > 1) {
            self.again.push_back((cut, worker));
            let gone = if self.is_out(worker) {
                format!(
                    "; worker {worker} gets no more parts, since it has finished none of the last ones"
                )
            } else {
                String::new()
            };
            return Ok(Some(Happened::Note(format!(
                "a worker ended with {how} while it computed part {}; it is computed again{gone}",
                cut.part
            ))));
        }
        let reason = format!(
            "the worker that computed it, or another row of its part, ended {count} times, the last time \
             with {how}"
        );
        Ok(Some(Happened::Lost(Lost { cut, reason })))
    }
}

/// The failure of a rank that has lost the others.
pub fn lost_board(problem: String) -> Failure {
    Failure::Other(format!(
        "the connection to the other ranks is lost: {problem}; committed parts are kept, and the same \
         command goes on"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ovchat_data::store::TableWriter;
    use ovchat_data::tables::{Reward, Row};
    use ovchat_models::LocalBoard;

    /// The parts of two prompts each of a table of 23 prompts with two rows each; two of them exist.
    fn cuts(folder: &std::path::Path) -> Cuts {
        let row = |number: i32| Reward {
            row_key: String::new(),
            prompt_id: format!("p{}", number / 2),
            candidate: number % 2,
            judge: String::new(),
            reward: 0.0,
            reply: None,
            label: None,
            first_score: None,
            second_score: None,
            failure: None,
        };
        let rows: Vec<Reward> = (0..46).map(row).collect();
        let mut writer = TableWriter::new(folder, "part-0", Reward::schema(), &[]);
        writer.write(&Reward::to_batch(&rows)).unwrap();
        let files = writer.finish().unwrap();
        let files = files.iter().map(|file| folder.join(&file.file)).collect();
        let groups = Groups::open_adjacent(files, Reward::schema().clone());
        Cuts::new(groups, 2, [0, 7])
    }

    #[test]
    fn each_missing_part_is_drawn_by_one_rank() {
        let folder = tempfile::tempdir().unwrap();
        let board = LocalBoard::default();
        let on_board = || Some((&board as &dyn Board, "table/0".to_owned()));
        let mut ranks = [0; 3].map(|_| Drawing::new(cuts(folder.path()), on_board()));
        let mut drawn = Vec::new();
        // The first rank is faster.
        for turn in 0.. {
            let rank = [0, 1, 0, 2][turn % 4];
            drawn.extend(ranks[rank].draw().unwrap());
            if ranks.iter().all(|rank| rank.is_over) {
                break;
            }
        }
        let parts: Vec<u32> = drawn.iter().map(|cut| cut.part).collect();
        let missing: Vec<u32> = (0..12).filter(|part| ![0, 7].contains(part)).collect();
        assert_eq!(parts, missing);
        assert_eq!((drawn[0].first_row, drawn[0].rows), (4, 4));
        assert_eq!((drawn[9].first_row, drawn[9].rows), (44, 2));
        let mut alone = Drawing::new(cuts(folder.path()), None);
        let all: Vec<Cut> = std::iter::from_fn(|| alone.draw().unwrap()).collect();
        assert_eq!(all, drawn);
        assert_eq!(alone.cuts.existing_rows, 8);
    }
}
