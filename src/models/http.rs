//! A writer behind an OpenAI-compatible endpoint (`POST <base_url>/chat/completions`).
//!
//! Every reply is a line of the journal, synced before anybody hears of it, so that no question is
//! paid for twice, whatever happens to the process. How many calls are under way adapts to what the
//! endpoint can take: one more with every reply, until it says that this is too many; then half as many,
//! and one more with every round of replies.

mod gate;
mod journal;
mod settings;

use std::collections::{HashMap, HashSet, VecDeque};
use std::io::ErrorKind;
use std::num::NonZeroU32;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use self::gate::Gate;
use self::journal::{Call, Journal};
pub use self::settings::{BaseUrl, Price, Spend, SpendLimit};
use super::asking::Asking;
use super::{Emit, Exam, ModelError, Picture, Request, RowFault, Say, Telemetry, Writer};

/// A model behind an OpenAI-compatible endpoint, asked in writing what it thinks of answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Http {
    /// Where the endpoint's paths start: `https://api.openai.com/v1`, `http://127.0.0.1:8000/v1`.
    pub base_url: BaseUrl,
    /// The name by which the endpoint knows the model. It stands for what the model says: rows are kept
    /// when only `base_url` changes.
    pub model: String,
    /// The environment variable that holds the key. Its value is sent to the endpoint and goes nowhere
    /// else.
    #[serde(default)]
    pub key_env: Option<String>,
    /// What it is asked, and how its replies are read.
    #[serde(default)]
    pub ask: Asking,
    /// The most calls that are under way at once.
    #[serde(default = "defaults::concurrency_max")]
    pub concurrency_max: NonZeroU32,
    /// Seconds that a call may take.
    #[serde(default = "defaults::timeout_s")]
    pub timeout_s: NonZeroU32,
    /// How often a call is tried that the endpoint can't take just now, waiting longer each time.
    #[serde(default = "defaults::tries")]
    pub tries: NonZeroU32,
    /// Seconds of the first of these waits, unless the endpoint says how long.
    #[serde(default = "defaults::wait_s")]
    pub wait_s: f64,
    /// What calls cost, and how much they may in a run.
    #[serde(default)]
    pub spend: Option<Spend>,
    /// What it must show before it scores.
    #[serde(default)]
    pub exam: Option<Exam>,
}

impl Http {
    /// The environment variable of the key, if it is not set.
    pub fn missing_key(&self) -> Option<&str> {
        let name = self.key_env.as_deref()?;
        key_in(name).is_none().then_some(name)
    }
}

/// The key in an environment variable, which must hold something.
fn key_in(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|key| !key.is_empty())
}

mod defaults {
    use std::num::NonZeroU32;

    pub fn concurrency_max() -> NonZeroU32 {
        const { NonZeroU32::new(8).unwrap() }
    }
    pub fn timeout_s() -> NonZeroU32 {
        const { NonZeroU32::new(120).unwrap() }
    }
    pub fn tries() -> NonZeroU32 {
        const { NonZeroU32::new(8).unwrap() }
    }
    pub fn wait_s() -> f64 {
        1.0
    }
}

/// The longest wait between two tries.
const WAIT_MAX: Duration = Duration::from_mins(2);

/// For how long the first call of a run is tried where nothing listens: the address is wrong, or the server
/// is not up.
const FIRST_WAIT: Duration = Duration::from_secs(5);

/// The longest part of an endpoint's complaint that is shown.
const SHOWN_MAX: usize = 300;

/// What came of a call.
enum Reply {
    Written(Call),
    /// This question can't be put; others can.
    Refused(RowFault),
    /// Nothing can be asked any more.
    Failed(ModelError),
}

/// What a call under way has to tell.
enum Heard {
    /// What came of the request of this number.
    Reply(usize, Reply),
    /// What it waits for, in words.
    Waits(String),
}

/// What a single try gave.
enum Try {
    Done(Reply),
    /// The endpoint can't take it now.
    Later {
        wait: Option<Duration>,
        /// What it does in place of replying: `refuses the connection`, `says 429`.
        what: String,
        /// What it says beside that.
        more: String,
        /// Whether nothing listens there.
        is_absent: bool,
    },
}

/// The endpoint as a writer.
pub struct HttpWriter {
    spec: Http,
    url: String,
    agent: ureq::Agent,
    key: Option<String>,
    judge: String,
    journal: Mutex<Journal>,
    /// Whether the endpoint has said anything in this run.
    was_heard: AtomicBool,
}

impl HttpWriter {
    /// `journal` is the file of the calls of this run, named after the judge. Fails when the key is not
    /// in the environment or the journal can't be opened.
    pub fn open(spec: &Http, journal: &Path) -> Result<Self, ModelError> {
        let url = spec.base_url.calls();
        let key = match &spec.key_env {
            None => None,
            Some(name) => Some(key_in(name).ok_or_else(|| ModelError::Service {
                url: url.clone(),
                problem: format!("the environment variable {name} with its key is not set"),
            })?),
        };
        let timeout = Duration::from_secs(spec.timeout_s.get().into());
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(timeout))
            .http_status_as_error(false)
            .build();
        let journal_of_run = Journal::open(journal)?;
        Ok(Self {
            spec: spec.clone(),
            url,
            agent: agent.into(),
            key,
            judge: journal
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            was_heard: AtomicBool::new(!journal_of_run.replies.is_empty()),
            journal: Mutex::new(journal_of_run),
        })
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().expect("no panic while locked")
    }

    /// What decides a reply.
    fn hash(&self, request: &Request) -> String {
        let mut hasher = Sha256::new();
        let pictures = request
            .prompt
            .pictures
            .iter()
            .map(|picture| picture.id.as_str());
        let limit = self.spec.ask.max_new_tokens.0.to_string();
        let attempt = request.attempt.to_string();
        let parts = [&self.spec.model, &request.prompt.question, &limit, &attempt];
        for part in parts.into_iter().map(String::as_str).chain(pictures) {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        format!("{:x}", hasher.finalize())
    }

    fn body(&self, request: &Request) -> Result<Vec<u8>, RowFault> {
        let mut content = Vec::new();
        for picture in &request.prompt.pictures {
            let url = data_url(picture)?;
            content.push(json!({ "type": "image_url", "image_url": { "url": url } }));
        }
        content.push(json!({ "type": "text", "text": request.prompt.question }));
        let mut body = json!({
            "model": self.spec.model,
            "messages": [{ "role": "user", "content": content }],
            "max_tokens": self.spec.ask.max_new_tokens.0,
            "temperature": if request.attempt == 0 { 0.0 } else { 1.0 },
        });
        if request.attempt > 0 {
            body["seed"] = json!(request.attempt);
        }
        Ok(serde_json::to_vec(&body).expect("text and numbers are valid JSON"))
    }

    fn fails(&self, problem: impl Into<String>) -> Reply {
        Reply::Failed(ModelError::Service {
            url: self.url.clone(),
            problem: problem.into(),
        })
    }

    /// Puts a question until it is replied to, refused, or was put often enough; gives up, without a
    /// reply, when nothing is to be asked any more.
    fn ask(
        &self,
        request: &Request,
        hash: &str,
        gate: &Gate,
        stopping: &AtomicBool,
        tell: &dyn Fn(String),
    ) -> Option<Reply> {
        let body = match self.body(request) {
            Ok(body) => body,
            Err(fault) => return Some(Reply::Refused(fault)),
        };
        let tries = self.spec.tries.get();
        let mut waited = Duration::ZERO;
        for number in 1..=tries {
            gate.enter();
            if stopping.load(Ordering::SeqCst) {
                gate.leave(false);
                return None;
            }
            if let Some(refusal) = self.spent() {
                gate.leave(false);
                return Some(refusal);
            }
            let (wait, what, more, is_absent) = match self.try_once(request, hash, &body) {
                Try::Done(reply) => {
                    // Before the next one may enter.
                    if let Reply::Failed(_) = reply {
                        stopping.store(true, Ordering::SeqCst);
                    }
                    gate.leave(false);
                    return Some(reply);
                }
                Try::Later {
                    wait,
                    what,
                    more,
                    is_absent,
                } => (wait, what, more, is_absent),
            };
            gate.leave(true);
            let wait = wait
                .unwrap_or_else(|| self.usual_wait(number))
                .min(WAIT_MAX);
            let is_hopeless = is_absent && !self.was_heard.load(Ordering::SeqCst);
            if number == tries || (is_hopeless && waited + wait > FIRST_WAIT) {
                let advice = if is_hopeless {
                    "; is the server up, and `base_url` right?"
                } else {
                    ""
                };
                return Some(self.fails(format!(
                    "it was tried {number} times; the last time it {what}{more}{advice}"
                )));
            }
            if number == 1 {
                let longest = (1..tries).map(|number| self.usual_wait(number)).sum();
                let longest = if is_hopeless {
                    FIRST_WAIT.min(longest)
                } else {
                    longest
                };
                tell(format!(
                    "{} {what}; trying again for up to {}",
                    self.url,
                    in_words(longest)
                ));
            }
            waited += wait;
            std::thread::sleep(wait);
        }
        None
    }

    /// How long to wait after a try, counted from 1, where the endpoint does not say.
    fn usual_wait(&self, number: u32) -> Duration {
        let doubled = self.spec.wait_s.max(0.0) * f64::from(1_u32 << (number - 1).min(16));
        Duration::from_secs_f64(doubled.min(WAIT_MAX.as_secs_f64()))
    }

    /// Whether so much was spent that nothing more may be asked.
    fn spent(&self) -> Option<Reply> {
        let spend = self.spec.spend?;
        let [read, written] = self.journal().tokens.map(|tokens| tokens as f64 / 1e6);
        let cost = read * spend.per_million_prompt_tokens.get()
            + written * spend.per_million_reply_tokens.get();
        (cost >= spend.limit.get()).then(|| {
            self.fails(format!(
                "the calls of this run have cost {cost:.4}, and `spend.limit` is {}; what was replied is \
                 kept, and with a higher limit the same command goes on",
                spend.limit.get()
            ))
        })
    }

    fn try_once(&self, request: &Request, hash: &str, body: &[u8]) -> Try {
        let begun = Instant::now();
        let mut post = self
            .agent
            .post(&self.url)
            .header("Content-Type", "application/json");
        if let Some(key) = &self.key {
            post = post.header("Authorization", format!("Bearer {key}"));
        }
        let broken = |error: ureq::Error| {
            let refuses = |error: &std::io::Error| error.kind() == ErrorKind::ConnectionRefused;
            let (what, more, is_absent) = match error {
                ureq::Error::Io(error) if refuses(&error) => {
                    ("refuses the connection", String::new(), true)
                }
                ureq::Error::HostNotFound => ("has a host that is not found", String::new(), true),
                ureq::Error::Timeout(_) => ("took too long", format!(": {error}"), false),
                error => ("broke off", format!(": {error}"), false),
            };
            Try::Later {
                wait: None,
                what: what.to_owned(),
                more,
                is_absent,
            }
        };
        let mut response = match post.send(body) {
            Ok(response) => response,
            Err(error) => return broken(error),
        };
        self.was_heard.store(true, Ordering::SeqCst);
        let status = response.status().as_u16();
        let wait = response.headers().get("retry-after");
        let wait = wait.and_then(|wait| wait.to_str().ok()?.trim().parse().ok());
        let text = match response.body_mut().read_to_string() {
            Ok(text) => text,
            Err(error) => return broken(error),
        };
        let complaint = || format!("it says {status}: {}", shown(&text));
        match status {
            200..=299 => {}
            408 | 409 | 425 | 429 | 500..=599 => {
                return Try::Later {
                    // What is no time is not waited for.
                    wait: wait.and_then(|wait| Duration::try_from_secs_f64(wait).ok()),
                    what: format!("says {status}"),
                    more: format!(": {}", shown(&text)),
                    is_absent: false,
                };
            }
            400 | 413 | 415 | 422 => return Try::Done(Reply::Refused(RowFault(complaint()))),
            401 | 403 => {
                let key = match &self.spec.key_env {
                    Some(name) => format!("; the key is that of {name}"),
                    None => "; `key_env` names the variable with the key".to_owned(),
                };
                return Try::Done(self.fails(complaint() + &key));
            }
            _ => return Try::Done(self.fails(complaint())),
        }
        let json: Value = serde_json::from_str(&text).unwrap_or_default();
        let message = &json["choices"][0]["message"];
        if !message.is_object() {
            let problem = format!("this is no reply: {}", shown(&text));
            return Try::Done(self.fails(problem));
        }
        // A model that declines says nothing: a reply like any other that can't be read.
        let reply = message["content"].as_str().unwrap_or_default();
        let tokens = |name: &str| json["usage"][name].as_u64().unwrap_or(0);
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let call = Call {
            judge: self.judge.clone(),
            hash: hash.to_owned(),
            about: request.prompt.id.clone(),
            model: self.spec.model.clone(),
            attempt: request.attempt,
            reply: reply.to_owned(),
            prompt_tokens: tokens("prompt_tokens"),
            reply_tokens: tokens("completion_tokens"),
            milliseconds: begun.elapsed().as_millis() as u64,
            at: now.map_or(0, |since| since.as_secs()),
        };
        // Nobody hears of a reply that would be lost.
        match self.journal().write(call.clone()) {
            Ok(()) => Try::Done(Reply::Written(call)),
            Err(error) => Try::Done(Reply::Failed(error)),
        }
    }
}

impl Writer for HttpWriter {
    fn reply(
        &mut self,
        requests: &[Request],
        emit: Emit<'_, String>,
        say: Say<'_>,
    ) -> Result<Telemetry, ModelError> {
        let begun = Instant::now();
        let mut telemetry = Telemetry {
            prompts: requests.len() as u64,
            ..Telemetry::default()
        };
        let hashes: Vec<String> = requests.iter().map(|request| self.hash(request)).collect();
        let mut of: HashMap<&str, Vec<usize>> = HashMap::new();
        let mut waiting = VecDeque::new();
        for (index, hash) in hashes.iter().enumerate() {
            let same = of.entry(hash).or_default();
            if same.is_empty() {
                waiting.push_back(index);
            }
            same.push(index);
        }
        // Those that were replied to before.
        let mut known = Vec::new();
        {
            let journal = self.journal();
            waiting.retain(|&index| match journal.replies.get(&hashes[index]) {
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
        let gate = Gate::new(self.spec.concurrency_max);
        let threads = waiting.len().min(self.spec.concurrency_max.get() as usize);
        let waiting = Mutex::new(waiting);
        let stopping = AtomicBool::new(false);
        let stop = || stopping.store(true, Ordering::SeqCst);
        let (sender, replies) = channel();
        let this = &*self;
        let mut failed = None;
        std::thread::scope(|scope| {
            for _ in 0..threads {
                let (sender, waiting, stopping) = (sender.clone(), &waiting, &stopping);
                let (hashes, gate) = (&hashes, &gate);
                scope.spawn(move || {
                    let tell = |text| {
                        // Nobody is left to hear it when the run ends.
                        let _ = sender.send(Heard::Waits(text));
                    };
                    loop {
                        let is_over = stopping.load(Ordering::SeqCst);
                        let next = waiting.lock().expect("no panic while locked").pop_front();
                        let Some(index) = next.filter(|_| !is_over) else {
                            return;
                        };
                        let reply =
                            this.ask(&requests[index], &hashes[index], gate, stopping, &tell);
                        let Some(reply) = reply else {
                            return;
                        };
                        if let Reply::Failed(_) = reply {
                            stopping.store(true, Ordering::SeqCst);
                        }
                        if sender.send(Heard::Reply(index, reply)).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(sender);
            let mut is_wanted = true;
            for heard in replies {
                let (index, reply) = match heard {
                    Heard::Reply(index, reply) => (index, reply),
                    Heard::Waits(text) => {
                        say(&text);
                        continue;
                    }
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
                    // Calls under way are still waited for, and go to the journal.
                    if is_wanted && emit(same, reply.clone()) == ControlFlow::Break(()) {
                        is_wanted = false;
                        stop();
                    }
                }
            }
        });
        telemetry.seconds_decode = begun.elapsed().as_secs_f64();
        let pictures = requests.iter().flat_map(|request| &request.prompt.pictures);
        let distinct: HashSet<&str> = pictures.map(|picture| picture.id.as_str()).collect();
        telemetry.pictures = distinct.len() as u64;
        failed.map_or(Ok(telemetry), Err)
    }

    fn plan(&self) -> Option<String> {
        let (model, most) = (&self.spec.model, self.spec.concurrency_max);
        Some(format!(
            "asks {model} at {}, up to {most} calls at once",
            self.url
        ))
    }
}

/// A time in words: `4 s`, `2 min`.
fn in_words(time: Duration) -> String {
    match time.as_secs_f64() {
        seconds if seconds < 100.0 => format!("{:.0} s", seconds.ceil()),
        seconds => format!("{:.0} min", seconds / 60.0),
    }
}

fn shown(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut shown: String = line.chars().take(SHOWN_MAX).collect();
    if shown.len() < line.len() {
        shown.push('…');
    }
    shown
}

/// A picture as part of a request.
fn data_url(picture: &Picture) -> Result<String, RowFault> {
    let Some(media) = picture.media_type() else {
        return Err(RowFault(format!(
            "picture {}: endpoints take PNG, JPEG, WebP and GIF, and it is none of these",
            picture.id
        )));
    };
    Ok(format!(
        "data:{media};base64,{}",
        STANDARD.encode(&picture.bytes)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_told_by_their_first_bytes() {
        let picture = |bytes: &[u8]| Picture {
            id: "p".to_owned(),
            bytes: bytes.into(),
        };
        let url = data_url(&picture(b"\x89PNG\r\n")).unwrap();
        assert_eq!(url, "data:image/png;base64,iVBORw0K");
        assert!(data_url(&picture(b"BM")).is_err());
    }
}
