//! `hf://org/name` and `hf://datasets/org/name` paths: checkpoints and datasets in the Hugging Face
//! cache.
//!
//! Repositories that `hf download org/name` (or any program that uses the hub) has put into the
//! cache are found without a network. [`Hub::fetch`] downloads missing ones into the same cache,
//! where other programs find them.

mod dataset;
mod fetch;

pub use dataset::{DatasetPart, Unchosen, files_in};
pub use fetch::{Hub, is_offline};

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use ovchat_io::files;

/// The prefix of such a path.
const SCHEME: &str = "hf://";

/// The prefix of the name of a dataset.
const DATASETS: &str = "datasets/";

/// A repository of the hub, with an optional revision: `hf://org/name@v1.0`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repository {
    /// True for a dataset, false for a model.
    pub is_dataset: bool,
    /// The name: `org/name`.
    pub name: String,
    /// A branch, a tag or a commit.
    pub revision: String,
}

impl Repository {
    /// Parses an `hf://` path; `None` for any other path.
    pub fn of(path: &Path) -> Option<Self> {
        let text = path.to_str()?.strip_prefix(SCHEME)?;
        let (name, revision) = text.split_once('@').unwrap_or((text, "main"));
        let dataset = name.strip_prefix(DATASETS);
        let name = dataset.unwrap_or(name);
        Some(Self {
            is_dataset: dataset.is_some(),
            name: name.trim_end_matches('/').to_owned(),
            revision: revision.to_owned(),
        })
    }

    /// Returns the reason why the name or revision is invalid, or `None` if it is valid.
    pub fn problem(&self) -> Option<String> {
        let parts: Vec<&str> = self.name.split('/').collect();
        if parts.len() == 2 && parts.iter().all(|part| is_hub_name(part)) {
            if is_revision(&self.revision) {
                return None;
            }
            let revision = &self.revision;
            return Some(format!(
                "`{revision}` is not a valid branch, tag or commit; write, for example, `hf://{}org/name@main`",
                self.prefix()
            ));
        }
        let prefix = self.prefix();
        Some(format!(
            "expected `hf://{prefix}org/name` or `hf://{prefix}org/name@revision`"
        ))
    }

    /// Returns what stands before the name in a path and a URL of the hub.
    fn prefix(&self) -> &'static str {
        if self.is_dataset { DATASETS } else { "" }
    }

    /// Suggests the `hf://` path that was probably meant by another path: `org/name`, or the URL of
    /// the repository's page.
    pub fn meant(path: &str) -> Option<String> {
        let address = path
            .strip_prefix("https://")
            .or_else(|| path.strip_prefix("http://"))
            .unwrap_or(path);
        let address = address.strip_prefix("www.").unwrap_or(address);
        let page = ["huggingface.co/", "hf.co/"]
            .iter()
            .find_map(|host| address.strip_prefix(host));
        let slashed = ["hf:/", "hf:", "HF://"]
            .iter()
            .find_map(|scheme| path.strip_prefix(scheme));
        let named = page.or(slashed).unwrap_or(path);
        let parts: Vec<&str> = named.trim_end_matches('/').split('/').collect();
        let (name, revision) = match (parts[..].split_first_chunk(), page) {
            (Some(([org, name], [])), _) => (format!("{org}/{name}"), "main"),
            (Some(([org, name], ["tree" | "blob" | "resolve", revision, ..])), Some(_)) => {
                (format!("{org}/{name}"), *revision)
            }
            _ => return None,
        };
        let (name, revision) = match name.split_once('@') {
            Some((name, revision)) => (name.to_owned(), revision.to_owned()),
            None => (name, revision.to_owned()),
        };
        let repository = Self {
            is_dataset: false,
            name,
            revision,
        };
        if repository.problem().is_some() {
            return None;
        }
        let Self { name, revision, .. } = repository;
        Some(match revision.as_str() {
            "main" => format!("{SCHEME}{name}"),
            revision => format!("{SCHEME}{name}@{revision}"),
        })
    }

    /// Returns the command that downloads the repository.
    pub fn command(&self) -> String {
        let kind = if self.is_dataset {
            " --repo-type dataset"
        } else {
            ""
        };
        match self.revision.as_str() {
            "main" => format!("hf download {}{kind}", self.name),
            revision => format!("hf download {}{kind} --revision {revision}", self.name),
        }
    }

    /// Returns the folder of all revisions of the repository in a cache.
    fn folder(&self, cache: &Path) -> PathBuf {
        let kind = if self.is_dataset {
            "datasets"
        } else {
            "models"
        };
        cache.join(format!("{kind}--{}", self.name.replace('/', "--")))
    }

    /// Returns the folder of the revision in a cache, if it is there: for a model, with its weights.
    fn snapshot(&self, cache: &Path) -> Option<PathBuf> {
        if self.problem().is_some() {
            return None;
        }
        let folder = self.folder(cache);
        let named = files::read_to_string(&folder.join("refs").join(&self.revision));
        let commit = named.map_or_else(|_| self.revision.clone(), |text| text.trim().to_owned());
        if !is_revision(&commit) {
            return None;
        }
        let snapshot = folder.join("snapshots").join(commit);
        let is_whole = if self.is_dataset {
            snapshot.is_dir()
        } else {
            has_weights(&snapshot)
        };
        is_whole.then_some(snapshot)
    }
}

/// True if the hub allows this name for an organization or a repository.
fn is_hub_name(name: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=96).contains(&name.len())
        && name.chars().all(word)
        && !name.starts_with(['.', '-'])
        && !name.ends_with(['.', '-'])
}

/// True for a valid name of a branch, a tag or a commit, by git's rules for reference names. No
/// part of it leads out of the folder that it is a path in.
fn is_revision(name: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+' | '/');
    let is_part = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.ends_with('.');
    name.len() <= 255 && name.chars().all(is_plain) && name.split('/').all(is_part)
}

/// True if a folder contains weights and, if an index lists their files, all of these. Programs
/// that needed only a config leave a folder without weights. If both formats are there, the one
/// that this program reads counts.
fn has_weights(folder: &Path) -> bool {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let names: Vec<String> = entries
        .filter(|entry| entry.path().is_file())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    let is_whole = |index: &String| {
        let index = files::read(&folder.join(index)).unwrap_or_default();
        let index: Value = serde_json::from_slice(&index).unwrap_or_default();
        let files = index["weight_map"].as_object().into_iter().flatten();
        let mut files = files.filter_map(|(_, file)| file.as_str());
        files.all(|file| names.iter().any(|name| name == file))
    };
    let index = |of: &str| names.iter().find(|name| name.ends_with(of));
    if let Some(index) = index(".safetensors.index.json") {
        return is_whole(index);
    }
    let ends = |ending: &str| names.iter().any(|name| has_ending(name, ending));
    if ends("safetensors") {
        return true;
    }
    if let Some(index) = index(".bin.index.json") {
        return is_whole(index);
    }
    names.iter().any(|name| is_weights(name))
}

fn has_ending(name: &str, ending: &str) -> bool {
    Path::new(name).extension() == Some(ending.as_ref())
}

fn is_weights(name: &str) -> bool {
    let endings = ["safetensors", "bin", "pt", "pth"];
    endings.iter().any(|ending| has_ending(name, ending))
}

/// Returns the home folder of the Hugging Face programs, as `huggingface_hub` determines it
/// (`constants.py`).
fn home(variable: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    if let Some(home) = variable("HF_HOME") {
        return Some(home.into());
    }
    let caches = variable("XDG_CACHE_HOME").map(PathBuf::from);
    let caches = caches.or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")));
    Some(caches?.join("huggingface"))
}

/// Returns the cache folder of the hub.
fn cache(variable: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    if let Some(cache) = variable("HF_HUB_CACHE") {
        return Some(cache.into());
    }
    Some(home(variable)?.join("hub"))
}

/// Resolves a path from the user: a relative path is joined to `folder`, and an `hf://` path
/// becomes its folder in the cache. An `hf://` path that is not in the cache stays as it is, so
/// that the caller can tell how to download it.
pub fn located(folder: &Path, path: &Path) -> PathBuf {
    let Some(repository) = Repository::of(path) else {
        return folder.join(path);
    };
    let snapshot = cache(&variable).and_then(|cache| repository.snapshot(&cache));
    snapshot.unwrap_or_else(|| path.to_owned())
}

/// Returns the data files of a source: the file `path`, or those of a part of the dataset whose
/// folder or `hf://datasets` path it is. Fails for a part that the dataset does not have, or that is
/// not in the cache.
pub fn data_files(path: &Path, part: DatasetPart<'_>) -> Result<Vec<PathBuf>, Unchosen> {
    if let Some(repository) = Repository::of(path) {
        let snapshot = cache(&variable).and_then(|cache| repository.snapshot(&cache));
        let absent = || Unchosen::Absent("the dataset is not in the Hugging Face cache".to_owned());
        return files_in(&snapshot.ok_or_else(absent)?, part);
    }
    if path.is_dir() {
        return files_in(path, part);
    }
    Ok(vec![path.to_owned()])
}

/// Returns an environment variable that is set and not empty.
fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository(text: &str) -> Repository {
        Repository::of(Path::new(text)).unwrap()
    }

    #[test]
    fn what_was_fetched_is_found_by_branch_and_by_commit() {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("models--org--name");
        fs::create_dir_all(folder.join("snapshots/abc")).unwrap();
        fs::create_dir_all(folder.join("refs")).unwrap();
        fs::write(folder.join("refs/main"), "abc").unwrap();
        fs::write(folder.join("snapshots/abc/config.json"), "{}").unwrap();
        assert_eq!(repository("hf://org/name").snapshot(cache.path()), None);
        let weights = folder.join("snapshots/abc/model.safetensors");
        fs::write(weights, "").unwrap();
        let found = Some(folder.join("snapshots/abc"));
        assert_eq!(repository("hf://org/name").snapshot(cache.path()), found);
        assert_eq!(
            repository("hf://org/name@abc").snapshot(cache.path()),
            found
        );
        assert_eq!(repository("hf://org/name@v2").snapshot(cache.path()), None);
        assert_eq!(repository("hf://org/other").snapshot(cache.path()), None);
        assert_eq!(Repository::of(Path::new("org/name")), None);
        let command = repository("hf://org/name@v2").command();
        assert_eq!(command, "hf download org/name --revision v2");
    }

    #[test]
    fn a_revision_never_leads_out_of_the_cache() {
        let cache = tempfile::tempdir().unwrap();
        let victim = cache.path().join("victim");
        fs::create_dir_all(&victim).unwrap();
        fs::write(victim.join("model.safetensors"), "").unwrap();
        let folder = cache.path().join("models--org--name");
        for folder in ["refs", "snapshots"] {
            fs::create_dir_all(cache.path().join("models--org--name").join(folder)).unwrap();
        }
        for revision in [
            "../../victim",
            "..",
            "a/../../../victim",
            "/etc",
            ".git",
            "a//b",
            "",
            "a b",
        ] {
            let repository = repository(&format!("hf://org/name@{revision}"));
            assert!(repository.problem().is_some(), "{revision}");
            assert_eq!(repository.snapshot(cache.path()), None, "{revision}");
        }
        // A cache file that does not name a commit must not lead out of the cache, either.
        fs::write(folder.join("refs/main"), "../../victim").unwrap();
        assert_eq!(repository("hf://org/name").snapshot(cache.path()), None);
        for revision in ["main", "v1.0", "refs/pr/3", "0123abc", "feature/a_b-c+d"] {
            let repository = repository(&format!("hf://org/name@{revision}"));
            assert_eq!(repository.problem(), None, "{revision}");
        }
    }

    #[test]
    fn what_is_written_almost_like_a_repository_is_recognized() {
        let meant = |path: &str| Repository::meant(path).unwrap_or_default();
        assert_eq!(meant("llava-hf/ov-7b"), "hf://llava-hf/ov-7b");
        assert_eq!(meant("llava-hf/ov-7b@v1"), "hf://llava-hf/ov-7b@v1");
        assert_eq!(meant("hf:llava-hf/ov-7b"), "hf://llava-hf/ov-7b");
        let page = "https://huggingface.co/llava-hf/ov-7b";
        assert_eq!(meant(page), "hf://llava-hf/ov-7b");
        assert_eq!(meant("hf.co/llava-hf/ov-7b/"), "hf://llava-hf/ov-7b");
        assert_eq!(meant(&format!("{page}/tree/main")), "hf://llava-hf/ov-7b");
        let file = format!("{page}/blob/v1/config.json");
        assert_eq!(meant(&file), "hf://llava-hf/ov-7b@v1");
        let others = [
            "policy",
            "../models/policy",
            "/models/policy",
            "a/b/c",
            "./a",
            "../a",
            "~/a",
        ];
        for path in others {
            assert_eq!(Repository::meant(path), None, "{path}");
        }
        assert_eq!(
            Repository::meant("https://huggingface.co/datasets/org/name"),
            None
        );
        assert_eq!(repository("hf://org/name@v1").problem(), None);
        let dataset = repository("hf://datasets/org/name@v1");
        assert!(dataset.is_dataset && dataset.problem().is_none());
        let command = "hf download org/name --repo-type dataset --revision v1";
        assert_eq!(dataset.command(), command);
        for wrong in [
            "hf://name",
            "hf://a/b/c",
            "hf://org/",
            "hf://org/name@",
            "hf:///name",
        ] {
            assert!(repository(wrong).problem().is_some(), "{wrong}");
        }
    }

    #[test]
    fn the_cache_is_where_the_hub_has_it() {
        let with = |set: &[(&str, &str)]| {
            cache(&|name| {
                let of = set.iter().find(|(known, _)| *known == name);
                of.map(|(_, value)| OsString::from(value))
            })
        };
        let path = |text: &str| Some(PathBuf::from(text));
        let home = ("HOME", "/home/me");
        assert_eq!(with(&[home]), path("/home/me/.cache/huggingface/hub"));
        assert_eq!(with(&[home, ("HF_HOME", "/hf")]), path("/hf/hub"));
        assert_eq!(
            with(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/hf")]),
            path("/c")
        );
    }
}
