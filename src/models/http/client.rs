//! Calls to an endpoint with retries and a call log, on threads that may outlive the run that
//! started them.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::call_log::{Call, CallLog};
use super::endpoint::{Endpoint, EndpointReply, Presence, Try};
use super::limiter::CallLimiter;
use super::settings::Http;
use crate::judge_prompt::JudgePromptSettings;
use crate::{ChatPrompt, ModelError, Request, RowFault, Visual};
use ovchat_io::mask::Mask;

/// Maximum wait between two attempts.
const WAIT_MAX: Duration = Duration::from_mins(2);

/// The number of attempts after which the backoff stops doubling.
const DOUBLINGS: u32 = 16;

/// Maximum time that the first call of a run is retried while nothing listens at the address:
/// either the address is wrong or the server is down.
const FIRST_WAIT: Duration = Duration::from_secs(5);

/// The outcome of a call.
pub enum Reply {
    Written(Call),
    /// The endpoint refuses this request; others may succeed.
    Refused(RowFault),
    /// No more calls can be made.
    Failed(ModelError),
}

/// A message from a call's thread.
pub enum Heard {
    /// The outcome of the request with this index.
    Reply(usize, Reply),
    /// A note on a wait or an oddity.
    Note(String),
}

/// A client for one endpoint. Its threads share it and may outlive the run that started them: a
/// reply that arrives late is still written to the call log.
pub struct EndpointClient {
    pub spec: Http,
    pub endpoint: Endpoint,
    pub judge: String,
    pub journal: Mutex<CallLog>,
    pub mask: Mask,
    /// True once the endpoint has responded in this run.
    pub was_heard: AtomicBool,
}

/// A batch of requests.
pub struct Work {
    pub asker: Arc<EndpointClient>,
    pub requests: Vec<Request>,
    pub hashes: Vec<String>,
    /// Indices of the requests that were not sent yet.
    pub waiting: Mutex<VecDeque<usize>>,
    pub gate: CallLimiter,
}

/// Locks a mutex. Poisoning is ignored: a panicking thread leaves no half-done change behind.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EndpointClient {
    /// Returns the hash of everything that determines a reply.
    pub fn hash(&self, request: &Request) -> String {
        let mut hasher = Sha256::new();
        let images = request.prompt.images.iter().map(|image| image.id.as_str());
        let limit = self.spec.ask.max_new_tokens.0.to_string();
        let attempt = request.attempt.to_string();
        let parts = [&self.spec.model, &request.prompt.question, &limit, &attempt];
        for part in parts.into_iter().map(String::as_str).chain(images) {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        for place in &request.prompt.places {
            hasher.update((place.at as u64).to_le_bytes());
        }
        // Requests without these keep the hashes that they had before there were such settings.
        let temperature = self.spec.ask.temperature.get();
        let others = [
            ("system", request.prompt.system.clone()),
            (
                "temperature",
                (temperature > 0.0).then(|| temperature.to_string()),
            ),
            ("format", spec_format(&self.spec.ask)),
            ("request", self.spec.extra().map(|extra| extra.to_string())),
        ];
        for (name, value) in others {
            for part in value.iter().flat_map(|value| [name, value]) {
                hasher.update((part.len() as u64).to_le_bytes());
                hasher.update(part);
            }
        }
        hex::encode(hasher.finalize())
    }

    /// Returns the body of a request.
    fn body(&self, request: &Request) -> Result<Vec<u8>, RowFault> {
        let content = content(&request.prompt)?;
        let spec = &self.spec;
        let first = spec.ask.temperature.get();
        let system = request.prompt.system.iter();
        let system = system.map(|text| json!({ "role": "system", "content": text }));
        let user = json!({ "role": "user", "content": content });
        let mut body = json!({
            "model": spec.model,
            "messages": system.chain([user]).collect::<Vec<_>>(),
            "temperature": if request.attempt == 0 { first } else { 1.0 },
        });
        body[spec.token_limit.name()] = json!(spec.ask.max_new_tokens.0);
        if let Some(format) = spec.ask.response_format {
            body["response_format"] = json!({ "type": format });
        }
        if request.attempt > 0 {
            body["seed"] = json!(request.attempt);
        }
        spec.body.merge_into(&mut body);
        Ok(serde_json::to_vec(&body).expect("text and numbers are valid JSON"))
    }

    fn fails(&self, problem: impl Into<String>) -> Reply {
        Reply::Failed(ModelError::Service {
            url: self.endpoint.url().to_owned(),
            problem: problem.into(),
        })
    }

    /// Sends a request until it is answered or refused, or the attempts are used up. `None`,
    /// without a reply, if the limiter was closed.
    fn ask(
        &self,
        request: &Request,
        hash: &str,
        gate: &CallLimiter,
        tell: &dyn Fn(String),
    ) -> Option<Reply> {
        let body = match self.body(request) {
            Ok(body) => body,
            Err(fault) => return Some(Reply::Refused(fault)),
        };
        let tries = self.spec.tries.get();
        let mut waited = Duration::ZERO;
        for number in 1..=tries {
            if !gate.enter() {
                return None;
            }
            if let Some(refusal) = self.spent() {
                gate.close();
                return Some(refusal);
            }
            let begun = Instant::now();
            let tried = self.endpoint.ask(&body);
            if tried.is_heard() {
                self.was_heard.store(true, Ordering::SeqCst);
            }
            let reply = match tried {
                Try::Replied(said) => {
                    if let Some(note) = &said.note {
                        tell(note.clone());
                    }
                    self.write(self.call(request, hash, said, begun.elapsed()))
                }
                Try::Refused(why) => Reply::Refused(RowFault(why)),
                Try::Failed(why) => self.fails(why),
                Try::Later {
                    wait,
                    what,
                    more,
                    presence,
                } => {
                    gate.leave(true);
                    let wait = wait
                        .unwrap_or_else(|| self.usual_wait(number))
                        .min(WAIT_MAX);
                    let is_hopeless =
                        presence == Presence::Absent && !self.was_heard.load(Ordering::SeqCst);
                    if number == tries || (is_hopeless && waited + wait > FIRST_WAIT) {
                        let advice = if is_hopeless {
                            "; check that the server is up and that `base_url` is correct"
                        } else {
                            ""
                        };
                        return Some(self.fails(format!(
                            "failed after {number} attempts; in the last one, {what}{more}{advice}"
                        )));
                    }
                    if number == 1 {
                        let longest = in_words(self.longest_wait(is_hopeless));
                        let url = self.endpoint.url();
                        tell(format!("{url}: {what}; retrying for up to {longest}"));
                    }
                    waited += wait;
                    gate.rest(wait);
                    continue;
                }
            };
            // Must happen before the next call may start.
            if let Reply::Failed(_) = reply {
                gate.close();
            }
            gate.leave(false);
            return Some(reply);
        }
        None
    }

    /// Returns the entry of the call log for a reply that took `time`.
    fn call(&self, request: &Request, hash: &str, said: EndpointReply, time: Duration) -> Call {
        let [prompt_tokens, reply_tokens] = said.tokens;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Call {
            judge: self.judge.clone(),
            hash: hash.to_owned(),
            about: self.mask.hide(&request.prompt.id),
            model: self.mask.hide(&self.spec.model),
            attempt: request.attempt,
            reply: said.text,
            prompt_tokens,
            reply_tokens,
            milliseconds: time.as_millis() as u64,
            at: now.map_or(0, |since| since.as_secs()),
        }
    }

    /// Writes a call to the call log. A reply that cannot be logged is not used.
    fn write(&self, call: Call) -> Reply {
        match lock(&self.journal).write(call.clone()) {
            Ok(()) => Reply::Written(call),
            Err(error) => Reply::Failed(error),
        }
    }

    /// Returns the default wait after attempt `number`, counted from 1, if the endpoint sends no
    /// `Retry-After`.
    fn usual_wait(&self, number: u32) -> Duration {
        let doubled = self.spec.wait_s.max(0.0) * f64::from(1_u32 << (number - 1).min(DOUBLINGS));
        Duration::from_secs_f64(doubled.min(WAIT_MAX.as_secs_f64()))
    }

    /// Returns the total of the default waits of `tries` attempts.
    fn usual_waits(&self, tries: u32) -> Duration {
        let growing = tries.min(DOUBLINGS);
        let early: Duration = (1..growing).map(|number| self.usual_wait(number)).sum();
        let late = self.usual_wait(DOUBLINGS + 1);
        early.saturating_add(late.saturating_mul(tries - growing))
    }

    /// Returns the maximum time that a request is retried, which is short for an address that seems
    /// to be wrong.
    fn longest_wait(&self, is_hopeless: bool) -> Duration {
        let longest = self.usual_waits(self.spec.tries.get());
        if is_hopeless {
            FIRST_WAIT.min(longest)
        } else {
            longest
        }
    }

    /// Returns a failure if the spending limit is reached.
    fn spent(&self) -> Option<Reply> {
        let spend = self.spec.spend?;
        let tokens = lock(&self.journal).tokens();
        let [read, written] = tokens.map(|tokens| tokens as f64 / 1e6);
        let cost = read * spend.per_million_prompt_tokens.get()
            + written * spend.per_million_reply_tokens.get();
        (cost >= spend.limit.get()).then(|| {
            self.fails(format!(
                "the calls of this run have cost {cost:.4} and reached `spend.limit` ({}); all replies are \
                 kept: raise the limit and rerun the command to resume",
                spend.limit.get()
            ))
        })
    }
}

impl Work {
    /// Starts the threads that send the requests. Returns the receiver of their messages.
    pub fn start(self: &Arc<Self>) -> Result<Receiver<Heard>, ModelError> {
        let most = self.asker.spec.concurrency_max.get() as usize;
        let threads = lock(&self.waiting).len().min(most);
        let (sender, messages) = channel();
        for number in 0..threads {
            let (work, sender) = (Arc::clone(self), sender.clone());
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
        Ok(messages)
    }

    /// Sends one request after the other until none is left or the limiter is closed.
    pub fn go(&self, sender: &Sender<Heard>) {
        let tell = |text| {
            // There is no receiver any more once the run has ended.
            drop(sender.send(Heard::Note(text)));
        };
        while !self.gate.is_closed() {
            let Some(index) = lock(&self.waiting).pop_front() else {
                return;
            };
            let request = &self.requests[index];
            let asked = || {
                self.asker
                    .ask(request, &self.hashes[index], &self.gate, &tell)
            };
            let reply = match catch_unwind(AssertUnwindSafe(asked)) {
                Ok(Some(reply)) => reply,
                Ok(None) => return,
                Err(panic) => {
                    let about = self.asker.mask.hide(&request.prompt.id);
                    let words = words_of(&*panic);
                    self.asker.fails(format!(
                        "internal error in the call for {about}: {words}; please report this bug"
                    ))
                }
            };
            if let Reply::Failed(_) = reply {
                self.gate.close();
            }
            if sender.send(Heard::Reply(index, reply)).is_err() {
                return;
            }
        }
    }
}

/// Returns the message of a panic.
fn words_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied())
        .unwrap_or("panic without a message")
}

/// Formats a duration: `4 s`, `2 min`.
fn in_words(time: Duration) -> String {
    match time.as_secs_f64() {
        seconds if seconds < 100.0 => format!("{:.0} s", seconds.ceil()),
        seconds => format!("{:.0} min", seconds / 60.0),
    }
}

/// Returns the format of replies that is asked for, as text.
fn spec_format(ask: &JudgePromptSettings) -> Option<String> {
    ask.response_format.map(|format| json!(format).to_string())
}

/// Returns the content parts of a request: the images where they stand in the text, or before it.
fn content(prompt: &ChatPrompt) -> Result<Vec<serde_json::Value>, RowFault> {
    let mut parts = Vec::new();
    let text = |from: usize, to: usize, parts: &mut Vec<_>| {
        let text = &prompt.question[from..to];
        // The line ends between images say nothing.
        if !text.trim().is_empty() || prompt.places.is_empty() {
            parts.push(json!({ "type": "text", "text": text }));
        }
    };
    let mut places = prompt.places_in(0);
    let mut from = 0;
    for image in &prompt.images {
        let to = places.next().unwrap_or(from);
        if to > from {
            text(from, to, &mut parts);
            from = to;
        }
        for shown in image.shown() {
            let url = data_url(shown)?;
            parts.push(json!({ "type": "image_url", "image_url": { "url": url } }));
        }
    }
    text(from, prompt.question.len(), &mut parts);
    Ok(parts)
}

/// Encodes an image as a data URL for a request.
fn data_url(image: &Visual) -> Result<String, RowFault> {
    let Some(media) = image.media_type() else {
        return Err(RowFault(format!(
            "image {} has an unsupported format; endpoints accept PNG, JPEG, WebP and GIF",
            image.id
        )));
    };
    Ok(format!(
        "data:{media};base64,{}",
        STANDARD.encode(&image.bytes)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_util::prompt;

    #[test]
    fn images_are_told_by_their_first_bytes() {
        let image = |bytes: &[u8]| Visual::new("p".to_owned(), bytes.into());
        let url = data_url(&image(b"\x89PNG\r\n")).unwrap();
        assert_eq!(url, "data:image/png;base64,iVBORw0K");
        assert!(data_url(&image(b"BM")).is_err());
    }

    #[test]
    fn images_and_texts_are_sent_in_the_order_of_the_prompt() {
        let image = |id: &str| Visual::new(id.to_owned(), b"\x89PNG"[..].into());
        let sent = |question: &str, images: usize| -> Vec<String> {
            let images = (0..images).map(|_| image("p")).collect();
            let asked = prompt(images, question).with_places();
            let parts = content(&asked).unwrap();
            let shown = |part: &serde_json::Value| match part["text"].as_str() {
                Some(text) => text.to_owned(),
                None => part["type"].as_str().unwrap().to_owned(),
            };
            parts.iter().map(shown).collect()
        };
        assert_eq!(sent("Which?", 2), ["image_url", "image_url", "Which?"]);
        assert_eq!(
            sent("A: <image>\nB: <image>", 2),
            ["A: ", "image_url", "\nB: ", "image_url"]
        );
        assert_eq!(
            sent("<image>\n<image>: which?", 2),
            ["image_url", "image_url", ": which?"]
        );
    }

    #[test]
    fn a_thread_that_panics_ends_the_work_with_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let spec = json!({ "base_url": "http://127.0.0.1:9/v1", "model": "m" });
        let spec: Http = serde_json::from_value(spec).unwrap();
        let (endpoint, _) = Endpoint::open(&spec, None, Mask::default()).unwrap();
        let journal = CallLog::open(&folder.path().join("judge.jsonl")).unwrap();
        let prompt = prompt(Vec::new(), "?");
        let work = Work {
            gate: CallLimiter::new(spec.concurrency_max),
            asker: Arc::new(EndpointClient {
                spec,
                endpoint,
                judge: "judge".to_owned(),
                journal: Mutex::new(journal),
                mask: Mask::default(),
                was_heard: AtomicBool::new(false),
            }),
            requests: vec![Request { prompt, attempt: 0 }],
            // The bug: the request has no hash.
            hashes: Vec::new(),
            waiting: Mutex::new(VecDeque::from([0])),
        };
        let (sender, heard) = std::sync::mpsc::channel();
        work.go(&sender);
        let Ok(Heard::Reply(0, Reply::Failed(error))) = heard.recv() else {
            panic!("no error was reported");
        };
        let told = error.to_string();
        assert!(
            told.contains("internal error in the call") && told.contains("index out of bounds"),
            "{told}"
        );
        assert!(!work.gate.enter(), "no more calls start");
    }
}
