//! Settings of a judge behind an endpoint, such as its base URL, its key, and the spending limit.

use std::borrow::Cow;
use std::num::NonZeroU32;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::Exam;
use crate::judge_prompt::JudgePromptSettings;
use ovchat_io::mask::SECRET_MIN;

/// The path of the chat completions API, relative to the base URL.
const CALLS: &str = "/chat/completions";

/// Settings of a judge behind an OpenAI-compatible endpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Http {
    /// Base URL of the endpoint, to which `/chat/completions` is appended:
    /// `https://api.openai.com/v1`, `http://127.0.0.1:8000/v1`.
    pub base_url: BaseUrl,
    /// Name of the model at the endpoint. The name identifies the model in keys, so changing only
    /// `base_url` keeps the rows that were scored.
    pub model: String,
    /// Environment variable that holds the API key. Default: none, requests carry no key. The key
    /// is sent only to this endpoint and is masked in logs and files.
    #[serde(default)]
    pub key_env: Option<String>,
    /// Judge prompt, and how verdicts are read from the replies. Default: pairwise with the
    /// built-in prompt.
    #[serde(default)]
    pub ask: JudgePromptSettings,
    /// Field of a request that has the maximum length of a reply: `max_tokens`, or its newer name
    /// `max_completion_tokens`. Default: `max_tokens`.
    #[serde(default, skip_serializing_if = "TokenLimit::is_default")]
    pub token_limit: TokenLimit,
    /// Other fields of a request, such as `{ reasoning_effort: low, temperature: null }`. They
    /// replace fields of the same name; `null` removes one. Default: none.
    #[serde(default, skip_serializing_if = "RequestBody::is_empty")]
    pub body: RequestBody,
    /// Maximum number of concurrent calls. Default: 8.
    #[serde(default = "defaults::concurrency_max")]
    pub concurrency_max: NonZeroU32,
    /// Timeout of a call, in seconds. Default: 120.
    #[serde(default = "defaults::timeout_s")]
    pub timeout_s: NonZeroU32,
    /// Maximum number of attempts at a call while the endpoint is unavailable or rate-limited. The
    /// wait doubles with each attempt, up to two minutes. Default: 8.
    #[serde(default = "defaults::tries")]
    pub tries: NonZeroU32,
    /// Wait after the first failed attempt, in seconds. Default: 1. A `Retry-After` header of the
    /// endpoint takes precedence.
    #[serde(default = "defaults::wait_s")]
    pub wait_s: f64,
    /// Prices of tokens, and a spending limit for the run. Default: no limit.
    #[serde(default)]
    pub spend: Option<Spend>,
    /// Exam on known preferences that the judge must pass before it scores. Default: no exam.
    #[serde(default)]
    pub exam: Option<Exam>,
}

/// The field of a request that has the maximum length of a reply.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TokenLimit {
    #[default]
    MaxTokens,
    MaxCompletionTokens,
}

impl TokenLimit {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::MaxTokens => "max_tokens",
            Self::MaxCompletionTokens => "max_completion_tokens",
        }
    }
}

/// Fields of a request, as JSON.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "serde_json::Map<String, serde_json::Value>")]
pub struct RequestBody(serde_json::Map<String, serde_json::Value>);

impl RequestBody {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Replaces, adds and removes fields of a request.
    pub fn merge_into(&self, request: &mut serde_json::Value) {
        let request = request.as_object_mut().expect("a request is an object");
        for (name, value) in &self.0 {
            if value.is_null() {
                request.remove(name);
            } else {
                request.insert(name.clone(), value.clone());
            }
        }
    }
}

impl TryFrom<serde_json::Map<String, serde_json::Value>> for RequestBody {
    type Error = String;

    fn try_from(fields: serde_json::Map<String, serde_json::Value>) -> Result<Self, String> {
        const OWN: [(&str, &str); 4] = [
            ("model", "use the setting `model`"),
            ("messages", "use `ask.template` and `ask.system`"),
            ("stream", "replies are not streamed"),
            ("n", "every request has one reply"),
        ];
        let own = OWN.iter().find(|(name, _)| fields.contains_key(*name));
        match own {
            Some((name, fix)) => Err(format!("`{name}` cannot be set here; {fix}")),
            None => Ok(Self(fields)),
        }
    }
}

impl Http {
    /// Returns everything about a request, besides the judge prompt, that changes the reply.
    pub fn key_settings(&self) -> Vec<u8> {
        let mut key = self.model.clone().into_bytes();
        if let Some(extra) = self.extra() {
            key.extend(extra.to_string().into_bytes());
        }
        key
    }

    /// Returns the settings of requests that are not the default ones.
    pub fn extra(&self) -> Option<serde_json::Value> {
        let is_default = self.token_limit.is_default() && self.body.is_empty();
        (!is_default).then(|| serde_json::json!([self.token_limit, self.body]))
    }

    /// Returns the environment variable of the key, if it is not set.
    pub fn missing_key(&self) -> Option<&str> {
        let name = self.key_env.as_deref()?;
        key_in(name).is_none().then_some(name)
    }

    /// Returns the environment variable of the key, if its value is too short to be a key.
    pub fn short_key(&self) -> Option<&str> {
        let name = self.key_env.as_deref()?;
        let key = key_in(name)?;
        (key.chars().count() < SECRET_MIN).then_some(name)
    }

    /// The environment variable of the key, if it holds characters that no HTTP header can carry.
    pub fn invalid_key(&self) -> Option<&str> {
        let name = self.key_env.as_deref()?;
        let key = key_in(name)?;
        let is_valid = key.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        (!is_valid || key.trim() != key).then_some(name)
    }
}

/// The problem of a key that no HTTP header can carry, and its fix.
pub const INVALID_KEY: &str = "contains a line break, leading or trailing white space, or non-ASCII characters; \
     set it to the key alone";

/// Reads the key from an environment variable, which must not be empty.
pub(super) fn key_in(name: &str) -> Option<String> {
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

/// An `http` or `https` URL to which the endpoint's paths are appended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BaseUrl(String);

impl BaseUrl {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the URL of the chat completions API.
    pub fn calls(&self) -> String {
        format!("{}{CALLS}", self.0.trim_end_matches('/'))
    }
}

impl TryFrom<String> for BaseUrl {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wanted =
            "expected a URL such as `https://api.openai.com/v1` or `http://127.0.0.1:8000/v1`";
        let is_http = |url: &ureq::http::Uri| {
            matches!(url.scheme_str(), Some("http" | "https")) && url.host().is_some()
        };
        let url = text.parse().ok().filter(is_http);
        let url = url.ok_or_else(|| format!("`{text}` is not an http or https URL; {wanted}"))?;
        let authority = url.authority().map_or("", |authority| authority.as_str());
        let port = authority.rsplit_once(':').map(|(_, port)| port);
        let is_port = |port: &&str| !port.is_empty() && port.chars().all(|c| c.is_ascii_digit());
        if let Some(port) = port.filter(is_port)
            && !port.parse::<u16>().is_ok_and(|port| port > 0)
        {
            return Err(format!(
                "invalid port {port} in `{text}`, expected 1 to 65535"
            ));
        }
        if let Some(base) = text.trim_end_matches('/').strip_suffix(CALLS) {
            return Err(format!(
                "`{text}` is the URL of calls; use the base URL `{base}`, to which `{CALLS}` is appended"
            ));
        }
        // Appended paths would become part of the query or fragment.
        if url.query().is_some() || text.contains('#') {
            return Err(format!(
                "`{text}` has a query or a fragment, so no path can be appended to it; {wanted}"
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
    fn schema_name() -> Cow<'static, str> {
        "BaseUrl".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "format": "uri", "pattern": "^[Hh][Tt][Tt][Pp][Ss]?://"})
    }
}

/// Prices of calls and a spending limit, in any currency.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Spend {
    /// Spending limit for the calls of a run, above 0. The run stops when it is reached; calls in
    /// flight may still exceed it.
    pub limit: SpendLimit,
    /// Price per million prompt tokens.
    pub per_million_prompt_tokens: Price,
    /// Price per million reply tokens.
    pub per_million_reply_tokens: Price,
}

/// A spending limit, above 0.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct SpendLimit(f64);

impl SpendLimit {
    pub fn get(self) -> f64 {
        self.0
    }
}

impl TryFrom<f64> for SpendLimit {
    type Error = String;

    fn try_from(limit: f64) -> Result<Self, String> {
        if limit > 0.0 && limit.is_finite() {
            return Ok(Self(limit));
        }
        Err(format!(
            "{limit} is out of range, expected a number above 0"
        ))
    }
}

impl From<SpendLimit> for f64 {
    fn from(limit: SpendLimit) -> Self {
        limit.0
    }
}

impl JsonSchema for SpendLimit {
    fn schema_name() -> Cow<'static, str> {
        "SpendLimit".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "number", "exclusiveMinimum": 0})
    }
}

/// A price of a million tokens, 0 or more.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Price(f64);

impl Price {
    pub fn get(self) -> f64 {
        self.0
    }
}

impl TryFrom<f64> for Price {
    type Error = String;

    fn try_from(price: f64) -> Result<Self, String> {
        if price >= 0.0 && price.is_finite() {
            return Ok(Self(price));
        }
        Err(format!("{price} is out of range, expected 0 or more"))
    }
}

impl From<Price> for f64 {
    fn from(price: Price) -> Self {
        price.0
    }
}

impl JsonSchema for Price {
    fn schema_name() -> Cow<'static, str> {
        "Price".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "number", "minimum": 0})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_a_request_are_replaced_and_removed_but_for_those_of_other_settings() {
        let body = |fields| serde_json::from_value::<RequestBody>(fields);
        let mut request = serde_json::json!({"model": "m", "temperature": 0.0, "max_tokens": 16});
        let fields = serde_json::json!({"temperature": null, "max_tokens": 8, "top_p": 1});
        body(fields).unwrap().merge_into(&mut request);
        let expected = serde_json::json!({"model": "m", "max_tokens": 8, "top_p": 1});
        assert_eq!(request, expected);
        let told = body(serde_json::json!({"n": 2})).unwrap_err().to_string();
        assert_eq!(told, "`n` cannot be set here; every request has one reply");
    }

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
            let diagnostic = read(text).unwrap_err();
            assert!(diagnostic.contains(problem), "{text}: {diagnostic}");
            assert!(
                diagnostic.contains("https://api.openai.com/v1"),
                "{diagnostic}"
            );
        }
        for (text, diagnostic) in [
            (
                "http://localhost:99999/v1",
                "invalid port 99999 in `http://localhost:99999/v1`, expected 1 to 65535",
            ),
            (
                "http://[::1]:0/v1",
                "invalid port 0 in `http://[::1]:0/v1`, expected 1 to 65535",
            ),
            (
                "https://api.openai.com/v1/chat/completions/",
                "`https://api.openai.com/v1/chat/completions/` is the URL of calls; use the base URL \
                 `https://api.openai.com/v1`, to which `/chat/completions` is appended",
            ),
        ] {
            assert_eq!(read(text).unwrap_err(), diagnostic);
        }
    }
}
