//! `pipeline label`: a page on which people say which of two answers is better.
//!
//! The page is a file of this program and asks nobody else for anything. It is served to this machine only,
//! to those who know the key in its address, and to no page of another site: names that lead here from
//! elsewhere (the header `Host`) and requests from there (`Origin`) are refused.

mod desk;
mod questions;
mod request;
mod server;

use std::cell::RefCell;
use std::io::Read;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use self::desk::Desk;
use self::request::{Request, Saying, parameter};
use self::server::{Answer, Asked, Server, Site};
use super::out::say;
use super::{Failed, read_run, run_folder};
use ovchat_data::store::{Images, Label, LabelFiles, RunFolder, Said, Survey};
use ovchat_models::media_type;
use ovchat_pipeline::run::Interrupt;

const PAGE: &str = include_str!("label/page.html");

/// Shows answers that a run waits to have labels for, and takes what people say of them.
#[derive(Args)]
#[command(after_help = "Examples:\n  pipeline label runs/small-world\n  \
    pipeline label small-world --port 8080\n  pipeline label small-world --table pairs --round 2")]
pub struct LabelRun {
    /// The run: its folder, or its name below runs/.
    run: PathBuf,
    /// The port of this machine to serve the page on; 0 takes a free one.
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// The table that waits, if several do.
    #[arg(long)]
    table: Option<String>,
    /// The round that waits, if several do.
    #[arg(long)]
    round: Option<u32>,
}

impl LabelRun {
    pub fn run(&self) -> Result<(), Failed> {
        let folder = run_folder(&self.run);
        let run = read_run(&folder)?;
        let survey = self.survey(&run)?;
        let files = LabelFiles::new(run.root(), &survey.table, survey.round);
        let title = match survey.round {
            Some(round) => format!("`{}` (round {round})", survey.table),
            None => format!("`{}`", survey.table),
        };
        let writer = files.write()?;
        let questions = questions::find(&run, &survey)?;
        let desk = Desk::new(writer, survey, questions);
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
        if let Some(note) = desk.note() {
            say!("{note}");
        }
        let (said, wanted, questions) = (desk.said(), desk.wanted(), desk.questions());
        say!("{title}: {said} of {wanted} labels so far, {questions} questions");
        say!("http://{address}/?key={key}");
        say!("this machine only; Ctrl-C ends it, what was said is kept");
        let page = Page {
            key,
            port: address.port(),
            desk: RefCell::new(desk),
            images: RefCell::new(images),
        };
        server.serve(page, &|| interrupt.raised());
        let (labels, _) = files.read()?;
        say!("{} labels, kept in {}", said_in(&labels), folder.display());
        Ok(())
    }

    /// What is asked: what was named, or the first that still waits.
    fn survey(&self, run: &RunFolder) -> Result<Survey, Failed> {
        let mut surveys = LabelFiles::surveys(run.root());
        surveys.retain(|survey| {
            self.table
                .as_ref()
                .is_none_or(|table| *table == survey.table)
                && (self.round.is_none() || self.round == survey.round)
        });
        let mut last = None;
        for survey in surveys {
            let files = LabelFiles::new(run.root(), &survey.table, survey.round);
            let (labels, _) = files.read()?;
            if said_in(&labels) < survey.wanted {
                return Ok(survey);
            }
            last = Some(survey);
        }
        last.ok_or_else(|| {
            Failed::Words(format!(
                "nobody is asked anything in {}: a stage `ask_people` asks, once the run has reached it",
                run.root().display()
            ))
        })
    }
}

/// A key that nobody guesses.
fn key() -> Result<String, Failed> {
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .map_err(|error| Failed::Words(format!("no random numbers: {error}")))?;
    Ok(format!("{:032x}", u128::from_le_bytes(bytes)))
}

/// The number of labels other than skips.
fn said_in(labels: &[Label]) -> u64 {
    let said = labels.iter().filter(|label| label.said != Said::Skip);
    said.count() as u64
}

/// The page, and what it asks for.
struct Page {
    key: String,
    port: u16,
    desk: RefCell<Desk>,
    images: RefCell<Images>,
}

impl Site for Page {
    fn refusal(&self, asked: &Asked<'_>) -> Option<Answer> {
        let hosts = ["127.0.0.1", "localhost"].map(|host| format!("{host}:{}", self.port));
        let is_own = |name: &str| hosts.iter().any(|own| own == name);
        if !asked.header("host").is_some_and(is_own) {
            return Some(self.wrong(403, "this page is for this machine only"));
        }
        let origin = asked.headers.get("origin").map(|origin| origin.as_bytes());
        let origins = hosts.map(|host| format!("http://{host}"));
        if origin.is_some_and(|origin| origins.iter().all(|own| own.as_bytes() != origin)) {
            return Some(self.wrong(403, "pages of other sites are not answered"));
        }
        let key = asked.header("x-key").or(parameter(asked.query, "key"));
        if key != Some(self.key.as_str()) {
            let why = "the key is missing or wrong: open the address that `pipeline label` says";
            return Some(self.wrong(403, why));
        }
        None
    }

    fn answer(&self, asked: &Asked<'_>, body: &[u8]) -> Answer {
        let desk = &mut *self.desk.borrow_mut();
        match request::read(asked.method, asked.path, asked.query, body) {
            Ok(Request::Page) => Answer {
                status: 200,
                media: "text/html; charset=utf-8",
                content: PAGE.into(),
            },
            Ok(Request::Next(by)) => found(&desk.next(&by)),
            Ok(Request::Say(saying)) => self.say(desk, &saying),
            Ok(Request::Undo { by, label }) => match desk.undo(&by, label) {
                Ok(()) => found(&desk.next(&by)),
                Err(failed) => self.wrong(500, &failed.to_string()),
            },
            Ok(Request::Picture(id)) if desk.shows(id) => {
                match self.images.borrow_mut().bytes(id) {
                    Ok(bytes) => Answer {
                        status: 200,
                        media: media_type(&bytes).unwrap_or("application/octet-stream"),
                        content: bytes.to_vec(),
                    },
                    Err(error) => self.wrong(500, &error.to_string()),
                }
            }
            Ok(Request::Picture(_)) => self.wrong(404, "there is nothing here"),
            Err((status, why)) => self.wrong(status, &why),
        }
    }

    fn wrong(&self, status: u16, why: &str) -> Answer {
        let content = json!({ "error": why }).to_string().into();
        Answer {
            status,
            media: "application/json",
            content,
        }
    }
}

impl Page {
    /// Takes what somebody says.
    fn say(&self, desk: &mut Desk, saying: &Saying) -> Answer {
        let before = desk.said();
        let label = match desk.say(saying) {
            Ok(label) => label,
            Err(failed) => return self.wrong(409, &failed.to_string()),
        };
        let after = desk.said();
        if before < desk.wanted() && after >= desk.wanted() {
            say!("{after} labels are enough: run the pipeline again to go on");
        }
        let mut next = desk.next(&saying.by);
        next["label"] = json!(label);
        found(&next)
    }
}

fn found(value: &Value) -> Answer {
    Answer {
        status: 200,
        media: "application/json",
        content: value.to_string().into(),
    }
}
