//! Human labels: a run that waits for them, and the page that collects them.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};

use ovchat_data::tables::{Candidate, DpoStep, Health, Pair};
use serde_json::{Value, json};

use crate::run::{SCRIPTED, rows};
use crate::scene::Scene;

/// The scripted pipeline with human labels for the pairs.
pub fn scene(labels: u32) -> Scene {
    let scene = Scene::new();
    let people = format!(
        "ask_people: {{ candidates: candidates, rewards: [rewards], labels_min: {labels} }}"
    );
    let pipeline = SCRIPTED
        .replace("select_extremes: { rewards: rewards }", &people)
        .replace("rounds: 2", "rounds: 1");
    scene.prompts(12).write("p.yaml", pipeline);
    scene
}

/// The process of the page, and its API.
pub struct Page {
    pub child: Child,
    pub address: String,
    pub key: String,
    /// The output before the address.
    pub before: String,
}

impl Page {
    pub fn open(scene: &Scene) -> Self {
        Self::open_with(scene.command(&["label", "scripted"]))
    }

    pub fn open_with(command: Command) -> Self {
        Self::begin(command).expect("the page has an address")
    }

    /// Starts a page, or returns the exit status of a process that ended before it had an address.
    pub fn begin(mut command: Command) -> Result<Self, ExitStatus> {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut before = String::new();
        let line = lines.find_map(|line| {
            let line = line.ok()?;
            if line.starts_with("http://") {
                return Some(line);
            }
            before.push_str(&line);
            None
        });
        let Some(line) = line else {
            return Err(child.wait().unwrap());
        };
        std::thread::spawn(move || lines.count());
        let (address, key) = line.split_once("/?key=").unwrap();
        Ok(Self {
            child,
            address: address.to_owned(),
            key: key.to_owned(),
            before,
        })
    }

    /// Returns status and body.
    pub fn ask(&self, path: &str, body: Option<Value>, headers: &[(&str, &str)]) -> (u16, Value) {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .build()
            .into();
        let url = format!("{}{path}", self.address);
        let own = [("X-Key", self.key.as_str())];
        let with_key = headers.iter().chain(&own);
        let mut response = match body {
            None => {
                let get = with_key.fold(agent.get(&url), |get, (name, value)| {
                    get.header(*name, *value)
                });
                get.call().unwrap()
            }
            Some(body) => {
                let post = with_key.fold(agent.post(&url), |post, (name, value)| {
                    post.header(*name, *value)
                });
                post.send(body.to_string()).unwrap()
            }
        };
        let text = response.body_mut().read_to_string().unwrap();
        let said = serde_json::from_str(&text).unwrap_or(Value::String(text));
        (response.status().as_u16(), said)
    }

    pub fn next(&self, by: &str) -> Value {
        self.ask(&format!("/api/next?by={by}"), None, &[]).1
    }

    pub fn say(&self, by: &str, question: &Value, said: &str) -> (u16, Value) {
        let number = &question["number"];
        let body = json!({ "by": by, "question": number, "said": said, "milliseconds": 900 });
        self.ask("/api/say", Some(body), &[])
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
fn a_run_waits_for_people_and_goes_on_with_what_they_said() {
    let scene = scene(4);
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert_eq!(said.code, Some(3), "{}", said.err);
    assert!(said.err.contains("has 0 of 4 labels"), "{}", said.err);
    assert!(said.err.contains("pipeline label "), "{}", said.err);
    let page = Page::open(&scene);
    let first = page.next("ann");
    assert_eq!(
        page.next("ann")["question"],
        first["question"],
        "the page may be loaded again"
    );
    let other = page.next("bob");
    assert_ne!(
        other["question"]["parts"], first["question"]["parts"],
        "two people have two questions"
    );
    assert_eq!(first["can_undo"], false);
    let mut chosen: Vec<[String; 2]> = Vec::new();
    let text = |question: &Value, side: &str| question[side].as_str().unwrap().to_owned();

    // Ann: left, undone, right. Bob: a skip, a tie, left.
    let question = first["question"].clone();
    page.say("ann", &question, "left");
    let (_, again) = page.ask("/api/undo", Some(json!({ "by": "ann" })), &[]);
    assert_eq!(again["question"], question);
    page.say("ann", &question, "right");
    chosen.push([text(&question, "right"), text(&question, "left")]);
    let (_, second) = page.say("bob", &other["question"], "skip");
    assert_eq!(
        second["progress"]["said"], 1,
        "a skipped question is no label"
    );
    let (_, third) = page.say("bob", &second["question"], "tie");
    let third = third["question"].clone();
    page.say("bob", &third, "left");
    chosen.push([text(&third, "left"), text(&third, "right")]);
    let (status, _) = page.say("ann", &third, "right");
    assert_eq!(status, 409, "somebody was faster");
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert!(said.err.contains("has 3 of 4 labels"), "{}", said.err);
    drop(page);

    // A new page after the first one was killed has the labels.
    let page = Page::open(&scene);
    let fourth = page.next("cid");
    assert_eq!(fourth["progress"]["said"], 3);
    page.say("cid", &fourth["question"], "both_bad");
    scene.succeeds(&["run", "p.yaml"]);
    check_pairs(&scene, chosen);
    assert!(!rows::<DpoStep>(&scene, "steps", Some(1)).is_empty());
    let csv = |query| {
        scene
            .succeeds(&["sql", "scripted", query, "--format", "csv"])
            .out
    };
    // Cid got the question that Bob had skipped.
    assert_eq!(
        csv(
            "select reason, count(*) as n from rejects where stage = 'pairs' group by reason order by reason"
        ),
        "reason,n\nlabeled as a tie,1\nlabeled as both bad,1\nnot labeled,8\n"
    );
    assert_eq!(
        csv("select said, count(*) as n from human_labels group by said order by said"),
        "said,n\nboth_bad,1\nleft,1\nright,1\nskip,1\ntie,1\n"
    );
    // A finished run has nothing to do.
    let again = scene.succeeds(&["run", "p.yaml"]).err;
    assert!(again.contains("nothing to do"), "{again}");
}

/// Checks that the pairs are those of people: their chosen and rejected texts, with the tokens that
/// were sampled.
#[track_caller]
fn check_pairs(scene: &Scene, mut expected: Vec<[String; 2]>) {
    let pairs: Vec<Pair> = rows(scene, "pairs", Some(1));
    let mut made: Vec<[String; 2]> = pairs
        .iter()
        .map(|pair| [pair.chosen.clone(), pair.rejected.clone()])
        .collect();
    made.sort();
    expected.sort();
    assert_eq!(made, expected);
    let candidates: Vec<Candidate> = rows(scene, "candidates", Some(1));
    for pair in &pairs {
        let of_pair = candidates.iter().find(|candidate| {
            candidate.prompt_id == pair.prompt_id
                && Some(candidate.candidate) == pair.chosen_candidate
        });
        assert_eq!(
            Some(&of_pair.unwrap().token_ids),
            pair.chosen_token_ids.as_ref()
        );
        assert_eq!(pair.margin, None, "no judge said how much better");
    }
}

#[test]
fn the_page_is_closed_to_other_machines_and_other_sites() {
    let scene = scene(1);
    assert_eq!(scene.pipeline(&["run", "p.yaml"]).code, Some(3));
    let page = Page::open(&scene);
    assert!(page.address.starts_with("http://127.0.0.1:"));
    let body = || Some(json!({ "by": "eve", "question": 0, "said": "left", "milliseconds": 1 }));
    let (status, said) = page.ask("/api/say", body(), &[("Origin", "http://evil.example")]);
    assert_eq!(status, 403, "{said}");
    let (status, _) = page.ask("/api/next?by=eve", None, &[("Host", "evil.example")]);
    assert_eq!(status, 403);
    let stranger = Page {
        child: Command::new("true").spawn().unwrap(),
        address: page.address.clone(),
        key: "guessed".to_owned(),
        before: String::new(),
    };
    assert_eq!(stranger.ask("/api/say", body(), &[]).0, 403);
    assert_eq!(stranger.ask("/", None, &[]).0, 403);
    assert_eq!(page.ask("/picture/../../manifest.json", None, &[]).0, 404);
    assert_eq!(page.next("ann")["progress"]["said"], 0, "nothing was said");
    let own = page.address.clone();
    assert_eq!(page.ask("/api/say", body(), &[("Origin", &own)]).0, 200);
    // A run without `ask_people` has no page.
    scene.succeeds(&["run", "p.yaml"]);
    let other = Scene::new();
    other
        .prompts(3)
        .write("p.yaml", SCRIPTED)
        .succeeds(&["run", "p.yaml"]);
    let said = other.pipeline(&["label", "scripted"]);
    assert!(said.err.contains("no labeling task in"), "{}", said.err);
}

#[test]
fn two_annotators_get_a_share_of_the_questions_and_their_agreement_is_measured() {
    let scene = scene(4);
    assert_eq!(scene.pipeline(&["run", "p.yaml"]).code, Some(3));
    let page = Page::open_with(scene.command(&["label", "scripted", "--twice", "1"]));
    let mut numbers = Vec::new();
    for said in ["left", "right"] {
        let question = page.next("ann")["question"].clone();
        assert_eq!(page.say("ann", &question, said).0, 200);
        let (status, why) = page.say("ann", &question, said);
        assert_eq!(status, 409, "{why}");
        numbers.push(question["number"].clone());
    }
    for (number, said) in numbers.iter().zip(["left", "left"]) {
        let question = page.next("bob")["question"].clone();
        assert_eq!(question["number"], *number, "bob gets what ann had");
        assert_eq!(page.say("bob", &question, said).0, 200);
    }
    let third = page.next("cid")["question"]["number"].clone();
    assert!(!numbers.contains(&third), "two are enough");
    drop(page);
    scene.succeeds(&["run", "p.yaml"]);
    let health: Vec<Health> = rows(&scene, "health", Some(1));
    let agree = health
        .iter()
        .find(|row| row.metric == "labelers_agree")
        .unwrap();
    assert_eq!((agree.value, agree.n), (Some(0.5), Some(2)), "{agree:?}");
    let pairs: Vec<Pair> = rows(&scene, "pairs", Some(1));
    assert_eq!(pairs.len(), 1);
    let rejects = crate::run::rows_of_rejects(&scene);
    let disagree = rejects
        .iter()
        .filter(|row| row.reason == "its annotators disagree");
    assert_eq!(disagree.count(), 1);
}
