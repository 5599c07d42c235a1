//! Measured processing rates on this machine, over all runs. They are cached with the user's other
//! caches, so that a plan can estimate durations for tables that its run has never built.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::{StoreError, write_atomically};

/// The maximum number of cached rates; the oldest are evicted first.
const REMEMBERED_MAX: usize = 2000;

/// Cost per row, averaged over the last table that was built with the same inputs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    pub seconds_per_row: f64,
    pub bytes_per_row: f64,
    /// Time of measurement, in seconds since the Unix epoch.
    at: u64,
}

/// Rates, keyed by what determines them: stage type, settings, model sizes, precision, threads.
#[derive(Debug, Clone, Default)]
pub struct Rates {
    /// The cache file; `None` disables the cache.
    path: Option<PathBuf>,
    known: BTreeMap<String, Rate>,
}

impl Rates {
    /// Reads the rates cached in `path`; empty if the file is missing or unreadable.
    pub fn open(path: Option<PathBuf>) -> Self {
        let text = path.as_deref().and_then(|path| fs::read(path).ok());
        let known = text.and_then(|text| serde_json::from_slice(&text).ok());
        Self {
            path,
            known: known.unwrap_or_default(),
        }
    }

    /// Returns the default path: `ovchat/rates.json` in the user's cache folder, by the XDG base
    /// directory specification. `None` if there is no such folder.
    pub fn usual_place() -> Option<PathBuf> {
        let folder = |name: &str| env::var_os(name).map(PathBuf::from);
        let caches = folder("XDG_CACHE_HOME").filter(|path| path.is_absolute());
        let caches = caches.or_else(|| Some(folder("HOME")?.join(".cache")))?;
        Some(caches.join("ovchat/rates.json"))
    }

    pub fn get(&self, key: &str) -> Option<Rate> {
        self.known.get(key).copied()
    }

    /// Records the cost of `rows` rows. If other processes record at the same time, one of the
    /// records may be lost.
    pub fn note(
        &mut self,
        key: String,
        rows: u64,
        seconds: f64,
        bytes: u64,
    ) -> Result<(), StoreError> {
        let Some(path) = self.path.clone().filter(|_| rows > 0) else {
            return Ok(());
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        *self = Self::open(Some(path.clone()));
        self.known.insert(
            key,
            Rate {
                seconds_per_row: seconds / rows as f64,
                bytes_per_row: bytes as f64 / rows as f64,
                at: now.map_or(0, |since| since.as_secs()),
            },
        );
        while self.known.len() > REMEMBERED_MAX {
            let oldest = self.known.iter().min_by_key(|(_, rate)| rate.at);
            let oldest = oldest.map(|(key, _)| key.clone()).unwrap_or_default();
            self.known.remove(&oldest);
        }
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(StoreError::io("create", folder))?;
        }
        let text = serde_json::to_vec(&self.known).expect("names and numbers serialize");
        write_atomically(&path, &text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_remembered_and_the_oldest_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let path = Some(folder.path().join("below/rates.json"));
        let mut rates = Rates::open(path.clone());
        assert_eq!(rates.get("a"), None);
        rates.note("a".to_owned(), 4, 2.0, 100).unwrap();
        rates.note("nothing".to_owned(), 0, 2.0, 100).unwrap();
        let again = Rates::open(path.clone());
        assert_eq!(again.get("nothing"), None);
        let rate = again.get("a").unwrap();
        assert_eq!((rate.seconds_per_row, rate.bytes_per_row), (0.5, 25.0));
        let old = |number: usize| (number.to_string(), Rate { at: 1, ..rate });
        let many: BTreeMap<_, _> = (0..REMEMBERED_MAX).map(old).collect();
        let text = serde_json::to_vec(&many).unwrap();
        fs::write(path.as_deref().unwrap(), text).unwrap();
        rates.note("a".to_owned(), 1, 1.0, 1).unwrap();
        let kept = Rates::open(path);
        assert!(kept.get("a").is_some());
        assert_eq!(kept.known.len(), REMEMBERED_MAX);
    }

    #[test]
    fn without_a_place_nothing_is_remembered() {
        let mut rates = Rates::open(None);
        rates.note("a".to_owned(), 4, 2.0, 100).unwrap();
        assert_eq!(rates.get("a"), None);
    }
}
