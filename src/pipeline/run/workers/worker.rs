//! The process that computes parts for a run.

use std::io::{self, BufRead, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::messages::{Begin, Cut, Order, PartDone, Reply, TableOrder, WorkerFailure};
use crate::config::PlannedStage;
use crate::run::groups::groups_of;
use crate::run::interrupt::Interrupt;
use crate::run::report::{Report, Start, Tally};
use crate::run::runner::Runner;
use crate::stages::{BatchStage, Failure, StageKind, TableName};
use ovchat_data::store::{Key, RunFolder};
use ovchat_models::ModelLoader;

/// The least time between two reports of progress.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// Sends a reply to the run, from any thread.
type Tell = Arc<dyn Fn(&Reply) + Send + Sync>;

/// Computes the parts that the run orders on `orders`, and replies on `replies`, until the orders end.
pub fn work(
    loader: Option<&dyn ModelLoader>,
    orders: impl io::Read + Send + 'static,
    replies: impl Write + Send + 'static,
) -> Result<(), Failure> {
    let mut lines = io::BufReader::new(orders).lines();
    let Some(Ok(first)) = lines.next() else {
        return Ok(());
    };
    let malformed = |error: serde_json::Error| Failure::Other(format!("malformed order: {error}"));
    let begin: Begin = serde_json::from_str(&first).map_err(malformed)?;
    let replies = Mutex::new(replies);
    let tell: Tell = Arc::new(move |reply| {
        let line = serde_json::to_string(reply).expect("plain data");
        if let Ok(mut replies) = replies.lock() {
            // If the run has ended, the orders end, too.
            let _ = writeln!(replies, "{line}").and_then(|()| replies.flush());
        }
    });
    let plan = match begin.texts.load() {
        Ok(plan) => plan,
        Err(error) => {
            let failure = Failure::Other(error.to_string());
            tell(&Reply::Failed(WorkerFailure::from(&failure)));
            return Ok(());
        }
    };
    let interrupt = Interrupt::default();
    let (send, receive) = channel();
    let when_over = interrupt.clone();
    thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            let order = serde_json::from_str(&line).map_err(malformed);
            if send.send(order).is_err() {
                return;
            }
        }
        // The run has ended, or needs no more parts.
        when_over.raise();
    });
    let mut told = Told {
        tell: Arc::clone(&tell),
        progress: Instant::now(),
    };
    let runner = Runner::attach(&plan, &begin.folder, loader, &mut told, &interrupt);
    let done = runner.and_then(|mut runner| runner.follow_orders(&receive, &tell));
    match done {
        Ok(()) | Err(Failure::Interrupted) => {}
        Err(failure) => tell(&Reply::Failed(WorkerFailure::from(&failure))),
    }
    Ok(())
}

/// The report of a worker to the run.
struct Told {
    tell: Tell,
    /// The time of the last report of progress.
    progress: Instant,
}

impl Report for Told {
    fn start(&mut self, _: Start<'_>) {}

    fn progress(&mut self, done: u64) {
        if self.progress.elapsed() >= PROGRESS_EVERY {
            self.progress = Instant::now();
            (self.tell)(&Reply::Progress(done));
        }
    }

    fn finished(&mut self, _: &TableName, _: Option<u32>, _: u64, _: u64, _: u64) {}

    fn reused(&mut self, _: &TableName, _: Option<u32>, _: u64) {}

    fn note(&mut self, text: &str) {
        (self.tell)(&Reply::Note(text.to_owned()));
    }
}

impl Runner<'_> {
    fn follow_orders(
        &mut self,
        orders: &Receiver<Result<Order, Failure>>,
        tell: &Tell,
    ) -> Result<(), Failure> {
        let mut next = orders.recv().ok();
        while let Some(order) = next {
            next = match order? {
                Order::Table(order) => self.work_on(&order, orders, tell)?.map(Ok),
                Order::Part(cut) => {
                    return Err(Failure::Other(format!("part {} has no table", cut.part)));
                }
            };
        }
        Ok(())
    }

    /// Computes the parts of a table. Each is written while the next one is computed. Returns the order
    /// that follows.
    fn work_on(
        &mut self,
        order: &TableOrder,
        orders: &Receiver<Result<Order, Failure>>,
        tell: &Tell,
    ) -> Result<Option<Order>, Failure> {
        let stage = self.plan.stage(&order.stage).ok_or_else(|| {
            Failure::Other(format!("the pipeline has no stage `{}`", order.stage))
        })?;
        if let Some(loader) = self.loader {
            loader.keep_threads(order.made.threads);
        }
        self.threads = order.made.threads;
        with_work(stage, &order.table, |work| {
            let input = work.input();
            let round = self.plan.round_of(input, order.round);
            self.folder = read_settled(self.folder.root(), input, round, order)?;
            self.know_all();
            self.compute_orders(stage, order, work, (orders, tell))
        })
    }

    fn compute_orders(
        &mut self,
        stage: &PlannedStage,
        order: &TableOrder,
        work: &dyn BatchStage,
        (orders, tell): (&Receiver<Result<Order, Failure>>, &Tell),
    ) -> Result<Option<Order>, Failure> {
        let base = Key::new("row").with_json(&order.because);
        let input = work.input();
        let files = self
            .folder
            .files(input.as_str(), self.plan.round_of(input, order.round));
        let groups = groups_of(files, work.reads(), order.made.is_gathered)?;
        let mut mapping = self.mapping(stage, &order.table, work, &base, &order.made, groups)?;
        let pen = Arc::new(self.pen(&order.table, &order.made, work.schema(), &order.token));
        // Each part is written, and reported, while the next one is computed.
        let mut writing: Option<JoinHandle<Result<(), Failure>>> = None;
        let mut each = |cut: Cut, writing: &mut Option<_>| -> Result<(), Failure> {
            mapping.groups.seek(cut.first_row)?;
            let taken = mapping.groups.take(order.made.part_groups as usize)?;
            let rows = taken.lengths.iter().sum::<usize>() as u64;
            if rows != cut.rows {
                return Err(Failure::Other(format!(
                    "part {} of `{}` has {rows} input rows here, and {} in the run",
                    cut.part, order.table, cut.rows
                )));
            }
            tell(&Reply::Began(cut.part));
            mapping.tally = Tally::default();
            let parcel = self.compute(&mut mapping, cut.part, &taken, 0)?;
            written(writing)?;
            let rewards = mapping.tally.rewards_so_far();
            let (pen, tell) = (Arc::clone(&pen), Arc::clone(tell));
            *writing = Some(thread::spawn(move || {
                let record = pen.write(parcel)?;
                tell(&Reply::Part(Box::new(PartDone {
                    record,
                    rows,
                    rewards,
                })));
                Ok(())
            }));
            Ok(())
        };
        let next = loop {
            match orders.recv() {
                Ok(Ok(Order::Part(cut))) => {
                    if let Err(failure) = each(cut, &mut writing) {
                        break Err(failure);
                    }
                }
                Ok(other) => break other.map(Some),
                Err(_) => break Ok(None),
            }
        };
        // Whatever comes next, the last part is finished.
        written(&mut writing)?;
        next
    }
}

/// Waits until a part is written.
fn written(writing: &mut Option<JoinHandle<Result<(), Failure>>>) -> Result<(), Failure> {
    match writing.take() {
        Some(thread) => thread.join().expect("the writer thread does not panic"),
        None => Ok(()),
    }
}

/// The time in which a machine has to see what another one has committed.
const SEEN_WITHIN: Duration = Duration::from_secs(90);

/// Reads the run when it has the input that the run means. On a shared file system, another machine may
/// see an older manifest for a while.
pub fn read_settled(
    root: &Path,
    input: &TableName,
    round: Option<u32>,
    order: &TableOrder,
) -> Result<RunFolder, Failure> {
    let begun = Instant::now();
    loop {
        let folder = RunFolder::read(root)?;
        let found = folder.manifest().find(input.as_str(), round);
        let (key, rows) = &order.input;
        if found.is_some_and(|made| made.complete && made.key == *key && made.rows() == *rows) {
            return Ok(folder);
        }
        if begun.elapsed() >= SEEN_WITHIN {
            return Err(Failure::Other(format!(
                "{} does not show the table `{input}` as rank 0 has built it; do all machines see the same \
                 folder?",
                root.display()
            )));
        }
        thread::sleep(Duration::from_millis(500));
    }
}

/// Calls `go` with the work of a stage's own table, or of the one that it needs first.
pub fn with_work<T>(
    stage: &PlannedStage,
    table: &TableName,
    go: impl FnOnce(&dyn BatchStage) -> Result<T, Failure>,
) -> Result<T, Failure> {
    match stage.spec.as_stage().work() {
        StageKind::Rows(work) if *table == stage.name => return go(&*work),
        StageKind::Train(work) => {
            if let Some((name, work)) = work.before(&stage.name)
                && name == *table
            {
                return go(&*work);
            }
        }
        _ => {}
    }
    Err(Failure::Other(format!(
        "`{table}` is not computed in parts"
    )))
}
