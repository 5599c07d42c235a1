//! Judges behind an OpenAI-compatible endpoint (`POST <base_url>/chat/completions`).
//!
//! Every reply is appended to the call log and synced before it is used, so no request is paid for
//! twice even if the process is killed. The number of concurrent calls adapts to the endpoint: it
//! grows by one with every reply until the endpoint rejects a call as too many; then it is halved,
//! and grows by one with every round of replies.

mod call_log;
mod client;
mod endpoint;
mod limiter;
mod settings;

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use self::call_log::CallLog;
use self::client::{EndpointClient, Heard, Reply, Work, lock};
use self::endpoint::Endpoint;
use self::limiter::CallLimiter;
use self::settings::key_in;
pub use self::settings::{BaseUrl, Http, INVALID_KEY, Price, Spend, SpendLimit};
use super::{Emit, Listener, ModelError, ModelTelemetry, Request, Writer};
use ovchat_io::mask::{Mask, SECRET_MIN};

/// Interval at which the writer checks for an interruption.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Time that an interrupted run still waits for replies in flight.
const GRACE: Duration = Duration::from_secs(1);

/// A [`Writer`] that calls an endpoint.
pub struct HttpWriter {
    asker: Arc<EndpointClient>,
    /// Notes to show before the first request.
    notes: Vec<String>,
}

impl HttpWriter {
    /// Opens an endpoint. `journal` is the path of the judge's call log for this run; logged texts
    /// and notes are masked. Fails if the key is not in the environment or the call log cannot be
    /// opened.
    pub fn open(spec: &Http, journal: &Path, mask: Mask) -> Result<Self, ModelError> {
        let fails = |problem: String| ModelError::Service {
            url: spec.base_url.calls(),
            problem,
        };
        let key = match &spec.key_env {
            None => None,
            Some(name) => Some(key_in(name).ok_or_else(|| {
                fails(format!(
                    "the environment variable {name}, which `key_env` names, is not set"
                ))
            })?),
        };
        if let Some(name) = spec.invalid_key() {
            return Err(fails(format!(
                "the environment variable {name} {INVALID_KEY}"
            )));
        }
        if let Some(name) = spec.short_key() {
            return Err(fails(format!(
                "the value of {name} is shorter than {SECRET_MIN} characters and cannot be an API key"
            )));
        }
        let (endpoint, tls) = Endpoint::open(spec, key, mask.clone()).map_err(fails)?;
        let mut journal_of_run = CallLog::open(journal)?;
        let notes = [tls, journal_of_run.note.take()];
        let asker = EndpointClient {
            spec: spec.clone(),
            endpoint,
            judge: journal
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            mask,
            was_heard: AtomicBool::new(!journal_of_run.is_empty()),
            journal: Mutex::new(journal_of_run),
        };
        Ok(Self {
            asker: Arc::new(asker),
            notes: notes.into_iter().flatten().collect(),
        })
    }
}

impl Writer for HttpWriter {
    fn reply(
        &mut self,
        requests: &[Request],
        emit: Emit<'_, String>,
        listener: &mut Listener<'_>,
    ) -> Result<ModelTelemetry, ModelError> {
        for note in self.notes.drain(..) {
            (listener.say)(&note);
        }
        let begun = Instant::now();
        let telemetry = ModelTelemetry {
            prompts: requests.len() as u64,
            ..ModelTelemetry::default()
        };
        let hash = |request: &Request| self.asker.hash(request);
        let hashes: Vec<String> = requests.iter().map(hash).collect();
        let same = same(&hashes);
        let Logged { known, missing } = self.logged(&hashes, &same);
        for (index, reply) in known {
            for &same in &same[index] {
                if emit(same, Ok(reply.clone())).is_break() {
                    return Ok(telemetry);
                }
            }
        }
        let work = Arc::new(Work {
            asker: Arc::clone(&self.asker),
            requests: requests.to_vec(),
            hashes,
            waiting: Mutex::new(missing),
            gate: CallLimiter::new(self.asker.spec.concurrency_max),
        });
        let messages = work.start()?;
        let mut replies = Replies {
            same,
            gate: &work.gate,
            telemetry,
            failed: None,
            stopped: None,
        };
        loop {
            if replies.stopped.is_none() && (listener.stopping)() {
                replies.stop();
            }
            if replies.stopped.is_some_and(|at| at.elapsed() > GRACE) {
                break;
            }
            match messages.recv_timeout(LOOK_EVERY) {
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
                Ok(Heard::Note(text)) => (listener.say)(&text),
                Ok(Heard::Reply(index, reply)) => replies.take(index, reply, emit),
            }
        }
        let Replies {
            mut telemetry,
            failed,
            ..
        } = replies;
        telemetry.seconds_decode = begun.elapsed().as_secs_f64();
        let images = requests.iter().flat_map(|request| &request.prompt.images);
        let distinct: HashSet<&str> = images.map(|image| image.id.as_str()).collect();
        telemetry.images = distinct.len() as u64;
        failed.map_or(Ok(telemetry), Err)
    }

    fn plan(&self) -> Option<String> {
        let (model, most) = (&self.asker.spec.model, self.asker.spec.concurrency_max);
        Some(format!(
            "{model} at {}, up to {most} concurrent calls",
            self.asker.endpoint.url()
        ))
    }
}

/// Returns the indices of the requests that are equal to each request, itself included; none if an
/// earlier request is equal.
fn same(hashes: &[String]) -> Vec<Vec<usize>> {
    let mut same = vec![Vec::new(); hashes.len()];
    let mut first: HashMap<&str, usize> = HashMap::new();
    for (index, hash) in hashes.iter().enumerate() {
        same[*first.entry(hash).or_insert(index)].push(index);
    }
    same
}

/// The distinct requests of a batch, by their indices.
struct Logged {
    /// Requests with a reply in the call log.
    known: Vec<(usize, String)>,
    /// Requests that are still to be sent.
    missing: VecDeque<usize>,
}

impl HttpWriter {
    /// Looks up the distinct requests in the call log.
    fn logged(&self, hashes: &[String], same: &[Vec<usize>]) -> Logged {
        let mut known = Vec::new();
        let mut missing = VecDeque::new();
        let journal = lock(&self.asker.journal);
        for (index, hash) in hashes.iter().enumerate() {
            if same[index].is_empty() {
                continue;
            }
            match journal.reply(hash) {
                Some(reply) => known.push((index, reply.clone())),
                None => missing.push_back(index),
            }
        }
        Logged { known, missing }
    }
}

/// The replies to a batch of requests, as they arrive.
struct Replies<'w> {
    /// See [`same`].
    same: Vec<Vec<usize>>,
    gate: &'w CallLimiter,
    telemetry: ModelTelemetry,
    /// The first error after which no more calls can be made.
    failed: Option<ModelError>,
    /// The time from which no more replies are wanted. Calls in flight still get a short time to
    /// finish and enter the call log.
    stopped: Option<Instant>,
}

impl Replies<'_> {
    /// Starts no more calls.
    fn stop(&mut self) {
        self.stopped = Some(Instant::now());
        self.gate.close();
    }

    /// Takes the outcome of the request `index`, and emits it for all equal requests.
    fn take(&mut self, index: usize, reply: Reply, emit: Emit<'_, String>) {
        let reply = match reply {
            Reply::Written(call) => {
                self.telemetry.prompt_tokens += call.prompt_tokens;
                self.telemetry.answer_tokens += call.reply_tokens;
                Ok(call.reply)
            }
            Reply::Refused(fault) => Err(fault),
            Reply::Failed(error) => {
                self.failed.get_or_insert(error);
                return;
            }
        };
        let mut same = self.same[index].iter();
        if self.stopped.is_none() && same.any(|&same| emit(same, reply.clone()).is_break()) {
            self.stop();
        }
    }
}
