//! Values from the environment that may be secret, and the settings that use them.
//!
//! Errors, plans and keys show the name and hash of a value instead of it. A value that is used
//! only in paths is shown in messages.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use sha2::{Digest, Sha256};

use super::source::KeyPath;
use ovchat_io::mask::{Mask, SECRET_MIN};

/// An environment variable that a pipeline references.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnvReference {
    /// The name of the variable.
    pub name: String,
    /// The SHA-256 of its value, in hex.
    pub sha256: String,
}

/// The values taken from the environment, and the settings that use them.
#[derive(Clone, Default)]
pub struct Secrets {
    values: BTreeMap<String, String>,
    /// The API keys of endpoints, by the names of their variables.
    keys: BTreeMap<String, String>,
    uses: Vec<EnvUse>,
    /// The variables whose values are shown in messages, because they are used only in paths.
    shown: BTreeSet<String>,
}

/// Words in the name of a variable that mark its value as secret, wherever it is used.
const SECRET_WORDS: [&str; 7] = [
    "KEY",
    "TOKEN",
    "SECRET",
    "PASS",
    "CREDENTIAL",
    "AUTH",
    "COOKIE",
];

/// A setting that contains values from the environment.
#[derive(Clone)]
pub struct EnvUse {
    /// The path of the setting.
    pub path: KeyPath,
    /// The text of the setting with `${env:NAME}` in place of the values.
    pub written: String,
    /// The text of the setting with the values.
    pub meant: String,
    /// The names of the variables.
    pub names: Vec<String>,
}

/// Shows only the names, never the values.
impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.values.keys()).finish()
    }
}

impl Secrets {
    /// Returns every variable that is used, with the hash of its value, sorted by name.
    pub fn references(&self) -> Vec<EnvReference> {
        let reference = |(name, value): (&String, &String)| EnvReference {
            name: name.clone(),
            sha256: hash(value),
        };
        self.values.iter().map(reference).collect()
    }

    /// Returns the hash of a variable's value.
    pub fn hash_of(&self, name: &str) -> Option<String> {
        self.values.get(name).map(|value| hash(value))
    }

    /// The settings at or below `path` that contain values from the environment.
    pub fn uses_in<'a>(&'a self, path: &'a KeyPath) -> impl Iterator<Item = &'a EnvUse> {
        self.uses.iter().filter(|used| used.path.is_in(path))
    }

    /// Lets messages show the values of variables that are used only in the settings `paths`, so
    /// that an error about a file names the file. A variable with the name of a secret stays
    /// hidden.
    pub fn show_paths(&mut self, paths: &[KeyPath]) {
        let vars = KeyPath::root().key("vars");
        let is_path = |name: &str| {
            let uses = self.uses.iter().filter(|used| {
                used.names.iter().any(|other| other == name) && !used.path.is_in(&vars)
            });
            let mut uses = uses.peekable();
            uses.peek().is_some() && uses.all(|used| paths.contains(&used.path))
        };
        let names = self.values.keys();
        let shown = names.filter(|name| is_path(name) && !is_secret(name));
        self.shown = shown.cloned().collect();
    }

    /// Adds the value of a variable that a setting references.
    pub fn add_value(&mut self, name: &str, value: &str) {
        self.values.insert(name.to_owned(), value.to_owned());
    }

    /// Adds a setting that contains values from the environment.
    pub fn add_use(&mut self, used: EnvUse) {
        self.uses.push(used);
    }

    /// Adds the value of a variable that holds the API key of an endpoint.
    pub fn add_key(&mut self, name: &str, value: &str) {
        self.keys.insert(name.to_owned(), value.to_owned());
    }

    /// Returns `text` with `${env:NAME}` in place of each value in any encoding, except those shown
    /// as paths.
    pub fn hide(&self, text: &str) -> String {
        let values = self.values.iter();
        let values = values.filter(|(name, _)| !self.shown.contains(*name));
        let all = values.chain(&self.keys);
        Mask::new(all.map(|(name, value)| (name.as_str(), value.as_str()))).hide(text)
    }

    /// Returns the mask for everything that a run writes: it removes the API keys of endpoints, and
    /// the values of variables that have the name of a secret or are part of a URL. Other values
    /// stay, since data may contain them by chance.
    pub fn mask(&self) -> Mask {
        let is_in_address = |name: &String| {
            let mut uses = self.uses.iter();
            uses.any(|used| used.path.name() == "base_url" && used.names.contains(name))
        };
        let is_long = |value: &str| value.chars().count() >= SECRET_MIN;
        let values = self.values.iter();
        let values = values.filter(|(name, _)| is_secret(name) || is_in_address(name));
        let all = values.chain(&self.keys);
        let all = all.filter(|(_, value)| is_long(value));
        Mask::new(all.map(|(name, value)| (name.as_str(), value.as_str())))
    }

    /// The names of the variables, including those of API keys.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.values
            .keys()
            .chain(self.keys.keys())
            .map(String::as_str)
    }
}

/// True if a variable has the name of a secret.
fn is_secret(name: &str) -> bool {
    let name = name.to_uppercase();
    SECRET_WORDS.iter().any(|word| name.contains(word))
}

fn hash(value: &str) -> String {
    hex::encode(Sha256::digest(value.as_bytes()))
}
