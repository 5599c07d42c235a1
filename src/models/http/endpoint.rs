//! One HTTP request to an endpoint, and the classification of its response.

use std::io::ErrorKind;
use std::time::Duration;

use serde_json::Value;
use ureq::tls::TlsConfig;

use super::call_log::TOKENS_MAX;
use super::settings::Http;
use crate::tls;
use ovchat_io::mask::Mask;

/// Maximum length of an endpoint's message in errors, in characters.
const SHOWN_MAX: usize = 300;

/// The outcome of one attempt. Texts from the endpoint are masked.
pub enum Try {
    Replied(EndpointReply),
    /// The endpoint refuses this request, but may accept others; with the reason.
    Refused(String),
    /// No more calls can be made; with the reason.
    Failed(String),
    /// The endpoint cannot take the request now.
    Later {
        wait: Option<Duration>,
        /// The failure, as a clause: `the connection was refused`, `the endpoint returned HTTP
        /// 429`.
        what: String,
        /// The endpoint's message or the error.
        more: String,
        presence: Presence,
    },
}

/// Evidence that the endpoint exists.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// Nothing listens at the address.
    Absent,
    /// The endpoint has not responded.
    Silent,
    Speaks,
}

impl Try {
    /// True if the endpoint has responded.
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
    /// Prompt and reply tokens; 0 if the endpoint reports none or an implausible number.
    pub tokens: [u64; 2],
    /// A note on an implausible reply.
    pub note: Option<String>,
}

/// An endpoint and the key for it.
pub struct Endpoint {
    url: String,
    agent: ureq::Agent,
    key: Option<String>,
    key_env: Option<String>,
    mask: Mask,
}

impl Endpoint {
    /// Opens an endpoint, and returns a note on the certificates if there is one. Fails, with a
    /// message, if the certificates cannot be read.
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
            // Redirects are not followed, so that neither request nor key reach another address.
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

    /// Returns the URL of the endpoint.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Sends a request once.
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
        let diagnostic = || format!("the endpoint returned HTTP {status}: {}", self.shown(&text));
        match status {
            200..=299 => self.read(&text),
            300..=399 => Try::Failed(format!(
                "HTTP {status} redirects to `{}`, which is not followed to protect the prompts and the key; \
                 if that address is correct, set `base_url` to it",
                self.shown(&location)
            )),
            408 | 409 | 425 | 429 | 500..=599 => Try::Later {
                // A value that is not a valid duration is ignored.
                wait: wait.and_then(|wait| Duration::try_from_secs_f64(wait).ok()),
                what: format!("the endpoint returned HTTP {status}"),
                more: format!(": {}", self.shown(&text)),
                presence: Presence::Speaks,
            },
            400 | 413 | 415 | 422 => Try::Refused(diagnostic()),
            401 | 403 => {
                let key = match &self.key_env {
                    Some(name) => format!("; check the key in {name}"),
                    None => {
                        "; set `key_env` to the environment variable that holds the key".to_owned()
                    }
                };
                Try::Failed(diagnostic() + &key)
            }
            _ => Try::Failed(diagnostic()),
        }
    }

    /// Parses the body of a successful response.
    fn read(&self, text: &str) -> Try {
        let json: Value = serde_json::from_str(text).unwrap_or_default();
        let Some(reply) = reply_in(&json) else {
            return Try::Failed(format!(
                "the response is not a chat completion: {}",
                self.shown(text)
            ));
        };
        let mut note = None;
        let tokens = ["prompt_tokens", "completion_tokens"].map(|name| {
            let tokens = json["usage"][name].as_u64().unwrap_or(0);
            if tokens <= TOKENS_MAX {
                return tokens;
            }
            note = Some(format!(
                "{} reported an implausible {tokens} `{name}` for a call; it is counted as 0",
                self.url
            ));
            0
        });
        Try::Replied(EndpointReply {
            text: self.mask.hide(&reply),
            tokens,
            note,
        })
    }

    fn broken(&self, error: &ureq::Error) -> Try {
        let more = || format!(": {}", self.mask.hide(&error.to_string()));
        let (what, more, presence) = match error {
            ureq::Error::Io(error) if error.kind() == ErrorKind::ConnectionRefused => (
                "the connection was refused",
                String::new(),
                Presence::Absent,
            ),
            ureq::Error::HostNotFound => {
                ("the host was not found", String::new(), Presence::Absent)
            }
            ureq::Error::Timeout(_) => ("the call timed out", more(), Presence::Silent),
            _ => ("the connection was interrupted", more(), Presence::Silent),
        };
        Try::Later {
            wait: None,
            what: what.to_owned(),
            more,
            presence,
        }
    }

    /// Returns the start of a text from the endpoint, masked and on one line.
    fn shown(&self, text: &str) -> String {
        // Masking comes first: a truncated secret would not be found.
        let text = self.mask.hide(text);
        let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let mut shown: String = line.chars().take(SHOWN_MAX).collect();
        if shown.len() < line.len() {
            shown.push('…');
        }
        shown
    }
}

/// Returns the reply in a chat completion; `None` if the response is none. A refusal has no content, and
/// a filtered reply no choice: replies without a readable verdict.
fn reply_in(json: &Value) -> Option<String> {
    let Some(choice) = json.get("choices")?.as_array()?.first() else {
        return Some(String::new());
    };
    match &choice.get("message")?.as_object()?.get("content") {
        None | Some(Value::Null) => Some(String::new()),
        Some(Value::String(text)) => Some(text.clone()),
        Some(Value::Array(parts)) => {
            let texts = parts.iter().filter_map(|part| part.get("text")?.as_str());
            Some(texts.collect())
        }
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn replies_are_read_in_every_form_of_a_chat_completion() {
        let content =
            |content: Value| reply_in(&json!({"choices": [{"message": {"content": content}}]}));
        assert_eq!(content(json!("4")).unwrap(), "4");
        assert_eq!(content(json!(null)).unwrap(), "");
        let parts = json!([{"type": "text", "text": "4 "}, {"type": "refusal"}, {"type": "text", "text": "5"}]);
        assert_eq!(content(parts).unwrap(), "4 5");
        assert_eq!(content(json!(4)), None);
        assert_eq!(reply_in(&json!({"choices": []})).unwrap(), "");
        assert_eq!(reply_in(&json!({"choices": [{}]})), None);
        assert_eq!(reply_in(&json!({"error": "busy"})), None);
    }
}
