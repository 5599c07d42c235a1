//! The Chrome DevTools Protocol over a pair of pipes: commands, their answers, and what events tell of pages.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{ChildStdin, ChildStdout};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

/// The longest wait for the answer to a command, and for a page to load.
pub const ANSWER: Duration = Duration::from_secs(30);

/// The connection to a browser. Messages are JSON objects, each with a NUL byte behind it.
pub struct Link {
    commands: Mutex<ChildStdin>,
    state: Mutex<State>,
    changed: Condvar,
}

/// The messages of the browser so far.
#[derive(Default)]
pub struct State {
    last_id: u64,
    answers: HashMap<u64, Value>,
    /// By session.
    pub pages: HashMap<String, Seen>,
    /// The end of the browser's log, once the browser has ended.
    ended: Option<String>,
}

/// The requests, errors and sizes that the events of a page have reported.
#[derive(Default)]
pub struct Seen {
    /// The id of the tab, which is also that of its main frame.
    target: String,
    pub url: String,
    /// The documents that have loaded.
    pub loaded: HashSet<String>,
    pub requests: Vec<String>,
    pub errors: Vec<String>,
    /// The requests for images.
    images: HashSet<String>,
    pub weight: Weight,
}

/// The bytes that a page received in finished responses: compressed, with headers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Weight {
    pub images: u64,
    pub other: u64,
}

impl Link {
    pub fn new(commands: ChildStdin, messages: ChildStdout, log: PathBuf) -> Arc<Self> {
        let link = Arc::new(Self {
            commands: Mutex::new(commands),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let reader = Arc::clone(&link);
        thread::spawn(move || {
            for message in BufReader::new(messages).split(0).map_while(Result::ok) {
                reader.receive(serde_json::from_slice(&message).unwrap_or_default());
            }
            let log = fs::read(log).unwrap_or_default();
            reader.state().ended = Some(end_of(&String::from_utf8_lossy(&log)));
            reader.changed.notify_all();
        });
        link
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics with it")
    }

    /// Sends a command to a session, or to the browser itself (`""`), and returns the result.
    pub fn send(&self, session: &str, method: &str, params: Value) -> Result<Value, String> {
        let id = self.write(session, method, params);
        self.wait(|state| state.answers.contains_key(&id));
        let mut state = self.state();
        match (state.answers.remove(&id), &state.ended) {
            (Some(mut answer), _) => match answer["error"]["message"].as_str() {
                Some(problem) => Err(problem.to_owned()),
                None => Ok(answer["result"].take()),
            },
            (None, Some(log)) => Err(format!("Chromium has ended; its log:\n{log}")),
            (None, None) => Err(format!("no answer within {ANSWER:?}")),
        }
    }

    /// Waits for something, and returns whether it has come in time.
    pub fn wait(&self, done: impl Fn(&State) -> bool) -> bool {
        let waits = |state: &mut State| state.ended.is_none() && !done(state);
        let result = self.changed.wait_timeout_while(self.state(), ANSWER, waits);
        done(&result.expect("no thread panics with it").0)
    }

    /// Writes a command and returns its id.
    fn write(&self, session: &str, method: &str, params: Value) -> u64 {
        let id = {
            let mut state = self.state();
            state.last_id += 1;
            state.last_id
        };
        let mut command = json!({ "id": id, "method": method });
        command["params"] = params;
        if !session.is_empty() {
            command["sessionId"] = session.into();
        }
        let bytes = format!("{command}\0").into_bytes();
        let mut commands = self.commands.lock().expect("no thread panics with it");
        // An error means that the browser has ended, which the reader finds out too.
        drop(commands.write_all(&bytes));
        id
    }

    fn receive(&self, message: Value) {
        let session = message["sessionId"].as_str().unwrap_or_default().to_owned();
        let event = message["method"].as_str().unwrap_or_default();
        if event == "Page.javascriptDialogOpening" {
            // The page would stand still.
            let accept = json!({ "accept": true });
            self.write(&session, "Page.handleJavaScriptDialog", accept);
        }
        let mut state = self.state();
        if let Some(page) = state.pages.get_mut(&session) {
            page.note(event, &message["params"]);
        }
        if let Some(id) = message["id"].as_u64() {
            state.answers.insert(id, message);
        }
        drop(state);
        self.changed.notify_all();
    }
}

impl Seen {
    pub fn of(target: &str) -> Self {
        Self {
            target: target.to_owned(),
            ..Self::default()
        }
    }

    fn note(&mut self, event: &str, about: &Value) {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let main = |frame: &Value| *frame == *self.target;
        match event {
            "Page.frameNavigated" if main(&about["frame"]["id"]) => {
                self.url = text(&about["frame"]["url"]);
            }
            "Page.navigatedWithinDocument" if main(&about["frameId"]) => {
                self.url = text(&about["url"]);
            }
            "Page.lifecycleEvent" if about["name"] == "load" && main(&about["frameId"]) => {
                self.loaded.insert(text(&about["loaderId"]));
            }
            "Page.javascriptDialogOpening" => {
                let (kind, message) = (text(&about["type"]), text(&about["message"]));
                self.errors.push(format!("{kind}: {message}"));
            }
            "Network.requestWillBeSent" => {
                if about["type"] == "Image" {
                    self.images.insert(text(&about["requestId"]));
                }
                let url = text(&about["request"]["url"]);
                if !url.starts_with("data:") {
                    self.requests.push(url);
                }
            }
            "Network.webSocketCreated" => self.requests.push(text(&about["url"])),
            "Network.loadingFinished" => {
                let bytes = about["encodedDataLength"].as_f64().unwrap_or_default() as u64;
                let image = self.images.contains(&text(&about["requestId"]));
                let Weight { images, other } = &mut self.weight;
                *(if image { images } else { other }) += bytes;
            }
            "Runtime.exceptionThrown" => self.errors.push(exception(&about["exceptionDetails"])),
            "Runtime.consoleAPICalled" if about["type"] == "error" || about["type"] == "assert" => {
                let parts = about["args"].as_array().into_iter().flatten().map(shown);
                let said = parts.collect::<Vec<_>>().join(" ");
                self.errors.push(format!("console: {said}"));
            }
            "Log.entryAdded" if about["entry"]["level"] == "error" => {
                let [source, said, url] =
                    ["source", "text", "url"].map(|key| text(&about["entry"][key]));
                self.errors.push(format!("{source}: {said} ({url})"));
            }
            "Inspector.targetCrashed" => self.errors.push("the page crashed".to_owned()),
            _ => {}
        }
    }
}

/// Returns what an exception says, with its trace if it is an `Error`.
pub fn exception(details: &Value) -> String {
    shown(details.get("exception").unwrap_or(&details["text"]))
}

/// Returns a JavaScript value as the console shows it.
fn shown(value: &Value) -> String {
    let text = value
        .as_str()
        .or(value["value"].as_str())
        .or(value["description"].as_str());
    text.map_or_else(|| value["value"].to_string(), str::to_owned)
}

/// Returns the last lines of a log, without the many about the message bus that containers lack.
fn end_of(log: &str) -> String {
    let lines: Vec<_> = log.lines().filter(|line| !line.contains("dbus/")).collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}
