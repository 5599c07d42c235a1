//! One try to put a question to an endpoint.

use std::io::ErrorKind;
use std::time::Duration;

use serde_json::Value;
use ureq::tls::TlsConfig;

use super::Http;
use super::call_log::TOKENS_MAX;
use crate::tls;
use ovchat_io::mask::Mask;

/// The longest part of an endpoint's complaint that is shown.
const SHOWN_MAX: usize = 300;

/// What a try gave. Texts of the endpoint are masked.
pub enum Try {
    Replied(EndpointReply),
    /// This question can't be put, others can; in words.
    Refused(String),
    /// Nothing can be asked any more; in words.
    Failed(String),
    /// The endpoint can't take it now.
    Later {
        wait: Option<Duration>,
        /// What it does in place of replying: `refuses the connection`, `says 429`.
        what: String,
        /// What it says beside that.
        more: String,
        presence: Presence,
    },
}

/// How much there is of an endpoint.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// Nothing listens there.
    Absent,
    /// It has not said anything.
    Silent,
    Speaks,
}

impl Try {
    /// Whether the endpoint has said anything.
    pub fn is_heard(&self) -> bool {
        match self {
            Self::Later { presence, .. } => *presence == Presence::Speaks,
            _ => true,
        }
    }
}

/// A reply.
pub struct EndpointReply {
    pub text: String,
    /// Tokens that were read and written, as far as the endpoint says so and it can be.
    pub tokens: [u64; 2],
    /// What is odd about it, in words.
    pub note: Option<String>,
}

/// Where questions are put.
pub struct Endpoint {
    url: String,
    agent: ureq::Agent,
    key: Option<String>,
    key_env: Option<String>,
    mask: Mask,
}

impl Endpoint {
    /// Also returns what somebody should know of its certificates, in words. Fails, in words, when these
    /// can't be read.
    pub fn open(
        spec: &Http,
        key: Option<String>,
        mask: Mask,
    ) -> Result<(Self, Option<String>), String> {
        let url = spec.base_url.calls();
        let is_secure = url
            .get(..6)
            .is_some_and(|start| start.eq_ignore_ascii_case("https:"));
        let (tls, note) = if is_secure {
            tls::trusted()?
        } else {
            (TlsConfig::default(), None)
        };
        let timeout = Duration::from_secs(spec.timeout_s.get().into());
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(timeout))
            .http_status_as_error(false)
            .tls_config(tls)
            // Wherever it leads, neither the question nor the key go there.
            .max_redirects(0)
            .build();
        let endpoint = Self {
            url,
            agent: agent.into(),
            key,
            key_env: spec.key_env.clone(),
            mask,
        };
        Ok((endpoint, note))
    }

    /// Where it is.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Puts a question once.
    pub fn ask(&self, body: &[u8]) -> Try {
        let mut post = self
            .agent
            .post(&self.url)
            .header("Content-Type", "application/json");
        if let Some(key) = &self.key {
            post = post.header("Authorization", format!("Bearer {key}"));
        }
        let mut response = match post.send(body) {
            Ok(response) => response,
            Err(error) => return self.broken(&error),
        };
        let status = response.status().as_u16();
        let header = |name: &str| {
            let value = response.headers().get(name);
            value.and_then(|value| Some(value.to_str().ok()?.trim().to_owned()))
        };
        let wait = header("retry-after").and_then(|wait| wait.parse().ok());
        let location = header("location").unwrap_or_default();
        let text = match response.body_mut().read_to_string() {
            Ok(text) => text,
            Err(error) => return self.broken(&error),
        };
        let diagnostic = || format!("it says {status}: {}", self.shown(&text));
        match status {
            200..=299 => self.read(&text),
            300..=399 => Try::Failed(format!(
                "it says {status} and sends to `{}`, where neither the questions nor the key go by themselves; \
                 if that is the right address, make it `base_url`",
                self.shown(&location)
            )),
            408 | 409 | 425 | 429 | 500..=599 => Try::Later {
                // What is no time is not waited for.
                wait: wait.and_then(|wait| Duration::try_from_secs_f64(wait).ok()),
                what: format!("says {status}"),
                more: format!(": {}", self.shown(&text)),
                presence: Presence::Speaks,
            },
            400 | 413 | 415 | 422 => Try::Refused(diagnostic()),
            401 | 403 => {
                let key = match &self.key_env {
                    Some(name) => format!("; the key is that of {name}"),
                    None => "; `key_env` names the variable with the key".to_owned(),
                };
                Try::Failed(diagnostic() + &key)
            }
            _ => Try::Failed(diagnostic()),
        }
    }

    /// What a body says with which the endpoint has replied.
    fn read(&self, text: &str) -> Try {
        let json: Value = serde_json::from_str(text).unwrap_or_default();
        let message = &json["choices"][0]["message"];
        if !message.is_object() {
            return Try::Failed(format!("this is no reply: {}", self.shown(text)));
        }
        // A model that declines says nothing: a reply like any other that can't be read.
        let reply = message["content"].as_str().unwrap_or_default();
        let mut note = None;
        let tokens = ["prompt_tokens", "completion_tokens"].map(|name| {
            let tokens = json["usage"][name].as_u64().unwrap_or(0);
            if tokens <= TOKENS_MAX {
                return tokens;
            }
            note = Some(format!(
                "{} says that a call took {tokens} `{name}`, which can't be; such calls count as 0",
                self.url
            ));
            0
        });
        Try::Replied(EndpointReply {
            text: self.mask.hide(reply),
            tokens,
            note,
        })
    }

    fn broken(&self, error: &ureq::Error) -> Try {
        let more = || format!(": {}", self.mask.hide(&error.to_string()));
        let (what, more, presence) = match error {
            ureq::Error::Io(error) if error.kind() == ErrorKind::ConnectionRefused => {
                ("refuses the connection", String::new(), Presence::Absent)
            }
            ureq::Error::HostNotFound => (
                "has a host that is not found",
                String::new(),
                Presence::Absent,
            ),
            ureq::Error::Timeout(_) => ("took too long", more(), Presence::Silent),
            _ => ("broke off", more(), Presence::Silent),
        };
        Try::Later {
            wait: None,
            what: what.to_owned(),
            more,
            presence,
        }
    }

    /// The beginning of a text of the endpoint, on one line.
    fn shown(&self, text: &str) -> String {
        // Masked before anything else: a secret that is cut in two would not be found.
        let text = self.mask.hide(text);
        let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let mut shown: String = line.chars().take(SHOWN_MAX).collect();
        if shown.len() < line.len() {
            shown.push('…');
        }
        shown
    }
}
