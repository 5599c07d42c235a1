//! Repositories of the hub are fetched into its cache, laid out as `huggingface_hub` lays it out
//! (`file_download.py`): files by content in `blobs`, and in `snapshots/<commit>` links to them by name.
//!
//! A file is whole before it has its name: it grows as `<name>.incomplete`, goes on where it was cut off,
//! and is compared with the hub's SHA-256 where the hub has one. The links come last, so that a commit is
//! there with all of its files or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{Repository, cache, is_weights, variable};

/// How often a file is gone on with that was cut off.
const TRIES: u32 = 5;

/// The hub, and where what comes from it lies.
pub struct Hub {
    endpoint: String,
    token: Option<String>,
    cache: PathBuf,
    agent: ureq::Agent,
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

impl Hub {
    /// The hub as the environment has it: `HF_ENDPOINT`, `HF_TOKEN` or the token that `hf auth login` left,
    /// and the cache. `None` with `HF_HUB_OFFLINE`, and where there is no place for a cache.
    pub fn of_environment() -> Option<Self> {
        let text = |name: &str| variable(name)?.into_string().ok();
        let offline = text("HF_HUB_OFFLINE").unwrap_or_default().to_uppercase();
        if ["1", "ON", "YES", "TRUE"].contains(&offline.as_str()) {
            return None;
        }
        let cache = cache(&variable)?;
        let left = text("HF_TOKEN_PATH").map(PathBuf::from);
        let left = left.or_else(|| Some(cache.parent()?.join("token")));
        let left = left.and_then(|path| fs::read_to_string(path).ok());
        let token = text("HF_TOKEN")
            .or(left)
            .map(|token| token.trim().to_owned());
        let agent = ureq::Agent::config_builder()
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(Duration::from_mins(1)))
            .http_status_as_error(false)
            .build();
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Some(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.filter(|token| !token.is_empty()),
            cache,
            agent: agent.into(),
        })
    }

    /// Fetches what the cache does not have of a repository, and tells `say` of each file. Returns its
    /// folder; fails in words that say the way out.
    pub fn fetch(
        &self,
        repository: &Repository,
        say: &mut dyn FnMut(&str),
    ) -> Result<PathBuf, String> {
        let Repository { name, revision } = repository;
        let url = format!(
            "{}/api/models/{name}/revision/{}?blobs=true",
            self.endpoint,
            encoded(revision)
        );
        let mut response = self.get(&url, 0)?;
        let listing = response.body_mut().read_to_vec();
        let listing = listing.map_err(|error| format!("{url}: {error}"))?;
        let Listing { sha, siblings } = serde_json::from_slice(&listing)
            .map_err(|error| format!("{url}: this is no list of files: {error}"))?;
        let folder = repository.folder(&self.cache);
        let io = |path: &Path| {
            let path = path.display().to_string();
            move |error: io::Error| format!("{path}: {error}")
        };
        let blobs = folder.join("blobs");
        fs::create_dir_all(&blobs).map_err(io(&blobs))?;
        let mut links = Vec::new();
        for file in wanted(siblings) {
            let own = file.lfs.as_ref().map(|large| large.sha256.clone());
            let Some(blob) = own.or_else(|| file.blob.clone()) else {
                return Err(format!("{url}: `{}` has no hash", file.rfilename));
            };
            let safe = |part: &str| !part.is_empty() && part != ".." && part != ".";
            if !file.rfilename.split('/').all(safe) || blob.contains(['/', '.']) {
                return Err(format!("{url}: `{}` is no name of a file", file.rfilename));
            }
            let at = blobs.join(&blob);
            if !at.is_file() {
                let size = file.size.map_or_else(String::new, |bytes| {
                    format!(" ({:.1} MB)", bytes as f64 / 1e6)
                });
                say(&format!("fetching {name}: {}{size}", file.rfilename));
                let url = format!(
                    "{}/{name}/resolve/{sha}/{}",
                    self.endpoint,
                    encoded(&file.rfilename)
                );
                self.file(&url, &at, &file)?;
            }
            links.push((file.rfilename, blob));
        }
        let snapshot = folder.join("snapshots").join(&sha);
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

    /// Asks for a file, from a byte on.
    fn get(&self, url: &str, from: u64) -> Result<ureq::http::Response<ureq::Body>, String> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        let response = request.call().map_err(|error| {
            format!(
                "{url}: {error}; what is in the hub's cache is used without a network, and `hf download` on \
                 another machine fills a cache that can be copied here"
            )
        })?;
        match response.status().as_u16() {
            200..=299 => Ok(response),
            401 | 403 => Err(format!(
                "{url}: the hub does not give it to {}; look whether the name is right, whether its license is \
                 to be accepted, and whether HF_TOKEN is set",
                if self.token.is_some() {
                    "the owner of this token"
                } else {
                    "strangers"
                }
            )),
            404 => Err(format!(
                "{url}: the hub does not have it; look at the name and the revision"
            )),
            status => Err(format!("{url}: the hub says {status}; try again later")),
        }
    }

    /// Fetches a file to `at`; what was fetched of it before is gone on with.
    fn file(&self, url: &str, at: &Path, listed: &Listed) -> Result<(), String> {
        let mut growing = at.as_os_str().to_owned();
        growing.push(".incomplete");
        let growing = PathBuf::from(growing);
        let local = |error: io::Error| format!("{}: {error}", growing.display());
        let mut last = String::new();
        for _ in 0..TRIES {
            let mut there = fs::metadata(&growing).map_or(0, |metadata| metadata.len());
            if listed.size.is_none_or(|size| there < size) {
                let mut response = self.get(url, there)?;
                let goes_on = response.status().as_u16() == 206;
                let mut file = OpenOptions::new()
                    .create(true)
                    .write(true)
                    .append(goes_on)
                    .truncate(!goes_on)
                    .open(&growing)
                    .map_err(local)?;
                if !goes_on {
                    there = 0;
                }
                let mut body = response.body_mut().as_reader();
                let mut buffer = vec![0; 1 << 20];
                loop {
                    match body.read(&mut buffer) {
                        Ok(0) => break,
                        Ok(count) => {
                            file.write_all(&buffer[..count]).map_err(local)?;
                            there += count as u64;
                        }
                        Err(error) => {
                            last = error.to_string();
                            break;
                        }
                    }
                }
                file.sync_all().map_err(local)?;
            }
            if listed.size.is_some_and(|size| there < size) {
                continue;
            }
            let hash = listed.lfs.as_ref().map(|large| &large.sha256);
            if listed.size.is_none_or(|size| there == size)
                && hash.is_none_or(|hash| sha256(&growing).is_ok_and(|own| own == *hash))
            {
                return fs::rename(&growing, at).map_err(local);
            }
            "it is not what the hub says that it is".clone_into(&mut last);
            fs::remove_file(&growing).map_err(local)?;
        }
        Err(format!(
            "{url}: after {TRIES} tries it is not whole: {last}; run again to go on with it"
        ))
    }
}

/// The files that a model here may need: no weights for other programs, and each weight once.
fn wanted(mut files: Vec<Listed>) -> Vec<Listed> {
    let ends = |file: &Listed, ending: &str| {
        Path::new(&file.rfilename).extension() == Some(ending.as_ref())
    };
    let has_safetensors = files.iter().any(|file| ends(file, "safetensors"));
    files.retain(|file| {
        let foreign = ["h5", "msgpack", "ot", "onnx", "gguf", "tflite"];
        !foreign.iter().any(|ending| ends(file, ending))
            && (ends(file, "safetensors") || !has_safetensors || !is_weights(&file.rfilename))
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

/// SHA-256 of a file, in hex.
fn sha256(path: &Path) -> io::Result<String> {
    let mut hasher = Sha256::new();
    io::copy(&mut File::open(path)?, &mut hasher)?;
    Ok(format!("{:x}", hasher.finalize()))
}
