//! A writer behind an OpenAI-compatible endpoint (`POST <base_url>/chat/completions`).
//!
//! Every reply is a line of the journal, synced before anybody hears of it, so that no question is
//! paid for twice, whatever happens to the process. How many calls are under way adapts to what the
//! endpoint can take: one more with every reply, until it says that this is too many; then half as many,
//! and one more with every round of replies.

mod call_log;
mod client;
mod endpoint;
mod limiter;
mod settings;

use std::collections::{HashMap, HashSet, VecDeque};
use std::num::NonZeroU32;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::call_log::CallLog;
use self::client::{EndpointClient, Heard, Reply, Work, lock};
use self::endpoint::Endpoint;
use self::limiter::CallLimiter;
pub use self::settings::{BaseUrl, Price, Spend, SpendLimit};
use super::judge_prompt::JudgePromptSettings;
use super::{Emit, Exam, Listener, ModelError, ModelTelemetry, Request, Writer};
use ovchat_io::mask::{Mask, SECRET_MIN};

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
    pub ask: JudgePromptSettings,
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

    /// The environment variable of the key, if what it holds is too short to be one.
    pub fn short_key(&self) -> Option<&str> {
        let name = self.key_env.as_deref()?;
        let key = key_in(name)?;
        (key.chars().count() < SECRET_MIN).then_some(name)
    }
}

/// The problem of a key that no HTTP header can carry, and its fix.
pub const INVALID_KEY: &str = "holds a line break, white space at an end, or characters beyond ASCII, which no key \
     has; set it to the key alone";

impl Http {
    /// The environment variable of the key, if it holds characters that no HTTP header can carry.
    pub fn invalid_key(&self) -> Option<&str> {
        let name = self.key_env.as_deref()?;
        let key = key_in(name)?;
        let is_valid = key.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        (!is_valid || key.trim() != key).then_some(name)
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

/// Between two looks at whether the run was asked to stop.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// For replies that are on their way when the run is asked to stop. Who asked does not wait for others.
const GRACE: Duration = Duration::from_secs(1);

/// The endpoint as a writer.
pub struct HttpWriter {
    asker: Arc<EndpointClient>,
    /// What is to be said before the first question, in words.
    notes: Vec<String>,
}

impl HttpWriter {
    /// `journal` is the file of the calls of this run, named after the judge; what is written there and told
    /// is masked. Fails when the key is not in the environment or the journal can't be opened.
    pub fn open(spec: &Http, journal: &Path, mask: Mask) -> Result<Self, ModelError> {
        let fails = |problem: String| ModelError::Service {
            url: spec.base_url.calls(),
            problem,
        };
        let key = match &spec.key_env {
            None => None,
            Some(name) => Some(key_in(name).ok_or_else(|| {
                fails(format!(
                    "the environment variable {name} with its key is not set"
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
                "what {name} holds is shorter than {SECRET_MIN} characters, which no key is"
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
        // Those that were replied to before.
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
                    let problem = format!("no thread can be started for a call: {error}");
                    return Err(ModelError::Service { url, problem });
                }
                // Those that were started ask everything.
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
                // Calls under way are still waited for a while, and go to the journal.
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
            "asks {model} at {}, up to {most} calls at once",
            self.asker.endpoint.url()
        ))
    }
}
