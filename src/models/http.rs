//! A writer behind an OpenAI-compatible endpoint (`POST <base_url>/chat/completions`).
//!
//! Every reply is a line of the journal, synced before anybody hears of it, so that no question is
//! paid for twice, whatever happens to the process. How many calls are under way adapts to what the
//! endpoint can take: one more with every reply, until it says that this is too many; then half as many,
//! and one more with every round of replies.

mod gate;
mod journal;

use std::collections::{HashMap, HashSet, VecDeque};
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
use super::asking::Asking;
use super::{Emit, Exam, ModelError, Picture, Request, RowFault, Telemetry, Writer};

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

/// An `http` or `https` URL to which the endpoint's paths are appended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BaseUrl(String);

impl BaseUrl {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for BaseUrl {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wanted = "write one such as `https://api.openai.com/v1` or `http://127.0.0.1:8000/v1`";
        let is_http = |url: &ureq::http::Uri| {
            matches!(url.scheme_str(), Some("http" | "https")) && url.host().is_some()
        };
        let url = text.parse().ok().filter(is_http);
        let url = url.ok_or_else(|| format!("`{text}` is not an http or https URL; {wanted}"))?;
        // The paths of the endpoint would become a part of it.
        if url.query().is_some() || text.contains('#') {
            return Err(format!(
                "`{text}` has a query or a fragment, and paths are appended to it; {wanted}"
            ));
        }
        Ok(Self(text))
    }
}

impl From<BaseUrl> for String {
    fn from(url: BaseUrl) -> Self {
        url.0
    }
}

impl JsonSchema for BaseUrl {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "BaseUrl".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string", "format": "uri", "pattern": "^[Hh][Tt][Tt][Pp][Ss]?://"})
    }
}

/// What calls cost, in any currency.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Spend {
    /// The run stops when its calls have cost so much; calls under way may still come on top.
    pub limit: f64,
    /// The price of a million tokens that are read.
    pub per_million_prompt_tokens: f64,
    /// The price of a million tokens that are written.
    pub per_million_reply_tokens: f64,
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

/// What a single try gave.
enum Try {
    Done(Reply),
    /// The endpoint can't take it now.
    Later {
        wait: Option<Duration>,
        why: String,
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
}

impl HttpWriter {
    /// `journal` is the file of the calls of this run, named after the judge. Fails when the key is not
    /// in the environment or the journal can't be opened.
    pub fn open(spec: &Http, journal: &Path) -> Result<Self, ModelError> {
        let url = format!(
            "{}/chat/completions",
            spec.base_url.as_str().trim_end_matches('/')
        );
        let key = match &spec.key_env {
            None => None,
            Some(name) => Some(std::env::var(name).map_err(|_| ModelError::Service {
                url: url.clone(),
                problem: format!(
                    "its key is to be in the environment variable {name}, which is not set"
                ),
            })?),
        };
        let timeout = Duration::from_secs(spec.timeout_s.get().into());
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(timeout))
            .http_status_as_error(false)
            .build();
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
            journal: Mutex::new(Journal::open(journal)?),
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
    ) -> Option<Reply> {
        let body = match self.body(request) {
            Ok(body) => body,
            Err(fault) => return Some(Reply::Refused(fault)),
        };
        let mut last = String::new();
        for number in 0..self.spec.tries.get() {
            gate.enter();
            if stopping.load(Ordering::SeqCst) {
                gate.leave(false);
                return None;
            }
            if let Some(refusal) = self.spent() {
                gate.leave(false);
                return Some(refusal);
            }
            let tried = self.try_once(request, hash, &body);
            let waits = match tried {
                Try::Done(reply) => {
                    // Before the next one may enter.
                    if let Reply::Failed(_) = reply {
                        stopping.store(true, Ordering::SeqCst);
                    }
                    gate.leave(false);
                    return Some(reply);
                }
                Try::Later { wait, why } => {
                    last = why;
                    wait
                }
            };
            gate.leave(true);
            if number + 1 < self.spec.tries.get() {
                let doubled = self.spec.wait_s.max(0.0) * f64::from(1_u32 << number.min(16));
                let usual = Duration::from_secs_f64(doubled.min(WAIT_MAX.as_secs_f64()));
                std::thread::sleep(waits.unwrap_or(usual).min(WAIT_MAX));
            }
        }
        let tries = self.spec.tries;
        Some(self.fails(format!("it was tried {tries} times; the last time: {last}")))
    }

    /// Whether so much was spent that nothing more may be asked.
    fn spent(&self) -> Option<Reply> {
        let spend = self.spec.spend?;
        let [read, written] = self.journal().tokens.map(|tokens| tokens as f64 / 1e6);
        let cost =
            read * spend.per_million_prompt_tokens + written * spend.per_million_reply_tokens;
        (cost >= spend.limit).then(|| {
            self.fails(format!(
                "the calls of this run have cost {cost:.4}, and `spend.limit` is {}; what was replied is \
                 kept, and with a higher limit the same command goes on",
                spend.limit
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
        let later = |why: String| Try::Later { wait: None, why };
        let mut response = match post.send(body) {
            Ok(response) => response,
            Err(error) => return later(error.to_string()),
        };
        let status = response.status().as_u16();
        let wait = response.headers().get("retry-after");
        let wait = wait.and_then(|wait| wait.to_str().ok()?.trim().parse().ok());
        let text = match response.body_mut().read_to_string() {
            Ok(text) => text,
            Err(error) => return later(error.to_string()),
        };
        let complaint = || format!("it says {status}: {}", shown(&text));
        match status {
            200..=299 => {}
            408 | 409 | 425 | 429 | 500..=599 => {
                return Try::Later {
                    // What is no time is not waited for.
                    wait: wait.and_then(|wait| Duration::try_from_secs_f64(wait).ok()),
                    why: complaint(),
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
                    loop {
                        let is_over = stopping.load(Ordering::SeqCst);
                        let next = waiting.lock().expect("no panic while locked").pop_front();
                        let Some(index) = next.filter(|_| !is_over) else {
                            return;
                        };
                        let reply = this.ask(&requests[index], &hashes[index], gate, stopping);
                        let Some(reply) = reply else {
                            return;
                        };
                        if let Reply::Failed(_) = reply {
                            stopping.store(true, Ordering::SeqCst);
                        }
                        if sender.send((index, reply)).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(sender);
            let mut is_wanted = true;
            for (index, reply) in replies {
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
    fn only_an_http_url_is_a_base() {
        let read = |text: &str| BaseUrl::try_from(text.to_owned());
        for text in [
            "https://api.openai.com/v1",
            "http://127.0.0.1:8000/v1/",
            "http://[::1]:8000",
            "HTTPS://example.com",
        ] {
            assert_eq!(read(text).unwrap().as_str(), text);
        }
        for (text, problem) in [
            ("api.openai.com/v1", "is not an http or https URL"),
            ("localhost:8000/v1", "is not an http or https URL"),
            ("htps://api.openai.com/v1", "is not an http or https URL"),
            ("file:///etc/passwd", "is not an http or https URL"),
            ("/v1", "is not an http or https URL"),
            ("https://", "is not an http or https URL"),
            ("http://a b/v1", "is not an http or https URL"),
            ("", "is not an http or https URL"),
            ("https://example.com/v1?key=1", "has a query or a fragment"),
        ] {
            let complaint = read(text).unwrap_err();
            assert!(complaint.contains(problem), "{text}: {complaint}");
            assert!(
                complaint.contains("https://api.openai.com/v1"),
                "{complaint}"
            );
        }
    }

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
