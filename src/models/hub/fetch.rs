//! Downloads from the Hugging Face hub into its cache, in the cache layout of `huggingface_hub`.
//!
//! The layout (`file_download.py`) stores files by content hash in `blobs`, and links to them by
//! name in `snapshots/<commit>`.
//!
//! A file gets its final name only when it is complete: it grows as `<name>.incomplete` up to the
//! size that the hub lists, resumes where it was interrupted, and is verified against the hub's
//! SHA-256 or, for a file stored in git, git's hash. During the download, the lock that
//! `huggingface_hub` uses is held. Links are created last, those to weights after all others: if
//! the weights are there, everything is.

use std::fmt::Display;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use serde::Deserialize;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use url::Url;

use super::super::tls;
use super::dataset::{DatasetPart, LISTING, README, choose, stays_inside};
use super::{Repository, cache, has_ending, home, is_weights, variable};
use ovchat_io::files;
use ovchat_io::mask::Mask;

/// Maximum number of attempts for a file, and the wait before the second attempt; the wait doubles
/// for each further one.
const TRIES: u32 = 5;
const WAIT: Duration = Duration::from_secs(1);

/// Maximum number of redirects for one file.
const REDIRECTS_MAX: u32 = 10;

/// A failed request.
enum Refusal {
    /// A retry may succeed.
    Later(String),
    Never(String),
}

impl Refusal {
    fn words(self) -> String {
        match self {
            Self::Later(words) | Self::Never(words) => words,
        }
    }
}

/// A client of the hub, with the cache that it downloads into.
pub struct Hub {
    endpoint: String,
    token: Option<String>,
    cache: PathBuf,
    agent: ureq::Agent,
    /// A note on the certificates.
    note: Option<String>,
}

/// The hub's description of a revision.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Listed>,
}

#[derive(Deserialize)]
struct Listed {
    rfilename: String,
    size: Option<u64>,
    /// Git's hash of the file.
    #[serde(rename = "blobId")]
    blob: Option<String>,
    lfs: Option<Large>,
}

/// A file that is stored outside git, with LFS.
#[derive(Deserialize)]
struct Large {
    sha256: String,
}

/// True if `HF_HUB_OFFLINE` forbids downloads.
pub fn is_offline() -> bool {
    let offline = variable("HF_HUB_OFFLINE").and_then(|value| value.into_string().ok());
    let offline = offline.unwrap_or_default().to_uppercase();
    ["1", "ON", "YES", "TRUE"].contains(&offline.as_str())
}

impl Hub {
    /// Opens the hub configured by the environment: `HF_ENDPOINT`, `HF_TOKEN` or the token stored
    /// by `hf auth login`, and the cache. `None` with `HF_HUB_OFFLINE`, or if there is no place for
    /// a cache. Fails, with a message, if the certificates cannot be read.
    pub fn of_environment() -> Result<Option<Self>, String> {
        let text = |name: &str| variable(name)?.into_string().ok();
        if is_offline() {
            return Ok(None);
        }
        let Some(cache) = cache(&variable) else {
            return Ok(None);
        };
        let left = text("HF_TOKEN_PATH").map(PathBuf::from);
        let left = left.or_else(|| Some(home(&variable)?.join("token")));
        let left = left.and_then(|path| files::read_to_string(&path).ok());
        let token = text("HF_TOKEN")
            .or(left)
            .map(|token| token.trim().to_owned());
        let (tls, note) = tls::trusted()?;
        let agent = ureq::Agent::config_builder()
            .tls_config(tls)
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(Duration::from_mins(1)))
            .timeout_per_read(Some(Duration::from_secs(30)))
            // `get` follows redirects and decides where the token may be sent.
            .max_redirects(0)
            .http_status_as_error(false)
            .build();
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Ok(Some(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.filter(|token| !token.is_empty()),
            cache,
            agent: agent.into(),
            note,
        }))
    }

    /// Downloads the files of a model that the cache lacks, reporting each to `say`. Fails with a
    /// message that names the fix; the token is masked in all messages.
    pub fn fetch(&self, repository: &Repository, say: &mut dyn FnMut(&str)) -> Result<(), String> {
        self.masked(say, |say| {
            let Listing { sha, siblings } = self.list(repository, say)?;
            self.store(repository, &sha, wanted(siblings), say)
        })
    }

    /// Downloads the data files of a part of a dataset, like [`Hub::fetch`].
    pub fn fetch_dataset(
        &self,
        repository: &Repository,
        part: DatasetPart<'_>,
        say: &mut dyn FnMut(&str),
    ) -> Result<(), String> {
        self.masked(say, |say| {
            let Listing { sha, siblings } = self.list(repository, say)?;
            let names: Vec<String> = siblings.iter().map(|file| file.rfilename.clone()).collect();
            let (readme, data): (Vec<_>, Vec<_>) = siblings
                .into_iter()
                .partition(|file| file.rfilename == README);
            self.store(repository, &sha, readme, say)?;
            let folder = repository.folder(&self.cache).join("snapshots").join(&sha);
            let listing = folder.join(LISTING);
            fs::create_dir_all(&folder)
                .and_then(|()| fs::write(&listing, names.join("\n")))
                .map_err(|error| format!("{}: {error}", listing.display()))?;
            let readme = files::read_to_string(&folder.join(README)).ok();
            let chosen = choose(&names, readme.as_deref(), part).map_err(|unchosen| {
                format!(
                    "hf://{}{}: {}",
                    repository.prefix(),
                    repository.name,
                    unchosen.words()
                )
            })?;
            let data = data.into_iter();
            let data = data
                .filter(|file| chosen.contains(&file.rfilename))
                .collect();
            self.store(repository, &sha, data, say)
        })
    }

    /// Hides the token in messages and errors.
    fn masked(
        &self,
        say: &mut dyn FnMut(&str),
        work: impl FnOnce(&mut dyn FnMut(&str)) -> Result<(), String>,
    ) -> Result<(), String> {
        let token = self.token.as_deref().map(|token| ("HF_TOKEN", token));
        let mask = Mask::new(token);
        let done = work(&mut |words| say(&mask.hide(words)));
        done.map_err(|words| mask.hide(&words))
    }

    /// Returns the hub's description of a revision.
    fn list(&self, repository: &Repository, say: &mut dyn FnMut(&str)) -> Result<Listing, String> {
        let Repository { name, revision, .. } = repository;
        if let Some(problem) = repository.problem() {
            let prefix = repository.prefix();
            return Err(format!("hf://{prefix}{name}@{revision}: {problem}"));
        }
        if let Some(note) = &self.note {
            say(note);
        }
        let kind = if repository.is_dataset {
            "datasets"
        } else {
            "models"
        };
        let url = format!(
            "{}/api/{kind}/{name}/revision/{}?blobs=true",
            self.endpoint,
            encoded(revision).replace('/', "%2F")
        );
        let mut response = self.get(&url, 0).map_err(Refusal::words)?;
        let listing = response.body_mut().read_to_vec();
        let listing = listing.map_err(|error| format!("{url}: {error}"))?;
        let listing: Listing = serde_json::from_slice(&listing)
            .map_err(|error| format!("{url}: invalid list of files: {error}"))?;
        let sha = &listing.sha;
        if sha.is_empty() || !sha.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(format!("{url}: `{sha}` is not a commit hash"));
        }
        Ok(listing)
    }

    /// Downloads the files that the cache lacks, and links to them from the folder of the revision.
    fn store(
        &self,
        repository: &Repository,
        sha: &str,
        files: Vec<Listed>,
        say: &mut dyn FnMut(&str),
    ) -> Result<(), String> {
        let Repository { name, revision, .. } = repository;
        let folder = repository.folder(&self.cache);
        let io = |path: &Path| {
            let path = path.display().to_string();
            move |error: io::Error| format!("{path}: {error}")
        };
        let mut links = Vec::new();
        for file in files {
            let url = format!(
                "{}/{}{name}/resolve/{sha}/{}",
                self.endpoint,
                repository.prefix(),
                encoded(&file.rfilename)
            );
            let blob = self.blob(&folder, &url, &file, &mut || {
                let size = file.size.map_or_else(String::new, |bytes| {
                    format!(" ({:.1} MB)", bytes as f64 / 1e6)
                });
                say(&format!("fetching {name}: {}{size}", file.rfilename));
            })?;
            links.push((file.rfilename, blob));
        }
        let snapshot = folder.join("snapshots").join(sha);
        links.sort_by_key(|(name, _)| is_weights(name));
        for (name, blob) in links {
            let link = snapshot.join(&name);
            let up = "../".repeat(2 + name.matches('/').count());
            let parent = link.parent().expect("a file in a folder");
            fs::create_dir_all(parent).map_err(io(parent))?;
            match std::os::unix::fs::symlink(format!("{up}blobs/{blob}"), &link) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(io(&link)(error));
                }
                _ => {}
            }
        }
        if *revision != sha {
            let named = folder.join("refs").join(revision);
            let parent = named.parent().expect("a file in a folder");
            fs::create_dir_all(parent).map_err(io(parent))?;
            fs::write(&named, sha).map_err(io(&named))?;
        }
        Ok(())
    }

    /// Ensures that the content of a file is in `folder`, and returns the name of its blob; `begin`
    /// is called before a download.
    fn blob(
        &self,
        folder: &Path,
        url: &str,
        file: &Listed,
        begin: &mut dyn FnMut(),
    ) -> Result<String, String> {
        let large = file.lfs.as_ref().map(|large| large.sha256.clone());
        let Some(blob) = large.or_else(|| file.blob.clone()) else {
            return Err(format!("{url}: the hub lists no hash for this file"));
        };
        if !stays_inside(&file.rfilename) {
            return Err(format!(
                "{url}: `{}` is not a valid file name",
                file.rfilename
            ));
        }
        let length = if file.lfs.is_some() { 64 } else { 40 };
        if blob.len() != length || !blob.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(format!("{url}: `{blob}` is not a valid file hash"));
        }
        let blobs = folder.join("blobs");
        let at = blobs.join(&blob);
        if at.is_file() {
            return Ok(blob);
        }
        let locks = self.cache.join(".locks");
        let locks = locks.join(folder.file_name().unwrap_or_default());
        let locked = || {
            fs::create_dir_all(&blobs)?;
            fs::create_dir_all(&locks)?;
            let lock = File::create(locks.join(format!("{blob}.lock")))?;
            lock.lock()?;
            Ok(lock)
        };
        let _lock = locked().map_err(|error: io::Error| format!("{}: {error}", at.display()))?;
        // Another process may have downloaded it in the meantime.
        if !at.is_file() {
            begin();
            self.file(url, &at, file)?;
        }
        Ok(blob)
    }

    /// Requests `url` from byte `from` on and follows redirects. The token is sent only to the
    /// origin of the endpoint, not to another host, port or scheme.
    fn get(&self, url: &str, from: u64) -> Result<ureq::http::Response<ureq::Body>, Refusal> {
        let invalid = |url: &str, problem: &dyn Display| {
            Refusal::Never(format!("{url}: invalid URL: {problem}"))
        };
        let mut at = Url::parse(url).map_err(|error| invalid(url, &error))?;
        let home = at.origin();
        let mut redirects = 0;
        let response = loop {
            // A compressed body could not be resumed.
            let mut request = self
                .agent
                .get(at.as_str())
                .header("Accept-Encoding", "identity");
            if let Some(token) = &self.token
                && at.origin() == home
            {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            if from > 0 {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let response = request.call().map_err(|error| {
                Refusal::Later(format!(
                    "{url}: {error}; without a network, only repositories in the Hugging Face cache can be used: run `hf download` on \
                     another machine and copy its cache to this one"
                ))
            })?;
            let location = response.headers().get("location");
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                break response;
            }
            let Some(location) = location.and_then(|location| location.to_str().ok()) else {
                break response;
            };
            redirects += 1;
            if redirects > REDIRECTS_MAX {
                return Err(Refusal::Never(format!(
                    "{url}: more than {REDIRECTS_MAX} redirects"
                )));
            }
            let next = at
                .join(location)
                .map_err(|error| invalid(location, &error))?;
            if at.scheme() == "https" && next.scheme() != "https" {
                return Err(Refusal::Never(format!(
                    "{url}: refusing the redirect to `{}`, which is not encrypted",
                    next
                )));
            }
            at = next;
        };
        match response.status().as_u16() {
            200..=299 => Ok(response),
            401 | 403 => {
                let whom = match self.token {
                    Some(_) => "for this token",
                    None => "without a token",
                };
                Err(Refusal::Never(format!(
                    "{url}: access denied {whom}; check the name, whether you have accepted the repository's \
                     license, and whether HF_TOKEN is set"
                )))
            }
            404 => Err(Refusal::Never(format!(
                "{url}: not found on the hub; check the name and the revision"
            ))),
            status => Err(Refusal::Later(format!(
                "{url}: the hub returned HTTP {status}; try again later"
            ))),
        }
    }

    /// Downloads a file to `at`, resuming an earlier partial download.
    fn file(&self, url: &str, at: &Path, listed: &Listed) -> Result<(), String> {
        let mut growing = at.as_os_str().to_owned();
        growing.push(".incomplete");
        let growing = PathBuf::from(growing);
        let Some(size) = listed.size else {
            return Err(format!("{url}: the hub lists no size for this file"));
        };
        let local = |error: io::Error| format!("{}: {error}", growing.display());
        let mut last = String::new();
        for number in 0..TRIES {
            if number > 0 {
                thread::sleep(WAIT * (1 << (number - 1)));
            }
            let there = match fs::symlink_metadata(&growing) {
                Ok(metadata) if !metadata.is_file() => {
                    return Err(format!(
                        "{} is not a regular file; remove it",
                        growing.display()
                    ));
                }
                found => found.map_or(0, |metadata| metadata.len()),
            };
            if there < size {
                let mut response = match self.get(url, there) {
                    Ok(response) => response,
                    Err(Refusal::Later(words)) => {
                        last = words;
                        continue;
                    }
                    Err(Refusal::Never(words)) => return Err(words),
                };
                let goes_on = response.status().as_u16() == 206;
                let mut file = OpenOptions::new()
                    .create(true)
                    .write(true)
                    .append(goes_on)
                    .truncate(!goes_on)
                    .open(&growing)
                    .map_err(local)?;
                let left = size - if goes_on { there } else { 0 };
                // One more byte detects a body that is too long.
                let mut body = response.body_mut().as_reader().take(left + 1);
                let cut_off = copy(&mut body, &mut file);
                file.sync_all().map_err(local)?;
                match cut_off.map_err(local)? {
                    None => {}
                    Some(why) => {
                        last = why;
                        continue;
                    }
                }
            }
            let there = fs::metadata(&growing).map_err(local)?.len();
            if there < size {
                "the connection was interrupted".clone_into(&mut last);
                continue;
            }
            if there == size && at.ends_with(hash(&growing, listed).map_err(local)?) {
                return fs::rename(&growing, at).map_err(local);
            }
            fs::remove_file(&growing).map_err(local)?;
            if there > size {
                return Err(format!(
                    "{url}: the download is larger than the {size} bytes that the hub lists and was discarded; try again later"
                ));
            }
            "checksum mismatch".clone_into(&mut last);
        }
        Err(format!(
            "{url}: download failed after {TRIES} attempts: {last}; run the command again to resume it"
        ))
    }
}

/// Appends a body to a file. Returns the reason if the body was interrupted; an error is one of the
/// file.
fn copy(from: &mut impl Read, to: &mut File) -> io::Result<Option<String>> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(None),
            Ok(count) => to.write_all(&buffer[..count])?,
            Err(error) => return Ok(Some(error.to_string())),
        }
    }
}

/// Selects the files that models may need here: no weights for other frameworks, and each weight
/// only once.
fn wanted(mut files: Vec<Listed>) -> Vec<Listed> {
    let has_safetensors = files
        .iter()
        .any(|file| has_ending(&file.rfilename, "safetensors"));
    files.retain(|file| {
        let name = file.rfilename.as_str();
        // An index belongs to its files.
        let of = name.strip_suffix(".index.json").unwrap_or(name);
        let foreign = ["h5", "msgpack", "ot", "onnx", "gguf", "tflite"];
        !foreign.iter().any(|ending| has_ending(of, ending))
            && (has_ending(of, "safetensors") || !has_safetensors || !is_weights(of))
    });
    files
}

/// Percent-encodes a path for use in a URL.
fn encoded(path: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-_.~".contains(&byte);
    path.bytes()
        .map(|byte| match byte {
            byte if plain(byte) => char::from(byte).to_string(),
            byte => format!("%{byte:02X}"),
        })
        .collect()
}

/// Returns the hash of a file's content, in hex, of the kind that the hub lists: SHA-256, or git's
/// blob hash.
fn hash(path: &Path, listed: &Listed) -> io::Result<String> {
    let mut file = File::open(path)?;
    if listed.lfs.is_some() {
        return digest(Sha256::new(), &mut file);
    }
    let git = Sha1::new_with_prefix(format!("blob {}\0", file.metadata()?.len()));
    digest(git, &mut file)
}

/// Returns the hash, in hex, of the data `hasher` has seen followed by the rest of `file`.
fn digest<D: Digest>(mut hasher: D, file: &mut File) -> io::Result<String> {
    let mut piece = vec![0; 1 << 16];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hex::encode(hasher.finalize())),
            bytes => hasher.update(&piece[..bytes]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_files_have_the_hash_that_git_gives_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "what is up, doc?").unwrap();
        let listed = |lfs| Listed {
            rfilename: String::new(),
            size: None,
            blob: None,
            lfs,
        };
        // The example of the book "Pro Git".
        let git = "bd9dbf5aae1a3862dd1526723246b20206e5fc37";
        assert_eq!(hash(&path, &listed(None)).unwrap(), git);
        let sha256 = String::new();
        let large = hash(&path, &listed(Some(Large { sha256 }))).unwrap();
        assert_eq!(large.len(), 64);
    }
}
