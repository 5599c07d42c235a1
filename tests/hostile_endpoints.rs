//! Endpoints that reply with impossible values, stall, redirect, or echo the key.

use std::fs;
use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::judges::{by_length, flat, pipeline};
use crate::scene::{CommandOutput, Scene, said};

/// A rule that writes to a connection, given the head of the request and its question.
type Rule = Arc<dyn Fn(&mut dyn Write, &str, &str) + Send + Sync>;

/// An endpoint that writes arbitrary bytes by a rule.
pub struct Endpoint {
    address: String,
    /// The number of connections so far.
    met: Arc<AtomicUsize>,
}

impl Endpoint {
    pub fn new(rule: impl Fn(&mut dyn Write, &str, &str) + Send + Sync + 'static) -> Self {
        Self::behind(Arc::new(rule), |stream, rule| serve(stream, rule))
    }

    fn behind(rule: Rule, serve: impl Fn(TcpStream, &Rule) + Clone + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let met = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&met);
        thread::spawn(move || {
            for stream in listener.incoming() {
                count.fetch_add(1, Ordering::SeqCst);
                let (rule, serve) = (Arc::clone(&rule), serve.clone());
                thread::spawn(move || serve(stream.unwrap(), &rule));
            }
        });
        Self { address, met }
    }

    pub fn judge(&self, more: &str) -> String {
        let url = format!("http://{}/v1", self.address);
        format!("judge: {{ http: {{ base_url: \"{url}\", model: m, wait_s: 0.01, {more} }} }}")
    }
}

/// Serves one request on a connection.
fn serve(stream: impl Read + Write, rule: &Rule) {
    let mut reader = BufReader::new(stream);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        if let Some(number) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = number.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
        head.push_str(&line);
    }
    let mut body = vec![0; length];
    if reader.read_exact(&mut body).is_err() {
        return;
    }
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let content = &body["messages"][0]["content"];
    let question = content.as_array().and_then(|parts| parts.last());
    let question = question.map_or("", |last| last["text"].as_str().unwrap());
    rule(reader.get_mut(), &head, question);
}

/// Returns a complete response.
fn answer(status: u16, headers: &str, text: &str) -> Vec<u8> {
    let length = text.len();
    format!("HTTP/1.1 {status} so\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n{text}")
        .into_bytes()
}

pub fn reply(text: &str, usage: &Value) -> Vec<u8> {
    let message = json!({ "role": "assistant", "content": text });
    answer(
        200,
        "",
        &json!({ "choices": [{ "message": message }], "usage": usage }).to_string(),
    )
}

fn scene(judge: &str, prompts: usize) -> Scene {
    let scene = Scene::new();
    scene.prompts(prompts).write("p.yaml", pipeline(judge));
    scene
}

fn asked(scene: &Scene, query: &str) -> String {
    scene
        .succeeds(&["sql", "scripted", query, "--format", "csv"])
        .out
}

#[test]
fn numbers_that_cannot_be_count_as_nothing() {
    let endpoint = Endpoint::new(|out, _, question| {
        let most: Value = serde_json::from_str("18446744073709551615").unwrap();
        let usage = json!({ "prompt_tokens": most, "completion_tokens": -7 });
        out.write_all(&reply(&by_length(question), &usage)).unwrap();
    });
    let spend = "spend: { limit: 1, per_million_prompt_tokens: 1, per_million_reply_tokens: 1 }";
    let scene = scene(&endpoint.judge(spend), 3);
    let said = scene.succeeds(&["run", "p.yaml"]);
    let note = "reported an implausible 18446744073709551615 `prompt_tokens`";
    assert!(said.err.contains(note), "{}", said.err);
    assert_eq!(
        asked(
            &scene,
            "select sum(prompt_tokens + reply_tokens) as n from calls"
        ),
        "n\n0\n"
    );
    let again = scene.succeeds(&["run", "p.yaml"]);
    assert!(again.err.contains("nothing to do"), "{}", again.err);
}

/// A call log as left by an earlier version that panicked at the first line.
#[test]
fn a_poisoned_journal_is_mended() {
    let endpoint = Endpoint::new(|out, _, question| {
        out.write_all(&reply(&by_length(question), &json!({})))
            .unwrap();
    });
    let scene = scene(&endpoint.judge(""), 3);
    scene.succeeds(&["run", "p.yaml", "--until", "candidates"]);
    let call = |tokens: u64| {
        json!({
            "judge": "judge", "hash": "h", "about": "q", "model": "m", "attempt": 0, "reply": "7",
            "prompt_tokens": tokens, "reply_tokens": tokens, "milliseconds": 1, "at": 1,
        })
    };
    let journal = format!(
        "{}\nnonsense\n{}\n{{\"judge\": \"\u{fc}",
        call(u64::MAX),
        call(3)
    );
    let mut journal = journal.into_bytes();
    journal.pop();
    scene.write("runs/scripted/calls/judge.jsonl", &journal);
    assert_eq!(
        asked(&scene, "select sum(prompt_tokens) as n from calls"),
        "n\n3\n"
    );
    let said = scene.succeeds(&["run", "p.yaml"]);
    let note = "moved 3 corrupt lines to runs/scripted/calls/judge.jsonl.torn";
    assert!(said.err.contains(note), "{}", said.err);
    let torn = fs::read(scene.path("runs/scripted/calls/judge.jsonl.torn")).unwrap();
    assert!(torn.ends_with(b"{\"judge\": \"\xc3\n"), "byte for byte");
    let calls = asked(&scene, "select count(*) > 10 as many from calls");
    assert_eq!(calls, "many\ntrue\n");
}

#[test]
fn the_first_signal_is_heard_whatever_an_endpoint_does() {
    let rules: [(&str, Rule); 4] = [
        (
            "later",
            Arc::new(|out: &mut dyn Write, _: &str, _: &str| {
                out.write_all(&answer(429, "Retry-After: 86400\r\n", "later"))
                    .unwrap();
            }),
        ),
        (
            "never",
            Arc::new(|_: &mut dyn Write, _: &str, _: &str| thread::sleep(Duration::from_mins(5))),
        ),
        (
            "headless",
            Arc::new(|out: &mut dyn Write, _: &str, _: &str| {
                drop(out.write_all(b"HTTP/1.1 200 so\r\n"));
                while out.write_all(b"X-More: 1\r\n").is_ok() {
                    thread::sleep(Duration::from_millis(200));
                }
            }),
        ),
        (
            "slow",
            Arc::new(|out: &mut dyn Write, _: &str, _: &str| {
                drop(out.write_all(b"HTTP/1.1 200 so\r\nContent-Length: 100000\r\n\r\n"));
                while out.write_all(b" ").is_ok() {
                    thread::sleep(Duration::from_millis(100));
                }
            }),
        ),
    ];
    let mut signals = 0;
    for (name, rule) in rules {
        let endpoint = Endpoint::behind(rule, |stream, rule| serve(stream, rule));
        let scene = scene(&endpoint.judge("concurrency_max: 3"), 3);
        for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
            let met = endpoint.met.load(Ordering::SeqCst);
            let mut command = scene.command(&["run", "p.yaml"]);
            let mut child = command.stderr(Stdio::null()).spawn().unwrap();
            while endpoint.met.load(Ordering::SeqCst) == met {
                thread::sleep(Duration::from_millis(10));
            }
            thread::sleep(Duration::from_millis(300));
            let begun = Instant::now();
            let id = child.id().to_string();
            assert!(
                Command::new("kill")
                    .args([signal, &id])
                    .status()
                    .unwrap()
                    .success()
            );
            let ended = child.wait().unwrap();
            let took = begun.elapsed();
            assert_eq!(ended.code(), Some(code), "{name}");
            assert!(took < Duration::from_secs(2), "{name}: {took:?}");
            signals += 1;
        }
    }
    println!("{signals} signals while an endpoint says nothing or never ends");
}

#[test]
fn neither_questions_nor_keys_are_sent_elsewhere() {
    let other = Endpoint::new(|out, _, _| {
        out.write_all(&reply("1 2", &json!({}))).unwrap();
    });
    for status in [301, 302, 303, 307, 308] {
        let to = format!("Location: http://{}/v1/chat/completions\r\n", other.address);
        let endpoint = Endpoint::new(move |out, _, _| {
            out.write_all(&answer(status, &to, "")).unwrap();
        });
        let scene = scene(&endpoint.judge("key_env: OVCHAT_TEST_KEY"), 2);
        let said = with_key(&scene, &["run", "p.yaml"], "sk-of-the-tests");
        assert_eq!(said.code, Some(1), "{}", said.err);
        let words = format!(
            "HTTP {status} redirects to `http //{}/v1",
            other.address.replace(':', " ")
        );
        assert!(flat(&said.err).contains(&words), "{}", said.err);
        assert_eq!(endpoint.met.load(Ordering::SeqCst), 1, "once is enough");
    }
    assert_eq!(other.met.load(Ordering::SeqCst), 0);
}

fn with_key(scene: &Scene, arguments: &[&str], key: &str) -> CommandOutput {
    let mut command = scene.command(arguments);
    command
        .env("OVCHAT_TEST_KEY", key)
        .env("OVCHAT_TEST_PART", "part-of-an-address");
    said(command.output().unwrap())
}

#[test]
fn what_is_too_short_for_a_key_is_refused() {
    let endpoint = Endpoint::new(|_, _, _| {});
    let scene = scene(&endpoint.judge("key_env: OVCHAT_TEST_KEY"), 2);
    for arguments in [["check", "p.yaml"], ["run", "p.yaml"]] {
        let said = with_key(&scene, &arguments, "short");
        assert_eq!(said.code, Some(2), "{}", said.err);
        assert!(said.err.contains("config::short_key"), "{}", said.err);
    }
    assert_eq!(endpoint.met.load(Ordering::SeqCst), 0);
}

/// Returns the key of a request, verbatim and encoded.
fn echo(head: &str) -> String {
    let mut lines = head.lines();
    let line = lines.find_map(|line| {
        line.strip_prefix("authorization: ")
            .or(line.strip_prefix("Authorization: "))
    });
    let key = line.unwrap().strip_prefix("Bearer ").unwrap();
    let (of_user, json) = (STANDARD.encode(format!("user:{key}")), json!(key));
    let address = head.lines().next().unwrap();
    let in_address = key.replace('/', "%2F").replace('+', "%2B");
    format!("{key} {json} {in_address} {of_user} {address}")
}

#[test]
fn a_key_that_an_endpoint_repeats_is_stored_and_shown_nowhere() {
    const KEY: &str = "sk-a/secret+of-the-tests";
    let secrets = [
        KEY.to_owned(),
        KEY.replace('/', "%2F").replace('+', "%2B"),
        // Three letters are four in base64.
        STANDARD.encode(format!("user:{KEY}"))[8..36].to_owned(),
        "part-of-an-address".to_owned(),
    ];
    let clean = |what: &str, text: &str| {
        for secret in &secrets {
            assert!(!text.contains(secret), "{what} has {secret}: {text}");
        }
        assert!(text.contains("${env:OVCHAT_TEST_KEY}"), "{what}: {text}");
    };
    let judge = |endpoint: &Endpoint| {
        let more = "key_env: OVCHAT_TEST_KEY, tries: 2, concurrency_max: 1";
        endpoint
            .judge(more)
            .replace("/v1", "/${env:OVCHAT_TEST_PART}/v1")
    };
    // A rejection: rejects and their error.
    let endpoint = Endpoint::new(|out, head, _| {
        out.write_all(&answer(400, "", &echo(head))).unwrap();
    });
    let scene = scene(&judge(&endpoint), 2);
    let told = with_key(&scene, &["run", "p.yaml"], KEY);
    clean(
        "the complaint",
        &flat(&told.err)
            .replace("$ {env ", "${env:")
            .replace("{env ", "{env:"),
    );
    let all = [
        "run",
        "p.yaml",
        "--set",
        "reject_share_max=1.0",
        "--until",
        "rewards",
        "--log",
        "json",
    ];
    with_key(&scene, &all, KEY);
    clean("rejects", &asked(&scene, "select * from rejects"));
    // Busy or unauthorized.
    for status in [503, 401, 418] {
        let endpoint = Endpoint::new(move |out, head, _| {
            out.write_all(&answer(status, "", &echo(head))).unwrap();
        });
        let scene = self::scene(&judge(&endpoint), 2);
        for log in ["text", "json"] {
            let told = with_key(&scene, &["run", "p.yaml", "--log", log], KEY);
            assert_eq!(told.code, Some(1));
            for secret in &secrets {
                assert!(!told.err.contains(secret), "{status}, {log}: {}", told.err);
            }
            assert!(
                !told.err.contains("a/secret"),
                "{status}, {log}: {}",
                told.err
            );
        }
    }
    // A reply: the call log and the tables.
    let endpoint = Endpoint::new(|out, head, question| {
        let text = format!("{} {}", by_length(question), echo(head));
        out.write_all(&reply(&text, &json!({}))).unwrap();
    });
    let ask = "ask: { verdict: '^(?<first>\\d+) (?<second>\\d+) ' }, key_env";
    let scene = self::scene(&judge(&endpoint).replace("key_env", ask), 2);
    let told = with_key(&scene, &["run", "p.yaml"], KEY);
    assert_eq!(told.code, Some(0), "{}", told.err);
    for secret in &secrets {
        assert!(!told.err.contains(secret), "{}", told.err);
    }
    clean("calls", &asked(&scene, "select * from calls"));
    clean("rewards", &asked(&scene, "select reply from rewards"));
    let journal = scene.path("runs/scripted/calls/judge.jsonl");
    clean("the journal", &fs::read_to_string(journal).unwrap());
}

/// A private certificate authority is trusted, others are not.
#[test]
fn an_endpoint_is_believed_by_the_certificates_of_the_machine() {
    let authority = rcgen::KeyPair::generate().unwrap();
    let mut of_authority = rcgen::CertificateParams::new(Vec::new()).unwrap();
    of_authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = of_authority.self_signed(&authority).unwrap();
    let issuer = rcgen::Issuer::from_params(&of_authority, &authority);
    let own = rcgen::KeyPair::generate().unwrap();
    let names = vec!["localhost".to_owned()];
    let of_server = rcgen::CertificateParams::new(names).unwrap();
    let of_server = of_server.signed_by(&own, &issuer).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(own.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![of_server.der().clone()], key)
        .unwrap();
    let config = Arc::new(config);
    let rule: Rule = Arc::new(|out: &mut dyn Write, _: &str, question: &str| {
        out.write_all(&reply(&by_length(question), &json!({})))
            .unwrap();
        out.flush().unwrap();
    });
    let endpoint = Endpoint::behind(rule, move |stream, rule| {
        let connection = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
        serve(rustls::StreamOwned::new(connection, stream), rule);
    });
    let port = endpoint.address.rsplit(':').next().unwrap();
    let url = format!("https://localhost:{port}/v1");
    let judge =
        format!("judge: {{ http: {{ base_url: \"{url}\", model: m, wait_s: 0.01, tries: 2 }} }}");
    let scene = scene(&judge, 2);
    let der = STANDARD.encode(root.der());
    let pem = format!("-----BEGIN CERTIFICATE-----\n{der}\n-----END CERTIFICATE-----\n");
    scene.write("company.pem", pem).write("none/readme", "");
    let run = |name: &str, value: &str| {
        let mut command = scene.command(&["run", "p.yaml"]);
        command
            .env_remove("SSL_CERT_FILE")
            .env_remove("SSL_CERT_DIR");
        if !name.is_empty() {
            command.env(name, value);
        }
        said(command.output().unwrap())
    };
    let said = run("", "");
    assert_eq!(said.code, Some(1), "{}", said.err);
    let said = run("SSL_CERT_FILE", "nowhere.pem");
    assert_eq!(said.code, Some(1), "{}", said.err);
    let words = "cannot read certificates from `nowhere.pem` (set by SSL_CERT_FILE)";
    assert!(flat(&said.err).contains(words), "{}", said.err);
    let said = run("SSL_CERT_DIR", "none");
    assert_eq!(said.code, Some(1), "{}", said.err);
    let words = "this machine has no root certificates";
    assert!(said.err.contains(words), "{}", said.err);
    let said = run("SSL_CERT_FILE", "company.pem");
    assert_eq!(said.code, Some(0), "{}", said.err);
}
