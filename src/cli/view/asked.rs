//! A request of the page: its parameters, its time limit, and the failures that it can have.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::failed::Failed;
use ovchat_data::store::StoreError;
use ovchat_query::QueryError;

/// The parameters of a request, and whether anyone still waits for its response.
pub struct Asked {
    params: Vec<(String, String)>,
    begun: Instant,
    limit: Duration,
    gone: Arc<AtomicBool>,
    /// True when the server ends.
    ends: Arc<AtomicBool>,
}

/// The reason why a request has no result.
#[derive(Debug)]
pub enum Problem {
    /// The request cannot be answered as it is.
    Refused(String),
    /// There is no such thing.
    Missing(String),
    /// Reading the run failed.
    Failed(String),
    /// Nobody waits for the response any more.
    Gone,
    /// The page has all rows that it asked for; never seen by clients.
    Enough,
}

impl Problem {
    /// Returns the HTTP status and the message.
    pub fn words(&self) -> (u16, &str) {
        match self {
            Self::Refused(words) => (400, words),
            Self::Missing(words) => (404, words),
            Self::Failed(words) => (500, words),
            Self::Gone | Self::Enough => (500, "the request was cancelled"),
        }
    }
}

impl From<QueryError> for Problem {
    fn from(error: QueryError) -> Self {
        Self::Refused(error.to_string())
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<Failed> for Problem {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Query(error) => error.into(),
            failed => Self::Failed(failed.to_string()),
        }
    }
}

impl Asked {
    /// Creates a request that begins now and may take the time `limit`. `gone` becomes true when its
    /// client has left.
    pub fn new(params: Vec<(String, String)>, limit: Duration, gone: Arc<AtomicBool>) -> Self {
        Self {
            params,
            begun: Instant::now(),
            limit,
            gone,
            ends: Arc::default(),
        }
    }

    /// Ends the request also when `ends` becomes true.
    #[must_use]
    pub fn until(self, ends: &Arc<AtomicBool>) -> Self {
        let ends = Arc::clone(ends);
        Self { ends, ..self }
    }

    /// Returns a parameter, unless it is missing or empty.
    pub fn text(&self, name: &str) -> Option<&str> {
        let found = self.params.iter().find(|(other, _)| other == name);
        found
            .map(|(_, value)| value.as_str())
            .filter(|value| !value.is_empty())
    }

    /// Returns a parameter that the request must have.
    pub fn needed(&self, name: &str) -> Result<&str, Problem> {
        let missing = || Problem::Refused(format!("the parameter `{name}` is missing"));
        self.text(name).ok_or_else(missing)
    }

    /// Returns a parameter that is a whole number.
    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, Problem> {
        let wrong = || Problem::Refused(format!("the parameter `{name}` must be a whole number"));
        let text = self.text(name);
        text.map(|text| text.parse().map_err(|_| wrong()))
            .transpose()
    }

    /// Returns the time since the request began, in seconds.
    pub fn seconds(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }

    /// Fails once the client has left or the time is up.
    pub fn go_on(&self) -> Result<(), Problem> {
        if self.gone.load(Ordering::Relaxed) || self.ends.load(Ordering::Relaxed) {
            return Err(Problem::Gone);
        }
        if self.begun.elapsed() > self.limit {
            return Err(Problem::Refused(format!(
                "the query was stopped after {} s: read fewer rows or rounds, raise `--query-seconds`, or use `pipeline \
                 sql`, which has no time limit",
                self.limit.as_secs()
            )));
        }
        Ok(())
    }
}
