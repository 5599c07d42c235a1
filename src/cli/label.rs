//! `pipeline label`: a page on which people say which of two answers is better.
//!
//! The page is a file of this program and asks nobody else for anything. It is served to this machine only,
//! to those who know the key in its address, and to no page of another site: names that lead here from
//! elsewhere (the header `Host`) and requests from there (`Origin`) are refused.

mod desk;

use std::io::Read;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};
use tiny_http::{Header, Method, Request, Response, Server};

use self::desk::Desk;
use super::out::say;
use super::{Failed, read_run, run_folder};
use crate::models::media_type;
use crate::run::Interrupt;
use crate::store::{Images, LabelFiles, RunFolder, Said, Survey};

const PAGE: &str = include_str!("label/page.html");

/// The largest request that is read.
const BODY_MAX: u64 = 64 << 10;

/// Between two looks at whether to stop.
const LOOK_EVERY: Duration = Duration::from_millis(200);

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

/// What the page says.
#[derive(Deserialize)]
struct Saying {
    by: String,
    question: usize,
    said: Said,
    milliseconds: u64,
}

#[derive(Deserialize)]
struct Undoing {
    by: String,
}

/// An answer to a request: status, type, body.
type Answer = (u16, &'static str, Vec<u8>);

impl LabelRun {
    pub fn run(&self) -> Result<(), Failed> {
        let folder = run_folder(&self.run);
        let run = read_run(&folder)?;
        let survey = self.survey(&run)?;
        let title = match survey.round {
            Some(round) => format!("`{}` (round {round})", survey.table),
            None => format!("`{}`", survey.table),
        };
        let mut desk = Desk::open(&run, survey)?;
        let mut images = Images::open(run.root(), &run.manifest().images)?;
        let server = Server::http((Ipv4Addr::LOCALHOST, self.port)).map_err(|error| {
            Failed::Words(format!(
                "cannot serve a page on port {}: {error}",
                self.port
            ))
        })?;
        let address = server
            .server_addr()
            .to_ip()
            .expect("it listens to an address");
        let key = key()?;
        let guard = Guard {
            key: &key,
            port: address.port(),
        };
        let (said, wanted, questions) = (desk.said(), desk.wanted(), desk.questions());
        say!("{title}: {said} of {wanted} labels so far, {questions} questions");
        say!("http://{address}/?key={key}");
        say!("this machine only; Ctrl-C ends it, what was said is kept");
        let interrupt = Interrupt::listen()
            .map_err(|error| Failed::Words(format!("cannot listen to signals: {error}")))?;
        while !interrupt.raised() {
            let request = server
                .recv_timeout(LOOK_EVERY)
                .map_err(|error| Failed::Words(format!("cannot serve the page: {error}")))?;
            let Some(mut request) = request else {
                continue;
            };
            let before = desk.said();
            let (status, media, body) = answer(&guard, &mut desk, &mut images, &mut request);
            let after = desk.said();
            if before < desk.wanted() && after >= desk.wanted() {
                say!("{after} labels are enough: run the pipeline again to go on");
            }
            // Somebody who has left hears nothing.
            drop(request.respond(response(status, media, body)));
        }
        say!("{} labels, kept in {}", desk.said(), folder.display());
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
            let labels = files.read()?;
            let said = labels
                .iter()
                .filter(|label| label.said != Said::Skip)
                .count() as u64;
            if said < survey.wanted {
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

/// Who is let in.
struct Guard<'a> {
    key: &'a str,
    port: u16,
}

impl Guard<'_> {
    /// Why a request is refused, if it is.
    fn refusal(&self, request: &Request, query: &str) -> Option<&'static str> {
        let header = |name: &'static str| {
            let mut headers = request.headers().iter();
            let found = headers.find(|header| header.field.equiv(name));
            found.map(|header| header.value.as_str())
        };
        let hosts = ["127.0.0.1", "localhost"].map(|host| format!("{host}:{}", self.port));
        if !header("Host").is_some_and(|host| hosts.iter().any(|own| own == host)) {
            return Some("this page is for this machine only");
        }
        let origins = hosts.map(|host| format!("http://{host}"));
        if header("Origin").is_some_and(|origin| origins.iter().all(|own| own != origin)) {
            return Some("pages of other sites are not answered");
        }
        let in_query = query.split('&').find_map(|part| part.strip_prefix("key="));
        if header("X-Key").or(in_query) != Some(self.key) {
            return Some(
                "the key is missing or wrong: open the address that `pipeline label` says",
            );
        }
        None
    }
}

fn answer(
    guard: &Guard<'_>,
    desk: &mut Desk,
    images: &mut Images,
    request: &mut Request,
) -> Answer {
    let url = request.url().to_owned();
    let (path, query) = url.split_once('?').unwrap_or((&url, ""));
    if let Some(refusal) = guard.refusal(request, query) {
        return wrong(403, refusal);
    }
    let method = request.method().clone();
    let mut body = Vec::new();
    let read = request.as_reader().take(BODY_MAX).read_to_end(&mut body);
    if let Err(error) = read {
        return wrong(400, &error.to_string());
    }
    match (&method, path) {
        (Method::Get, "/") => (200, "text/html; charset=utf-8", PAGE.into()),
        (Method::Get, "/api/next") => {
            let by = query.split('&').find_map(|part| part.strip_prefix("by="));
            found(&desk.next(&decoded(by.unwrap_or("somebody"))))
        }
        (Method::Post, "/api/say") => match serde_json::from_slice::<Saying>(&body) {
            Err(error) => wrong(400, &error.to_string()),
            Ok(Saying {
                said: Said::Undone, ..
            }) => wrong(400, "that is not to be said"),
            Ok(saying) => {
                let said = desk.say(
                    &saying.by,
                    saying.question,
                    saying.said,
                    saying.milliseconds,
                );
                match said {
                    Ok(()) => found(&desk.next(&saying.by)),
                    Err(failed) => wrong(409, &failed.to_string()),
                }
            }
        },
        (Method::Post, "/api/undo") => match serde_json::from_slice::<Undoing>(&body) {
            Err(error) => wrong(400, &error.to_string()),
            Ok(Undoing { by }) => match desk.undo(&by) {
                Ok(()) => found(&desk.next(&by)),
                Err(failed) => wrong(500, &failed.to_string()),
            },
        },
        (Method::Get, path) => match path.strip_prefix("/picture/") {
            Some(id) if desk.shows(id) => match images.bytes(id) {
                Ok(bytes) => (
                    200,
                    media_type(&bytes).unwrap_or("application/octet-stream"),
                    bytes.to_vec(),
                ),
                Err(error) => wrong(500, &error.to_string()),
            },
            _ => wrong(404, "there is nothing here"),
        },
        _ => wrong(405, "that can't be done here"),
    }
}

fn found(value: &Value) -> Answer {
    (200, "application/json", value.to_string().into())
}

fn wrong(status: u16, why: &str) -> Answer {
    (
        status,
        "application/json",
        json!({ "error": why }).to_string().into(),
    )
}

/// A part of a query as it was meant: `%20` is a space.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, behind)) = rest.split_first() {
        rest = behind;
        let hex = behind
            .get(..2)
            .and_then(|two| std::str::from_utf8(two).ok());
        let code = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match (byte, code) {
            (b'%', Some(code)) => {
                bytes.push(code);
                rest = &behind[2..];
            }
            _ => bytes.push(byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn response(status: u16, media: &str, body: Vec<u8>) -> Response<std::io::Cursor<Vec<u8>>> {
    let policy = "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'unsafe-inline'; \
                  script-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";
    let headers = [
        ("Content-Type", media),
        ("Content-Security-Policy", policy),
        ("Referrer-Policy", "no-referrer"),
        ("Cache-Control", "no-store"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
    ];
    let mut response = Response::from_data(body).with_status_code(status);
    for (name, value) in headers {
        let header = Header::from_bytes(name, value);
        response.add_header(header.expect("our own headers are well formed"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::decoded;

    #[test]
    fn names_come_out_of_addresses_as_they_went_in() {
        assert_eq!(decoded("Ann%20B%C3%BCrki%25"), "Ann Bürki%");
        assert_eq!(decoded("50%"), "50%");
    }
}
