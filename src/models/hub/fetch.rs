//! Repositories of the hub are fetched into its cache, laid out as `huggingface_hub` lays it out
//! (`file_download.py`): files by content in `blobs`, and in `snapshots/<commit>` links to them by name.
//!
//! A file is whole before it has its name: it grows as `<name>.incomplete` up to the size that the hub
//! lists, goes on where it was cut off, and is compared with the hub's SHA-256 or, for one that lies in
//! git, with git's hash. Who fetches it holds the lock that
//! `huggingface_hub` takes, too. The links come last, those to the weights behind all others: where there
//! are weights, there is everything.

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
use super::{Repository, cache, has_ending, home, is_weights, variable};
use ovchat_io::files;
use ovchat_io::mask::Mask;

/// How often a file is gone on with that was cut off, and how long to wait before the second time; twice
/// as long before each other.
const TRIES: u32 = 5;
const WAIT: Duration = Duration::from_secs(1);

/// The most redirects that are followed for one file.
const REDIRECTS_MAX: u32 = 10;

/// Why nothing came.
enum Refusal {
    /// It may come later.
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

/// The hub, and where what comes from it lies.
pub struct Hub {
    endpoint: String,
    token: Option<String>,
    cache: PathBuf,
    agent: ureq::Agent,
    /// What somebody should know of the certificates, in words.
    note: Option<String>,
}

/// What the hub says of a revision.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Listed>,
}

#[derive(Deserialize)]
struct Listed {
    rfilename: String,
    size: Option<u64>,
    /// Git's hash of it.
    #[serde(rename = "blobId")]
    blob: Option<String>,
    lfs: Option<Large>,
}

/// A file that does not lie in git.
#[derive(Deserialize)]
struct Large {
    sha256: String,
}

/// True if `HF_HUB_OFFLINE` forbids to fetch anything.
pub fn is_offline() -> bool {
    let offline = variable("HF_HUB_OFFLINE").and_then(|value| value.into_string().ok());
    let offline = offline.unwrap_or_default().to_uppercase();
    ["1", "ON", "YES", "TRUE"].contains(&offline.as_str())
}

impl Hub {
    /// The hub as the environment has it: `HF_ENDPOINT`, `HF_TOKEN` or the token that `hf auth login` left,
    /// and the cache. `None` with `HF_HUB_OFFLINE`, and where there is no place for a cache.
    /// Fails, in words, where its certificates can't be read.
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
            // Followed by `get`, which knows where the token may go.
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

    /// Fetches what the cache does not have of a repository, and tells `say` of each file. Returns its
    /// folder; fails in words that say the way out, without the token if the hub repeats it.
    pub fn fetch(
        &self,
        repository: &Repository,
        say: &mut dyn FnMut(&str),
    ) -> Result<PathBuf, String> {
        let token = self.token.as_deref().map(|token| ("HF_TOKEN", token));
        let mask = Mask::new(token);
        let fetched = self.fetch_all(repository, &mut |words| say(&mask.hide(words)));
        fetched.map_err(|words| mask.hide(&words))
    }

    fn fetch_all(
        &self,
        repository: &Repository,
        say: &mut dyn FnMut(&str),
    ) -> Result<PathBuf, String> {
        let Repository { name, revision } = repository;
        if let Some(problem) = repository.problem() {
            return Err(format!("hf://{name}@{revision}: {problem}"));
        }
        if let Some(note) = &self.note {
            say(note);
        }
        let url = format!(
            "{}/api/models/{name}/revision/{}?blobs=true",
            self.endpoint,
            encoded(revision).replace('/', "%2F")
        );
        let mut response = self.get(&url, 0).map_err(Refusal::words)?;
        let listing = response.body_mut().read_to_vec();
        let listing = listing.map_err(|error| format!("{url}: {error}"))?;
        let Listing { sha, siblings } = serde_json::from_slice(&listing)
            .map_err(|error| format!("{url}: this is no list of files: {error}"))?;
        if sha.is_empty() || !sha.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(format!("{url}: `{sha}` is no commit"));
        }
        let folder = repository.folder(&self.cache);
        let io = |path: &Path| {
            let path = path.display().to_string();
            move |error: io::Error| format!("{path}: {error}")
        };
        let mut links = Vec::new();
        for file in wanted(siblings) {
            let url = format!(
                "{}/{name}/resolve/{sha}/{}",
                self.endpoint,
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
        let snapshot = folder.join("snapshots").join(&sha);
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
            fs::write(&named, &sha).map_err(io(&named))?;
        }
        Ok(snapshot)
    }

    /// Sees to it that the content of a file is in `folder`; `begin` is called before it is fetched. Returns
    /// what its content is called.
    fn blob(
        &self,
        folder: &Path,
        url: &str,
        file: &Listed,
        begin: &mut dyn FnMut(),
    ) -> Result<String, String> {
        let large = file.lfs.as_ref().map(|large| large.sha256.clone());
        let Some(blob) = large.or_else(|| file.blob.clone()) else {
            return Err(format!("{url}: the hub gives no hash of it"));
        };
        let safe = |part: &str| !part.is_empty() && part != ".." && part != ".";
        if !file.rfilename.split('/').all(safe) {
            return Err(format!("{url}: `{}` is no name of a file", file.rfilename));
        }
        let length = if file.lfs.is_some() { 64 } else { 40 };
        if blob.len() != length || !blob.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(format!("{url}: `{blob}` is no hash of a file"));
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
        // Another program may have been at it.
        if !at.is_file() {
            begin();
            self.file(url, &at, file)?;
        }
        Ok(blob)
    }

    /// Requests `url` from a byte on and follows its redirects. The token goes to the origin of the endpoint
    /// only: not to another host, port or scheme.
    fn get(&self, url: &str, from: u64) -> Result<ureq::http::Response<ureq::Body>, Refusal> {
        let invalid = |url: &str, problem: &dyn Display| {
            Refusal::Never(format!("{url}: not a valid address: {problem}"))
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
                    "{url}: {error}; what is in the hub's cache is used without a network, and `hf download` on \
                     another machine fills a cache that can be copied here"
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
                    "{url}: the hub redirects more than {REDIRECTS_MAX} times"
                )));
            }
            let next = at
                .join(location)
                .map_err(|error| invalid(location, &error))?;
            if at.scheme() == "https" && next.scheme() != "https" {
                return Err(Refusal::Never(format!(
                    "{url}: the hub redirects to `{}`, which is not encrypted",
                    next
                )));
            }
            at = next;
        };
        match response.status().as_u16() {
            200..=299 => Ok(response),
            401 | 403 => {
                let whom = match self.token {
                    Some(_) => "the owner of this token",
                    None => "strangers",
                };
                Err(Refusal::Never(format!(
                    "{url}: the hub does not give it to {whom}; look whether the name is right, whether its \
                     license is to be accepted, and whether HF_TOKEN is set"
                )))
            }
            404 => Err(Refusal::Never(format!(
                "{url}: the hub does not have it; look at the name and the revision"
            ))),
            status => Err(Refusal::Later(format!(
                "{url}: the hub says {status}; try again later"
            ))),
        }
    }

    /// Fetches a file to `at`; what was fetched of it before is gone on with.
    fn file(&self, url: &str, at: &Path, listed: &Listed) -> Result<(), String> {
        let mut growing = at.as_os_str().to_owned();
        growing.push(".incomplete");
        let growing = PathBuf::from(growing);
        let Some(size) = listed.size else {
            return Err(format!("{url}: the hub gives no size of it"));
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
                // A byte more tells that there is more.
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
                "it was cut off".clone_into(&mut last);
                continue;
            }
            if there == size && at.ends_with(hash(&growing, listed).map_err(local)?) {
                return fs::rename(&growing, at).map_err(local);
            }
            fs::remove_file(&growing).map_err(local)?;
            if there > size {
                return Err(format!(
                    "{url}: more comes than the {size} bytes that the hub lists; nothing of it was kept, try again later"
                ));
            }
            "it is not what the hub says that it is".clone_into(&mut last);
        }
        Err(format!(
            "{url}: after {TRIES} tries it is not whole: {last}; run again to go on with it"
        ))
    }
}

/// Copies a body to the end of a file; gives the reason why it was cut off, if it was. An error is the
/// file's.
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

/// The files that a model here may need: no weights for other programs, and each weight once.
fn wanted(mut files: Vec<Listed>) -> Vec<Listed> {
    let has_safetensors = files
        .iter()
        .any(|file| has_ending(&file.rfilename, "safetensors"));
    files.retain(|file| {
        let name = file.rfilename.as_str();
        // An index goes with its files.
        let of = name.strip_suffix(".index.json").unwrap_or(name);
        let foreign = ["h5", "msgpack", "ot", "onnx", "gguf", "tflite"];
        !foreign.iter().any(|ending| has_ending(of, ending))
            && (has_ending(of, "safetensors") || !has_safetensors || !is_weights(of))
    });
    files
}

/// Bytes of a path as they stand in an address.
fn encoded(path: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-_.~".contains(&byte);
    path.bytes()
        .map(|byte| match byte {
            byte if plain(byte) => char::from(byte).to_string(),
            byte => format!("%{byte:02X}"),
        })
        .collect()
}

/// The hash of a file's content, in hex, of the kind that the hub lists: SHA-256, or git's for a blob.
fn hash(path: &Path, listed: &Listed) -> io::Result<String> {
    let mut file = File::open(path)?;
    if listed.lfs.is_some() {
        return digest(Sha256::new(), &mut file);
    }
    let git = Sha1::new_with_prefix(format!("blob {}\0", file.metadata()?.len()));
    digest(git, &mut file)
}

/// The hash of what `hasher` has seen and then of all that `file` holds, in hex.
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
        // As in the book "Pro Git".
        let git = "bd9dbf5aae1a3862dd1526723246b20206e5fc37";
        assert_eq!(hash(&path, &listed(None)).unwrap(), git);
        let sha256 = String::new();
        let large = hash(&path, &listed(Some(Large { sha256 }))).unwrap();
        assert_eq!(large.len(), 64);
    }
}
