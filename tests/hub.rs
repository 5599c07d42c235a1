//! Weights from the Hugging Face hub, simulated on this machine.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

use ovchat_data::store::digest;
use serde_json::json;
use sha1::{Digest as _, Sha1};
use tiny_http::{Header, Response, Server};

use crate::scene::{CommandOutput, ROOT, Scene, said};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub with the sample policy as `org/tiny`, and a log of the requests: paths with their ranges.
struct Hub {
    endpoint: String,
    asked: Arc<Mutex<Vec<String>>>,
    server: Arc<Server>,
}

impl Hub {
    fn new() -> Self {
        Self::with_changed(|_, _| {})
    }

    /// Starts a hub whose files differ from its listing.
    fn with_changed(change: impl Fn(&str, &mut Vec<u8>)) -> Self {
        let mut files: HashMap<String, Vec<u8>> = HashMap::new();
        for entry in fs::read_dir(format!("{ROOT}/data-samples/policy")).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            files.insert(name, fs::read(&path).unwrap());
        }
        files.insert("pytorch_model.bin".to_owned(), b"for others".to_vec());
        let index = json!({ "weight_map": { "a": "pytorch_model-00001-of-00002.bin" } });
        let name = "pytorch_model.bin.index.json".to_owned();
        files.insert(name, index.to_string().into_bytes());
        let listed = files.iter().map(|(name, bytes)| {
            let hash = digest(bytes);
            let mut file =
                json!({ "rfilename": name, "size": bytes.len(), "blobId": git_hash(bytes) });
            if name == "model.safetensors" {
                file["lfs"] = json!({ "sha256": hash, "size": bytes.len() });
            }
            file
        });
        let listing = json!({ "sha": COMMIT, "siblings": listed.collect::<Vec<_>>() }).to_string();
        for (name, bytes) in &mut files {
            change(name, bytes);
        }
        let server = Arc::new(Server::http("127.0.0.1:0").unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let hub = Self {
            endpoint: format!("http://{}", server.server_addr()),
            asked: Arc::clone(&asked),
            server: Arc::clone(&server),
        };
        thread::spawn(move || {
            for request in server.incoming_requests() {
                let header = |name: &'static str| {
                    let mut headers = request.headers().iter();
                    let found = headers.find(|header| header.field.equiv(name));
                    found.map(|header| header.value.to_string())
                };
                let url = request.url().to_owned();
                let range = header("Range");
                let token = header("Authorization").unwrap_or_default();
                let note = format!("{url} {}", range.as_deref().unwrap_or_default());
                asked.lock().unwrap().push(note.trim_end().to_owned());
                let name = url.strip_prefix(&format!("/org/tiny/resolve/{COMMIT}/"));
                let answer = if token != "Bearer secret" {
                    Response::from_string("who are you?").with_status_code(401)
                } else if url == "/api/models/org/tiny/revision/main?blobs=true" {
                    // The repository was renamed.
                    let there = Header::from_bytes("Location", "/api/models/org/new/revision/main");
                    Response::from_string("there")
                        .with_status_code(307)
                        .with_header(there.unwrap())
                } else if url == "/api/models/org/new/revision/main" {
                    Response::from_string(&*listing)
                } else if let Some(bytes) = name.and_then(|name| files.get(name)) {
                    let from = range.and_then(|range| {
                        let from = range.strip_prefix("bytes=")?.strip_suffix('-')?;
                        from.parse::<usize>().ok()
                    });
                    let status = if from.is_some() { 206 } else { 200 };
                    let rest = bytes[from.unwrap_or(0)..].to_vec();
                    let kind = Header::from_bytes("Content-Type", "application/octet-stream");
                    Response::from_data(rest)
                        .with_status_code(status)
                        .with_header(kind.unwrap())
                } else {
                    Response::from_string("what?").with_status_code(404)
                };
                request.respond(answer).ok();
            }
        });
        hub
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().drain(..).collect()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.server.unblock();
    }
}

const PIPELINE: &str = "
pipeline: fetched
models:
  policy: { llava_onevision: { weights: 'hf://org/tiny', device: cpu } }
stages:
  prompts: { load_prompts: { from: prompts.json } }
  candidates: { sample: { prompts: prompts, model: policy, count: 1, max_new_tokens: 4 } }
";

/// Returns Git's hash of a file.
fn git_hash(bytes: &[u8]) -> String {
    let mut hasher = Sha1::new();
    hasher.update(format!("blob {}\0", bytes.len()));
    hasher.update(bytes);
    hex::encode(hasher.finalize())
}

/// Runs a command with the hub's cache in `hub`.
fn says(scene: &Scene, arguments: &[&str], more: &[(&str, &str)]) -> CommandOutput {
    let mut command: Command = scene.command(arguments);
    command
        .env("HF_HUB_CACHE", scene.path("hub"))
        .env("HF_TOKEN", "secret");
    command.envs(more.iter().copied());
    said(command.output().unwrap())
}

#[test]
fn nothing_is_fetched_offline_or_before_a_run() {
    let hub = Hub::new();
    let scene = Scene::new();
    scene.prompts(2).write("p.yaml", PIPELINE);
    let endpoint = ("HF_ENDPOINT", hub.endpoint.as_str());
    let offline = [endpoint, ("HF_HUB_OFFLINE", "1")];

    let run = says(&scene, &["run", "p.yaml"], &offline);
    assert_eq!(run.code, Some(2), "{}", run.err);
    let checked = says(&scene, &["check", "p.yaml"], &offline);
    assert_eq!(checked.code, Some(2), "{}", checked.err);
    let advice = "unset HF_HUB_OFFLINE";
    assert!(checked.err.contains(advice), "{}", checked.err);

    let checked = says(&scene, &["check", "p.yaml"], &[endpoint]);
    let told = "`pipeline run` downloads it";
    assert!(checked.err.contains(told), "{}", checked.err);
    assert_eq!(checked.code, Some(0), "{}", checked.err);
    let checked = says(&scene, &["check", "p.yaml", "--json"], &[endpoint]);
    let checked: serde_json::Value = serde_json::from_str(&checked.out).unwrap();
    assert_eq!(checked["ok"], true);
    assert_eq!(checked["complaints"][0]["severity"], "note", "{checked}");

    let planned = says(&scene, &["plan", "p.yaml"], &[endpoint]);
    assert_eq!(planned.code, Some(2), "{}", planned.err);
    let told = "is not in the Hugging Face cache";
    assert!(planned.err.contains(told), "{}", planned.err);
    assert!(hub.asked().is_empty());
}

#[test]
fn a_token_that_the_hub_refuses_is_named_and_not_shown() {
    let hub = Hub::new();
    let scene = Scene::new();
    scene.prompts(2).write("p.yaml", PIPELINE);
    let more = [("HF_ENDPOINT", &*hub.endpoint), ("HF_TOKEN", "wrong")];
    let refused = says(&scene, &["run", "p.yaml"], &more);
    assert_eq!(refused.code, Some(1));
    assert!(refused.err.contains("HF_TOKEN"), "{}", refused.err);
    assert!(!refused.err.contains("wrong"), "{}", refused.err);
}

#[test]
fn weights_are_fetched_once_and_used_without_a_network_after_that() {
    let hub = Hub::new();
    let scene = Scene::new();
    scene.prompts(2).write("p.yaml", PIPELINE);
    let endpoint = ("HF_ENDPOINT", hub.endpoint.as_str());

    // An interrupted download resumes; a different file starts over.
    let weights = fs::read(format!("{ROOT}/data-samples/policy/model.safetensors")).unwrap();
    let blobs = scene.path("hub/models--org--tiny/blobs");
    fs::create_dir_all(&blobs).unwrap();
    let growing = blobs.join(format!("{}.incomplete", digest(&weights)));
    fs::write(&growing, &weights[..1000]).unwrap();
    let fetched = says(&scene, &["run", "p.yaml"], &[endpoint]);
    assert_eq!(fetched.code, Some(0), "{}", fetched.err);
    let told = "fetching org/tiny: model.safetensors";
    assert!(fetched.err.contains(told), "{}", fetched.err);
    let asked = hub.asked();
    let whole = format!("/org/tiny/resolve/{COMMIT}/model.safetensors");
    assert!(asked.contains(&format!("{whole} bytes=1000-")), "{asked:?}");
    assert!(
        !asked.iter().any(|path| path.contains("pytorch_model")),
        "{asked:?}"
    );
    let snapshot = scene.path("hub/models--org--tiny/snapshots").join(COMMIT);
    assert!(fs::read(snapshot.join("model.safetensors")).unwrap() == weights);
    let link = fs::read_link(snapshot.join("config.json")).unwrap();
    assert!(link.starts_with("../../blobs"), "{link:?}");

    // The hub is offline.
    drop(hub);
    let again = says(&scene, &["run", "p.yaml", "--run", "runs/again"], &[]);
    assert_eq!(again.code, Some(0), "{}", again.err);

    // Other bytes of the same length.
    let other = Hub::new();
    fs::remove_dir_all(scene.path("hub")).unwrap();
    fs::create_dir_all(&blobs).unwrap();
    fs::write(&growing, vec![0; weights.len()]).unwrap();
    let endpoint = ("HF_ENDPOINT", other.endpoint.as_str());
    let mended = says(
        &scene,
        &["run", "p.yaml", "--run", "runs/third"],
        &[endpoint],
    );
    assert_eq!(mended.code, Some(0), "{}", mended.err);
    assert!(other.asked().contains(&whole));
    assert!(fs::read(snapshot.join("model.safetensors")).unwrap() == weights);
    assert!(!Path::new(&growing).exists());
}

/// Starts a server that answers each request by `answer`, which gets its path and token.
fn serve(
    answer: impl Fn(&str, &str) -> Response<std::io::Cursor<Vec<u8>>> + Send + 'static,
) -> (String, Arc<Server>) {
    let server = Arc::new(Server::http("127.0.0.1:0").unwrap());
    let address = format!("http://{}", server.server_addr());
    let serving = Arc::clone(&server);
    thread::spawn(move || {
        for request in serving.incoming_requests() {
            let mut headers = request.headers().iter();
            let token = headers.find(|header| header.field.equiv("Authorization"));
            let token = token.map_or_else(String::new, |token| token.value.to_string());
            let answered = answer(request.url(), &token);
            request.respond(answered).ok();
        }
    });
    (address, server)
}

#[test]
fn the_token_stays_with_the_hub_and_is_in_no_message() {
    let scene = Scene::new();
    scene.prompts(1).write("p.yaml", PIPELINE);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&seen);
    let (elsewhere, behind) = serve(move |path, token| {
        noted.lock().unwrap().push(format!("{path} {token}"));
        // Echoes the token.
        Response::from_string(format!("{{ \"sha\": 1, \"you\": \"{token}\" }}"))
    });
    // Another port of the same machine.
    let (endpoint, hub) = serve(move |path, token| {
        assert_eq!(token, "Bearer hf_a_secret_token", "{path}");
        let there = format!("{elsewhere}/listing");
        Response::from_string("there")
            .with_status_code(302)
            .with_header(Header::from_bytes("Location", there).unwrap())
    });
    let token = ("HF_TOKEN", "hf_a_secret_token");
    let redirected = says(
        &scene,
        &["run", "p.yaml"],
        &[("HF_ENDPOINT", &endpoint), token],
    );
    assert_eq!(redirected.code, Some(1), "{}", redirected.err);
    assert_eq!(*seen.lock().unwrap(), ["/listing "]);

    let (endpoint, echo) = serve(|_, token| {
        let to = format!("/{token}?again").replace(' ', "%20");
        Response::from_string(token)
            .with_status_code(302)
            .with_header(Header::from_bytes("Location", to).unwrap())
    });
    let endless = says(
        &scene,
        &["run", "p.yaml"],
        &[("HF_ENDPOINT", &endpoint), token],
    );
    assert!(
        endless.err.contains("more than 10 redirects"),
        "{}",
        endless.err
    );
    let (endpoint, broken) = serve(|_, token| {
        Response::from_string(format!("{{ \"sha\": \"{token}\", \"siblings\": [] }}"))
    });
    let echoed = says(
        &scene,
        &["run", "p.yaml"],
        &[("HF_ENDPOINT", &endpoint), token],
    );
    assert_eq!(echoed.code, Some(1));
    assert!(echoed.err.contains("${env:HF_TOKEN}"), "{}", echoed.err);
    for said in [redirected, endless, echoed] {
        assert!(!said.err.contains("hf_a_secret_token"), "{}", said.err);
    }
    for server in [behind, hub, echo, broken] {
        server.unblock();
    }
}

#[test]
fn files_that_are_not_as_listed_are_refused_and_do_not_stay() {
    let longer = |name: &str, bytes: &mut Vec<u8>| {
        if name == "config.json" {
            bytes.extend(vec![b' '; 1 << 20]);
        }
    };
    let other = |name: &str, bytes: &mut Vec<u8>| {
        if name == "config.json" {
            let last = bytes.len() - 1;
            bytes[last] = b' ';
        }
    };
    let scene = Scene::new();
    scene.prompts(2).write("p.yaml", PIPELINE);
    let blobs = scene.path("hub/models--org--tiny/blobs");
    let config = fs::read(format!("{ROOT}/data-samples/policy/config.json")).unwrap();
    let kept = |name: &str| blobs.join(name).exists();
    let hub = Hub::with_changed(longer);
    let said = says(
        &scene,
        &["run", "p.yaml"],
        &[("HF_ENDPOINT", &hub.endpoint)],
    );
    assert_ne!(said.code, Some(0));
    assert!(
        said.err
            .contains("config.json: the download is larger than the"),
        "{}",
        said.err
    );
    let blob = git_hash(&config);
    assert!(!kept(&blob) && !kept(&format!("{blob}.incomplete")));

    let hub = Hub::with_changed(other);
    let said = says(
        &scene,
        &["run", "p.yaml"],
        &[("HF_ENDPOINT", &hub.endpoint)],
    );
    assert_ne!(said.code, Some(0));
    let words = "config.json: download failed after 5 attempts: checksum mismatch";
    assert!(said.err.contains(words), "{}", said.err);
    assert!(!kept(&blob));
}
