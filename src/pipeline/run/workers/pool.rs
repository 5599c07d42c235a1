//! Worker processes, and the lines that are exchanged with them.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::messages::{Begin, Cut, Order, PartDone, Reply, TableOrder};
use crate::stages::Failure;

/// The time that workers have to end after their input was closed. They stop between two rows.
const ENDS_WITHIN: Duration = Duration::from_secs(5);

/// The way to start workers.
#[derive(Debug, Clone)]
pub struct WorkerCommand {
    pub program: PathBuf,
    pub arguments: Vec<String>,
}

/// The worker processes of this machine. Each is started with its first part.
pub struct Pool {
    command: WorkerCommand,
    /// The first line to each worker.
    begin: String,
    /// The environment of each worker.
    environments: Vec<Vec<(String, String)>>,
    workers: Vec<Option<Worker>>,
    /// The table of the current parts.
    table: Option<Box<TableOrder>>,
    send: Sender<(usize, u32, Option<Reply>)>,
    receive: Receiver<(usize, u32, Option<Reply>)>,
    /// The number of processes started so far.
    started: u32,
}

struct Worker {
    process: Child,
    orders: ChildStdin,
    /// The number of this process among all that were started.
    number: u32,
    /// The parts that it has, and the number of the one that it computes.
    parts: VecDeque<Cut>,
    computing: Option<u32>,
    /// True if it knows the current table.
    is_told: bool,
}

/// An event of a worker.
pub enum Event {
    Reply(usize, Reply),
    /// A worker has ended, how, and with which parts; the first was being computed.
    Ended(usize, String, VecDeque<Cut>),
}

impl Pool {
    /// `environments` has the variables of each worker.
    pub fn new(
        command: WorkerCommand,
        begin: &Begin,
        environments: Vec<Vec<(String, String)>>,
    ) -> Self {
        let (send, receive) = channel();
        Self {
            command,
            begin: serde_json::to_string(begin).expect("plain data"),
            workers: environments.iter().map(|_| None).collect(),
            environments,
            table: None,
            send,
            receive,
            started: 0,
        }
    }

    /// The number of workers.
    pub fn size(&self) -> usize {
        self.workers.len()
    }

    /// Sets the table that the next parts belong to. No worker has parts.
    pub fn open(&mut self, table: TableOrder) {
        self.table = Some(Box::new(table));
        for worker in self.workers.iter_mut().flatten() {
            worker.is_told = false;
        }
    }

    /// The number of parts that a worker has.
    pub fn parts(&self, index: usize) -> usize {
        self.workers[index]
            .as_ref()
            .map_or(0, |one| one.parts.len())
    }

    /// Gives a part to a worker, which is started if it does not run.
    pub fn give(&mut self, index: usize, cut: Cut) -> Result<(), Failure> {
        if self.workers[index].is_none() {
            self.workers[index] = Some(self.start(index)?);
        }
        let table = self.table.as_ref().expect("a table is open");
        let worker = self.workers[index].as_mut().expect("it was started");
        let mut lines = String::new();
        if !worker.is_told {
            worker.is_told = true;
            lines += &line(&Order::Table(table.clone()));
        }
        lines += &line(&Order::Part(cut));
        worker.parts.push_back(cut);
        // If it has ended, its end arrives as an event.
        let _ = worker.orders.write_all(lines.as_bytes());
        Ok(())
    }

    fn start(&mut self, index: usize) -> Result<Worker, Failure> {
        let WorkerCommand { program, arguments } = &self.command;
        let mut process = Command::new(program)
            .args(arguments)
            .envs(self.environments[index].iter().cloned())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| {
                let program = program.display();
                Failure::Other(format!("cannot start the worker {program}: {error}"))
            })?;
        let mut orders = process.stdin.take().expect("a pipe");
        let replies = process.stdout.take().expect("a pipe");
        let number = self.started;
        self.started += 1;
        let send = self.send.clone();
        thread::spawn(move || {
            for line in BufReader::new(replies).lines().map_while(Result::ok) {
                // Anything else is of a library that prints to stdout.
                if let Ok(reply) = serde_json::from_str(&line)
                    && send.send((index, number, Some(reply))).is_err()
                {
                    return;
                }
            }
            let _ = send.send((index, number, None));
        });
        let _ = orders.write_all(format!("{}\n", self.begin).as_bytes());
        Ok(Worker {
            process,
            orders,
            number,
            parts: VecDeque::new(),
            computing: None,
            is_told: false,
        })
    }

    /// Waits for the next event; `None` after `at_most`.
    pub fn wait(&mut self, at_most: Duration) -> Option<Event> {
        let until = Instant::now() + at_most;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let (index, number, reply) = match self.receive.recv_timeout(left) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => return None,
                Err(RecvTimeoutError::Disconnected) => unreachable!("the pool has a sender"),
            };
            let slot = &mut self.workers[index];
            // A process that was replaced has nothing more to say.
            let Some(worker) = slot.as_mut().filter(|worker| worker.number == number) else {
                continue;
            };
            match reply {
                Some(reply) => {
                    match &reply {
                        Reply::Began(part) => worker.computing = Some(*part),
                        Reply::Part(done) => {
                            worker.parts.retain(|cut| cut.part != done.record.part);
                        }
                        _ => {}
                    }
                    return Some(Event::Reply(index, reply));
                }
                None => {
                    let mut worker = slot.take().expect("it was there");
                    let status = worker.process.wait();
                    // Another one may be computed, but not yet written.
                    let computing = worker.parts.iter();
                    let mut computing = computing.map(|cut| Some(cut.part));
                    if let Some(place) = computing.position(|part| part == worker.computing) {
                        worker.parts.swap(0, place);
                    }
                    return Some(Event::Ended(index, ended(status.ok()), worker.parts));
                }
            }
        }
    }
}

impl Pool {
    /// Closes the input of all workers, which lets them end, kills those that do not, and returns the
    /// parts that they have finished meanwhile.
    pub fn end(&mut self) -> Vec<PartDone> {
        let mut running: Vec<(u32, Child)> = Vec::new();
        for worker in self.workers.iter_mut().filter_map(Option::take) {
            drop(worker.orders);
            running.push((worker.number, worker.process));
        }
        let mut left: Vec<u32> = running.iter().map(|(number, _)| *number).collect();
        let mut finished = Vec::new();
        let until = Instant::now() + ENDS_WITHIN;
        while !left.is_empty() {
            let wait = until.saturating_duration_since(Instant::now());
            match self.receive.recv_timeout(wait) {
                Ok((_, _, Some(Reply::Part(done)))) => finished.push(*done),
                Ok((_, _, Some(_))) => {}
                Ok((_, number, None)) => left.retain(|other| *other != number),
                Err(_) => break,
            }
        }
        for (_, mut process) in running {
            let _ = process.kill();
            let _ = process.wait();
        }
        finished
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.end();
    }
}

fn line(order: &Order) -> String {
    let text = serde_json::to_string(order).expect("plain data");
    format!("{text}\n")
}

/// Describes how a process ended: `signal 9`, `exit code 1`.
fn ended(status: Option<ExitStatus>) -> String {
    match status {
        Some(status) => match (status.signal(), status.code()) {
            (Some(signal), _) => format!("signal {signal}"),
            (None, Some(code)) => format!("exit code {code}"),
            (None, None) => "an unknown status".to_owned(),
        },
        None => "an unknown status".to_owned(),
    }
}
