//! `pipeline label`: a local web page on which annotators choose the better of two answers.
//!
//! The page is embedded in this program and loads nothing from elsewhere. It is served on localhost
//! only, to clients that know the key in its address, and never to pages of other sites: requests
//! with a foreign `Host` or `Origin` header are rejected.

mod questions;
mod queue;
mod request;
mod server;

use std::cell::RefCell;
use std::io::Read;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use self::queue::LabelQueue;
use self::request::{Request, Saying, parameter};
use self::server::{Asked, HttpResponse, Server, Site};
use super::failed::Failed;
use super::file::{read_run, run_folder};
use super::out::say;
use ovchat_data::store::{Images, LabelFiles, LabelLine, LabelTask, LabelVerdict, RunFolder};
use ovchat_models::media_type;
use ovchat_pipeline::run::Interrupt;

const PAGE: &str = include_str!("label/page.html");

/// Serve a labeling page for the answers that a run needs labels for.
#[derive(Args)]
#[command(after_help = "Examples:\n  pipeline label runs/small-world\n  \
    pipeline label small-world --port 8080\n  pipeline label small-world --table pairs --round 2")]
pub struct LabelRun {
    /// The run: its folder, or its name below runs/.
    run: PathBuf,
    /// The port on localhost to serve the page on; 0 picks a free port.
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// The table to label, if several need labels.
    #[arg(long)]
    table: Option<String>,
    /// The round to label, if several need labels.
    #[arg(long)]
    round: Option<u32>,
}

impl LabelRun {
    pub fn run(&self) -> Result<(), Failed> {
        let folder = run_folder(&self.run);
        let run = read_run(&folder)?;
        let task = self.task(&run)?;
        let files = LabelFiles::new(run.root(), &task.table, task.round);
        let title = match task.round {
            Some(round) => format!("`{}` (round {round})", task.table),
            None => format!("`{}`", task.table),
        };
        let writer = files.write()?;
        let questions = questions::find(&run, &task)?;
        let queue = LabelQueue::new(writer, task, questions);
        let images = Images::open(run.root(), &run.manifest().images)?;
        let server = Server::listen(self.port).map_err(|error| {
            Failed::Words(format!(
                "cannot serve a page on port {}: {error}",
                self.port
            ))
        })?;
        let interrupt = Interrupt::listen()
            .map_err(|error| Failed::Words(format!("cannot listen to signals: {error}")))?;
        let address = server.address();
        let key = key()?;
        if let Some(note) = queue.note() {
            say!("{note}");
        }
        let (said, wanted, questions) = (queue.said(), queue.wanted(), queue.questions());
        say!("{title}: {said} of {wanted} labels so far, {questions} questions");
        say!("http://{address}/?key={key}");
        say!(
            "serving on localhost only; press Ctrl-C to stop (labels are saved as they are given)"
        );
        let page = Page {
            key,
            port: address.port(),
            queue: RefCell::new(queue),
            images: RefCell::new(images),
        };
        server.serve(page, &|| interrupt.raised());
        let (labels, _) = files.read()?;
        say!("{} labels saved in {}", said_in(&labels), folder.display());
        Ok(())
    }

    /// Returns the requested labeling task, or the first one that still needs labels.
    fn task(&self, run: &RunFolder) -> Result<LabelTask, Failed> {
        let mut tasks = LabelFiles::tasks(run.root());
        tasks.retain(|task| {
            self.table.as_ref().is_none_or(|table| *table == task.table)
                && (self.round.is_none() || self.round == task.round)
        });
        let mut last = None;
        for task in tasks {
            let files = LabelFiles::new(run.root(), &task.table, task.round);
            let (labels, _) = files.read()?;
            if said_in(&labels) < task.wanted {
                return Ok(task);
            }
            last = Some(task);
        }
        last.ok_or_else(|| {
            Failed::Words(format!(
                "no labeling task in {}: tasks are created when the run reaches an `ask_people` stage",
                run.root().display()
            ))
        })
    }
}

/// Returns a random access key.
fn key() -> Result<String, Failed> {
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .map_err(|error| Failed::Words(format!("cannot read random bytes: {error}")))?;
    Ok(format!("{:032x}", u128::from_le_bytes(bytes)))
}

/// Counts the labels other than skips.
fn said_in(labels: &[LabelLine]) -> u64 {
    let said = labels
        .iter()
        .filter(|label| label.said != LabelVerdict::Skip);
    said.count() as u64
}

/// The page, and the data behind it.
struct Page {
    key: String,
    port: u16,
    queue: RefCell<LabelQueue>,
    images: RefCell<Images>,
}

impl Site for Page {
    fn refusal(&self, asked: &Asked<'_>) -> Option<HttpResponse> {
        let hosts = ["127.0.0.1", "localhost"].map(|host| format!("{host}:{}", self.port));
        let is_own = |name: &str| hosts.iter().any(|own| own == name);
        if !asked.header("host").is_some_and(is_own) {
            return Some(self.wrong(403, "this page is only served on localhost"));
        }
        let origin = asked.headers.get("origin").map(|origin| origin.as_bytes());
        let origins = hosts.map(|host| format!("http://{host}"));
        if origin.is_some_and(|origin| origins.iter().all(|own| own.as_bytes() != origin)) {
            return Some(self.wrong(403, "requests from other sites are rejected"));
        }
        let key = asked.header("x-key").or(parameter(asked.query, "key"));
        if key != Some(self.key.as_str()) {
            let why = "the key is missing or wrong; open the address that `pipeline label` printed";
            return Some(self.wrong(403, why));
        }
        None
    }

    fn answer(&self, asked: &Asked<'_>, body: &[u8]) -> HttpResponse {
        let queue = &mut *self.queue.borrow_mut();
        match request::read(asked.method, asked.path, asked.query, body) {
            Ok(Request::Page) => HttpResponse {
                status: 200,
                media: "text/html; charset=utf-8",
                content: PAGE.into(),
            },
            Ok(Request::Next(by)) => found(&queue.next(&by)),
            Ok(Request::Say(saying)) => self.say(queue, &saying),
            Ok(Request::Undo { by, label }) => match queue.undo(&by, label) {
                Ok(()) => found(&queue.next(&by)),
                Err(failed) => self.wrong(500, &failed.to_string()),
            },
            Ok(Request::Image(id)) if queue.shows(id) => match self.images.borrow_mut().bytes(id) {
                Ok(bytes) => HttpResponse {
                    status: 200,
                    media: media_type(&bytes).unwrap_or("application/octet-stream"),
                    content: bytes.to_vec(),
                },
                Err(error) => self.wrong(500, &error.to_string()),
            },
            Ok(Request::Image(_)) => self.wrong(404, "not found"),
            Err((status, why)) => self.wrong(status, &why),
        }
    }

    fn wrong(&self, status: u16, why: &str) -> HttpResponse {
        let content = json!({ "error": why }).to_string().into();
        HttpResponse {
            status,
            media: "application/json",
            content,
        }
    }
}

impl Page {
    /// Records a label.
    fn say(&self, queue: &mut LabelQueue, saying: &Saying) -> HttpResponse {
        let before = queue.said();
        let label = match queue.say(saying) {
            Ok(label) => label,
            Err(failed) => return self.wrong(409, &failed.to_string()),
        };
        let after = queue.said();
        if before < queue.wanted() && after >= queue.wanted() {
            say!("{after} labels: enough for the run; run the pipeline again to resume");
        }
        let mut next = queue.next(&saying.by);
        next["label"] = json!(label);
        found(&next)
    }
}

fn found(value: &Value) -> HttpResponse {
    HttpResponse {
        status: 200,
        media: "application/json",
        content: value.to_string().into(),
    }
}
