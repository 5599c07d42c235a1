//! `pipeline label`: a local web page on which annotators choose the better of two answers.
//!
//! The page is embedded in this program and loads nothing from elsewhere. It is served on localhost
//! only, to clients that know the key in its address, and never to pages of other sites: requests
//! with a foreign `Host` or `Origin` header are rejected.

mod questions;
mod queue;
mod request;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::response::Response;
use clap::Args;
use serde_json::json;

use self::queue::LabelQueue;
use self::request::{Request, Saying, parameter};
use super::failed::Failed;
use super::file::{read_run, run_folder};
use super::out::say;
use super::web::{self, Access, Server};
use ovchat_data::store::{Images, LabelFiles, LabelLine, LabelTask, LabelVerdict, RunFolder};
use ovchat_models::media_type;
use ovchat_pipeline::run::Interrupt;

const PAGE: &str = include_str!("label/page.html");

/// The Content-Security-Policy of the page: it may load itself.
const POLICY: &str = "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'unsafe-inline'; \
    script-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

/// The time limit for a connection, including its response.
const WHOLE_TIME: Duration = Duration::from_secs(30);

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
    /// The share of the questions that two annotators get, from 0 to 1, to measure how often they
    /// agree. Answers on which they disagree make no pair.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    twice: f64,
}

/// Reads a share.
fn share(text: &str) -> Result<f64, String> {
    let share = text
        .parse()
        .ok()
        .filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "a share is a number from 0 to 1".to_owned())
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
        let queue = LabelQueue::new(writer, task, questions, self.twice);
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
        let access = Access::new(address.port())?;
        if let Some(note) = queue.note() {
            say!("{note}");
        }
        let (said, wanted, questions) = (queue.said(), queue.wanted(), queue.questions());
        say!("{title}: {said} of {wanted} labels so far, {questions} questions");
        say!("http://{address}/?key={}", access.key);
        say!(
            "serving on localhost only; press Ctrl-C to stop (labels are saved as they are given)"
        );
        let page = Arc::new(Page {
            access,
            queue: Mutex::new(queue),
            images: Mutex::new(images),
        });
        let site = Router::new().fallback(move |request| answer(Arc::clone(&page), request));
        server.serve(&site, WHOLE_TIME, &|| interrupt.raised());
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

/// Counts the labels other than skips.
fn said_in(labels: &[LabelLine]) -> u64 {
    let said = labels
        .iter()
        .filter(|label| label.said != LabelVerdict::Skip);
    said.count() as u64
}

/// The page, and the data behind it.
struct Page {
    access: Access,
    queue: Mutex<LabelQueue>,
    images: Mutex<Images>,
}

/// Responds to a request. The body is only read for accepted clients.
async fn answer(page: Arc<Page>, request: axum::extract::Request) -> Response {
    let (parts, body) = request.into_parts();
    let query = parts.uri.query().unwrap_or_default();
    let in_header = parts.headers.get("x-key").and_then(|key| key.to_str().ok());
    let key = in_header.or(parameter(query, "key"));
    let response = match page.access.refusal(&parts.headers, key) {
        Some(why) => web::wrong(403, why),
        None => match web::read(&parts.method, body).await {
            Ok(body) => page.answer(parts.method.as_str(), parts.uri.path(), query, &body),
            Err((status, why)) => web::wrong(status, &why),
        },
    };
    web::confined(response, POLICY)
}

impl Page {
    fn answer(&self, method: &str, path: &str, query: &str, body: &[u8]) -> Response {
        let queue = &mut *self.queue.lock().expect("no panic while locked");
        match request::read(method, path, query, body) {
            Ok(Request::Page) => web::response(200, "text/html; charset=utf-8", PAGE),
            Ok(Request::Next(by)) => web::json(&queue.next(&by)),
            Ok(Request::Say(saying)) => say_label(queue, &saying),
            Ok(Request::Undo { by, label }) => match queue.undo(&by, label) {
                Ok(()) => web::json(&queue.next(&by)),
                Err(failed) => web::wrong(500, &failed.to_string()),
            },
            Ok(Request::Image(id)) if queue.shows(id) => self.image(id),
            Ok(Request::Image(_)) => web::wrong(404, "not found"),
            Err((status, why)) => web::wrong(status, &why),
        }
    }

    fn image(&self, id: &str) -> Response {
        let mut images = self.images.lock().expect("no panic while locked");
        match images.bytes(id) {
            Ok(bytes) => {
                let media = media_type(&bytes).unwrap_or("application/octet-stream");
                web::response(200, media, bytes.to_vec())
            }
            Err(error) => web::wrong(500, &error.to_string()),
        }
    }
}

/// Records a label.
fn say_label(queue: &mut LabelQueue, saying: &Saying) -> Response {
    let before = queue.said();
    let label = match queue.say(saying) {
        Ok(label) => label,
        Err(failed) => return web::wrong(409, &failed.to_string()),
    };
    let after = queue.said();
    if before < queue.wanted() && after >= queue.wanted() {
        say!("{after} labels: enough for the run; run the pipeline again to resume");
    }
    let mut next = queue.next(&saying.by);
    next["label"] = json!(label);
    web::json(&next)
}
