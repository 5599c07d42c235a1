//! The labeling page under attack: acknowledged labels are kept, and annotators are served.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::people::{Page, scene};
use crate::scene::Scene;

/// The longest wait of an annotator.
const SOON: Duration = Duration::from_secs(1);

/// A scene whose run waits for labels.
fn waiting(labels: u32) -> Scene {
    let scene = scene(labels);
    assert_eq!(scene.pipeline(&["run", "p.yaml"]).code, Some(3));
    scene
}

fn address(page: &Page) -> String {
    page.address.trim_start_matches("http://").to_owned()
}

/// Opens a connection to the page and sends a text.
fn sent(page: &Page, text: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address(page)).unwrap();
    stream.write_all(text).unwrap();
    stream
}

/// Reads until the connection ends.
fn heard(mut stream: TcpStream) -> String {
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut text = Vec::new();
    drop(stream.read_to_end(&mut text));
    String::from_utf8_lossy(&text).into_owned()
}

fn head(page: &Page, more: &str) -> String {
    let (host, key) = (address(page), &page.key);
    format!("POST /api/say HTTP/1.1\r\nHost: {host}\r\nX-Key: {key}\r\n{more}\r\n")
}

/// Asserts that a question is answered quickly. Returns the number of labels so far.
#[track_caller]
fn labels_soon(page: &Page, by: &str) -> u64 {
    let begun = Instant::now();
    let next = page.next(by);
    assert!(
        begun.elapsed() < SOON,
        "{:?} for a question",
        begun.elapsed()
    );
    let begun = Instant::now();
    let (status, said) = page.say(by, &next["question"], "left");
    assert!(
        begun.elapsed() < SOON,
        "{:?} for an answer",
        begun.elapsed()
    );
    assert_eq!(status, 200, "{said}");
    said["progress"]["said"].as_u64().unwrap()
}

#[test]
fn half_sent_requests_and_garbage_keep_nobody_waiting() {
    let scene = waiting(4);
    let page = Page::open(&scene);
    let of_length = |length: usize| format!("Content-Length: {length}\r\n");
    let half = sent(&page, (head(&page, &of_length(100)) + "{\"by\"").as_bytes());
    let headless = sent(&page, b"POST /api/say HTTP/1.1\r\nHost: x\r\nX-");
    let stranger = head(&page, &of_length(60_000)).replace(&page.key, "guessed");
    let stranger = sent(&page, stranger.as_bytes());
    let large = sent(&page, head(&page, &of_length(70_000)).as_bytes());
    let chunk = format!("{:x}\r\n{}\r\n", 70_000, " ".repeat(70_000));
    let chunked = head(&page, "Transfer-Encoding: chunked\r\n") + &chunk;
    let chunked = sent(&page, chunked.as_bytes());
    let garbage = sent(
        &page,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\xff\xfe\r\n\r\n",
    );
    let mut endless = sent(&page, b"GET / HTTP/1.1\r\n");
    let line = format!("X: {}\r\n", "x".repeat(1000));
    // Two socket buffers take some megabytes before the sender notices.
    let refused = (0..100_000).any(|_| endless.write_all(line.as_bytes()).is_err());
    assert!(refused, "a head of 100 MB was taken");
    assert_eq!(labels_soon(&page, "ann"), 1);
    // Unauthorized requests and oversized bodies are rejected before the body is read.
    let begun = Instant::now();
    assert!(heard(stranger).starts_with("HTTP/1.1 403 "));
    assert!(heard(large).starts_with("HTTP/1.1 413 "));
    assert!(heard(chunked).starts_with("HTTP/1.1 413 "));
    assert!(heard(garbage).starts_with("HTTP/1.1 400 "));
    assert!(begun.elapsed() < SOON);
    // Stalled requests time out.
    assert!(heard(half).starts_with("HTTP/1.1 408 "));
    assert_eq!(heard(headless), "");
    assert!(begun.elapsed() < Duration::from_secs(15));
    assert_eq!(labels_soon(&page, "ann"), 2);
}

#[test]
fn a_signal_is_heard_behind_a_half_sent_request() {
    let scene = waiting(4);
    let mut page = Page::open(&scene);
    let _half = sent(
        &page,
        (head(&page, "Content-Length: 100\r\n") + "{").as_bytes(),
    );
    std::thread::sleep(Duration::from_millis(200));
    assert!(ends_soon(&mut page.child, "-INT"));
}

fn ends_soon(child: &mut Child, signal: &str) -> bool {
    let id = child.id().to_string();
    let sent = Command::new("kill").args([signal, &id]).status();
    assert!(sent.unwrap().success());
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(2) {
        if child.try_wait().unwrap().is_some() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

/// Opens as many connections as this process can.
#[test]
fn idle_connections_keep_nobody_waiting() {
    let scene = waiting(4);
    let page = Page::open(&scene);
    let limits = fs::read_to_string("/proc/self/limits").unwrap();
    let of_files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let most = of_files.unwrap().split_whitespace().nth(3).unwrap();
    let count = most
        .parse()
        .unwrap_or(5_000_usize)
        .saturating_sub(300)
        .min(5_000);
    let idle: Vec<TcpStream> = (0..count)
        .map(|_| TcpStream::connect(address(&page)).unwrap())
        .collect();
    assert_eq!(labels_soon(&page, "ann"), 1);
    drop(idle);
    assert_eq!(labels_soon(&page, "ann"), 2);
    println!("{count} idle connections to the page");
}

#[test]
fn beyond_the_open_files_that_are_left_there_is_a_503() {
    let scene = waiting(4);
    let limited = |command: &Command| {
        let mut shell = Command::new("sh");
        let program = command.get_program();
        let limit = "ulimit -n 100; exec \"$@\"";
        shell
            .args(["-c", limit, "sh"])
            .arg(program)
            .args(command.get_args());
        shell.current_dir(command.get_current_dir().unwrap()).envs(
            command
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        );
        shell
    };
    let page = Page::open_with(limited(&scene.command(&["label", "scripted"])));
    let idle: Vec<TcpStream> = (0..300)
        .map(|_| TcpStream::connect(address(&page)).unwrap())
        .collect();
    assert!(heard(sent(&page, b"GET / HTTP/1.1\r\n\r\n")).starts_with("HTTP/1.1 503 "));
    drop(idle);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(labels_soon(&page, "ann"), 1);
}

/// One server writes, and the second names it; all forty labels of two annotators are kept.
#[test]
fn a_second_server_is_told_of_the_first_and_no_label_is_lost() {
    let scene = waiting(40);
    let page = Page::open(&scene);
    let second = scene.pipeline(&["label", "scripted"]);
    assert_eq!(second.code, Some(1), "{}", second.err);
    let holder = format!(
        "are already being collected by process {} ",
        page.child.id()
    );
    assert!(second.err.contains(&holder), "{}", second.err);
    std::thread::scope(|scope| {
        for by in ["ann", "bob"] {
            let page = &page;
            scope.spawn(move || {
                for _ in 0..20 {
                    labels_soon(page, by);
                }
            });
        }
    });
    drop(page);
    assert_eq!(count(&scene), "n\n40\n");
}

fn count(scene: &Scene) -> String {
    let query = "select count(*) as n from human_labels";
    scene
        .succeeds(&["sql", "scripted", query, "--format", "csv"])
        .out
}

/// A crash can truncate a line anywhere, even within a character.
#[test]
fn a_line_that_was_cut_off_is_set_aside_and_blocks_nothing() {
    let scene = waiting(4);
    let page = Page::open(&scene);
    assert_eq!(labels_soon(&page, "Bürki"), 1);
    drop(page);
    let folder = scene.path("runs/scripted/human_labels");
    let files = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let file = files
        .filter(|path| path.extension() == Some("jsonl".as_ref()))
        .next()
        .unwrap();
    let whole = fs::read(&file).unwrap();
    let line = whole.strip_suffix(b"\n").unwrap();
    let letter = line.iter().position(|byte| *byte == 0xc3).unwrap() + 1;
    for cut in [1, letter, line.len()] {
        fs::write(&file, [&whole[..], &line[..cut]].concat()).unwrap();
        assert_eq!(count(&scene), "n\n1\n", "cut at {cut}");
        let said = scene.pipeline(&["run", "p.yaml"]);
        assert_eq!(said.code, Some(3), "{}", said.err);
        assert!(said.err.contains("has 1 of 4 labels"), "{}", said.err);
        assert!(
            said.err.contains("ignoring 1 truncated or invalid lines"),
            "{}",
            said.err
        );
        let page = Page::open(&scene);
        assert!(page.before.contains(".jsonl.torn"), "{}", page.before);
        assert_eq!(fs::read(&file).unwrap(), whole);
        let next: Value = page.next("ann");
        assert_eq!(next["progress"]["said"], 1);
    }
    let torn = file.with_extension("jsonl.torn");
    let expected: usize = [1, letter, line.len()].iter().map(|cut| cut + 1).sum();
    assert_eq!(fs::read(torn).unwrap().len(), expected, "no byte is lost");
    let page = Page::open(&scene);
    assert_eq!(labels_soon(&page, "ann"), 2);
    drop(page);
    assert_eq!(count(&scene), "n\n2\n");
}

/// Annotators can only undo their own labels.
#[test]
fn undo_takes_back_what_one_said_oneself() {
    let scene = waiting(4);
    let page = Page::open(&scene);
    labels_soon(&page, "ann");
    labels_soon(&page, "bob");
    let undo = |by: &str| {
        page.ask("/api/undo", Some(serde_json::json!({ "by": by })), &[])
            .1
    };
    assert_eq!(undo("cid")["progress"]["said"], 2);
    assert_eq!(undo("ann")["progress"]["said"], 1);
    assert_eq!(undo("ann")["progress"]["said"], 1, "Bob's stays");
}

/// Two annotators may share a name; each page undoes its own labels only.
#[test]
fn undo_touches_the_labels_of_ones_own_page() {
    let scene = waiting(4);
    let page = Page::open(&scene);
    let says = || {
        let next = page.next("ann");
        page.say("ann", &next["question"], "left").1["label"].clone()
    };
    let (first, second) = (says(), says());
    assert_ne!(first, second);
    let undo = |label: &Value| {
        let body = serde_json::json!({ "by": "ann", "label": label });
        page.ask("/api/undo", Some(body), &[]).1
    };
    assert_eq!(undo(&first)["progress"]["said"], 1);
    assert_eq!(undo(&first)["progress"]["said"], 1, "once only");
    let read = || {
        let labels = scene.succeeds(&[
            "sql",
            "scripted",
            "select id from human_labels",
            "--format",
            "csv",
        ]);
        labels.out
    };
    assert_eq!(read(), format!("id\n{second}\n"));
}
