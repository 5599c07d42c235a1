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
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread;
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
        let mut telemetry = ModelTelemetry {
            prompts: requests.len() as u64,
            ..ModelTelemetry::default()
        };
        let hash = |request: &Request| self.asker.hash(request);
        let hashes: Vec<String> = requests.iter().map(hash).collect();
        let mut of: HashMap<&str, Vec<usize>> = HashMap::new();
        let mut waiting = VecDeque::new();
        for (index, hash) in hashes.iter().enumerate() {
            let same = of.entry(hash).or_default();
            if same.is_empty() {
                waiting.push_back(index);
            }
            same.push(index);
        }
        // Replies that are already in the call log.
        let mut known = Vec::new();
        {
            let journal = lock(&self.asker.journal);
            waiting.retain(|&index| match journal.reply(&hashes[index]) {
                Some(reply) => {
                    known.push((index, reply.clone()));
                    false
                }
                None => true,
            });
        }
        for (index, reply) in known {
            for &same in &of[hashes[index].as_str()] {
                if emit(same, Ok(reply.clone())).is_break() {
                    return Ok(telemetry);
                }
            }
        }
        let threads = waiting
            .len()
            .min(self.asker.spec.concurrency_max.get() as usize);
        let work = Arc::new(Work {
            asker: Arc::clone(&self.asker),
            requests: requests.to_vec(),
            hashes: hashes.clone(),
            waiting: Mutex::new(waiting),
            gate: CallLimiter::new(self.asker.spec.concurrency_max),
        });
        let (sender, replies) = channel();
        for number in 0..threads {
            let (work, sender) = (Arc::clone(&work), sender.clone());
            let thread = thread::Builder::new().name("call".to_owned());
            match thread.spawn(move || work.go(&sender)) {
                Ok(_) => {}
                Err(error) if number == 0 => {
                    let url = self.asker.endpoint.url().to_owned();
                    let problem = format!("cannot start a thread for calls: {error}");
                    return Err(ModelError::Service { url, problem });
                }
                // The threads already started handle all requests.
                Err(_) => break,
            }
        }
        drop(sender);
        let mut failed = None;
        let mut asked_to_stop: Option<Instant> = None;
        loop {
            if asked_to_stop.is_none() && (listener.stopping)() {
                asked_to_stop = Some(Instant::now());
                work.gate.close();
            }
            if asked_to_stop.is_some_and(|asked| asked.elapsed() > GRACE) {
                break;
            }
            let (index, reply) = match replies.recv_timeout(LOOK_EVERY) {
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => break,
                Ok(Heard::Note(text)) => {
                    (listener.say)(&text);
                    continue;
                }
                Ok(Heard::Reply(index, reply)) => (index, reply),
            };
            let reply = match reply {
                Reply::Written(call) => {
                    telemetry.prompt_tokens += call.prompt_tokens;
                    telemetry.answer_tokens += call.reply_tokens;
                    Ok(call.reply)
                }
                Reply::Refused(fault) => Err(fault),
                Reply::Failed(error) => {
                    failed.get_or_insert(error);
                    continue;
                }
            };
            for &same in &of[hashes[index].as_str()] {
                // Calls in flight still get a short time to finish and enter the call log.
                if asked_to_stop.is_none() && emit(same, reply.clone()) == ControlFlow::Break(()) {
                    asked_to_stop = Some(Instant::now());
                    work.gate.close();
                }
            }
        }
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
