//! Judges that reply in text: a model of the pipeline, and an endpoint on this machine.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use ovchat_data::tables::{Candidate, Comparison, Reward};
use serde_json::{Value, json};

use crate::run::{SCRIPTED, rows};
use crate::scene::Scene;

/// The evaluation stage: scores of the greedy answers, one per prompt.
const GRADES: &str = "  grades:\n    score: { candidates: answers, judge: judge }\n";

/// The scripted pipeline with another judge, fewer answers, and no grades.
pub fn pipeline(judge: &str) -> String {
    SCRIPTED
        .replace("judge: { scripted: {} }", judge)
        .replace("policy, part: 7 }", "policy, part: 7, count: 3 }")
        .replace("rounds: 2", "rounds: 1")
        .replace(GRADES, "")
}

fn scene(judge: &str, prompts: usize) -> Scene {
    let scene = Scene::new();
    scene.prompts(prompts).write("p.yaml", pipeline(judge));
    scene
}

#[test]
fn the_policy_is_its_own_critic() {
    let verdict = "^(?<better_first>[a-l])|^(?<better_second>[m-z])|^(?<tie>$)";
    let judge =
        format!("judge: {{ self: {{ model: policy, ask: {{ verdict: \"{verdict}\" }} }} }}");
    let scene = scene(&judge, 12);
    let graded = pipeline(&judge) + GRADES;
    scene.write(
        "p.yaml",
        graded.replace("count: 1, temperature: 0", "count: 2"),
    );
    let plan = scene.succeeds(&["plan", "p.yaml"]).out;
    assert!(
        plan.contains("judge = self(backing model: policy)"),
        "{plan}"
    );
    scene.succeeds(&["run", "p.yaml", "--set", "rounds=2"]);
    let candidates: Vec<Candidate> = rows(&scene, "candidates", Some(1));
    let rewards: Vec<Reward> = rows(&scene, "rewards", Some(1));
    assert_eq!(rewards.len(), candidates.len());
    let mut sums: HashMap<&str, f32> = HashMap::new();
    for reward in &rewards {
        *sums.entry(&reward.prompt_id).or_default() += reward.reward;
    }
    assert!(
        sums.values().all(|sum| sum.abs() < 1e-6),
        "what one gains another loses"
    );
    assert!(rewards.iter().any(|reward| reward.reward != 0.0));
    let replies = rewards[0].reply.as_deref().unwrap();
    let replies: Vec<Value> = serde_json::from_str(replies).unwrap();
    assert_eq!(replies.len(), 2, "each answer comes first twice");
    // The model is trained, so its grades are those of each round's model, including round 0.
    for round in [0, 1, 2] {
        assert_eq!(rows::<Reward>(&scene, "grades", Some(round)).len(), 24);
    }
}

/// A pairwise judge cannot score a single answer: an error in `check`, and a reject in a run.
#[test]
fn one_answer_alone_is_never_compared_with_nothing() {
    let endpoint = Endpoint::new(Box::new(|question, _| (200, "", by_length(question))));
    let judge = endpoint.judge("concurrency_max: 2");
    let scene = scene(&judge, 4);
    scene.write("p.yaml", pipeline(&judge) + GRADES);
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert_eq!(said.code, Some(2), "{}", said.err);
    let told = flat(&said.err);
    for words in [
        "config::one_answer",
        "but `answers` has only one answer per prompt",
        "mode pointwise",
    ] {
        assert!(told.contains(&flat(words)), "{told}");
    }
    // Only the run knows the number of answers after a query.
    let first = "  first:\n    sql: { tables: [candidates], query: \"select * from candidates where candidate = 0 or prompt_id <= (select min(prompt_id) from candidates)\" }\n  rewards:";
    let of_first = pipeline(&judge).replace("  rewards:", first).replace(
        "score: { candidates: candidates",
        "score: { candidates: first",
    );
    scene.write("p.yaml", of_first);
    let said = scene.pipeline(&["run", "p.yaml", "--until", "rewards"]);
    assert_eq!(said.code, Some(1), "{}", said.err);
    let told = flat(&said.err);
    assert!(told.contains("3 of 4 rows are faulty"), "{told}");
    assert!(
        told.contains("compares at least two answers to a prompt"),
        "{told}"
    );
    let allowed = ["--set", "reject_share_max=1.0"];
    scene.succeeds(&[&["run", "p.yaml", "--until", "rewards"], &allowed[..]].concat());
    let rewards: Vec<Reward> = rows(&scene, "rewards", Some(1));
    assert_eq!(rewards.len(), 3, "those of the prompt with three answers");
    assert!(rewards.iter().any(|reward| reward.reward != 0.0));
}

/// Answers are compared with all others to the same prompt, wherever their rows are.
#[test]
fn rows_of_a_prompt_need_not_be_adjacent() {
    let endpoint = Endpoint::new(Box::new(|question, _| (200, "", by_length(question))));
    let judge = endpoint.judge("concurrency_max: 4");
    let scored = |order: &str| {
        let scene = scene(&judge, 12);
        let sorted = format!(
            "  sorted:\n    sql: {{ tables: [candidates], query: \"select * from candidates order by {order}\" }}\n  rewards:"
        );
        let pipeline = pipeline(&judge).replace("  rewards:", &sorted).replace(
            "score: { candidates: candidates",
            "score: { candidates: sorted",
        );
        scene.write("p.yaml", pipeline);
        scene.succeeds(&["run", "p.yaml", "--until", "rewards"]);
        let mut rewards: Vec<Reward> = rows(&scene, "rewards", Some(1));
        rewards.sort_by(|a, b| (&a.prompt_id, a.candidate).cmp(&(&b.prompt_id, b.candidate)));
        (scene, rewards)
    };
    let (_, adjacent) = scored("prompt_id, candidate");
    assert_eq!(adjacent.len(), 36);
    assert!(adjacent.iter().any(|reward| reward.reward != 0.0));
    let asked = endpoint.replied().len();
    let (scene, scattered) = scored("candidate, prompt_id");
    let reward = |row: &Reward| (row.prompt_id.clone(), row.candidate, row.reward);
    let rewards = |rows: &[Reward]| rows.iter().map(reward).collect::<Vec<_>>();
    assert_eq!(rewards(&scattered), rewards(&adjacent));
    assert_eq!(endpoint.replied().len(), 2 * asked, "the same was asked");
    assert!(
        scene
            .succeeds(&["run", "p.yaml", "--until", "rewards"])
            .err
            .contains("nothing to do")
    );

    // An earlier version started a new part wherever the prompt changed: its unfinished tables are
    // rebuilt from the start.
    let manifest = scene.path("runs/scripted/manifest.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    let made = json["made"].as_array_mut().unwrap().iter_mut();
    let made = made.filter(|made| made["table"] == "rewards");
    for made in made {
        assert_eq!(made["is_gathered"], true);
        made.as_object_mut().unwrap().remove("is_gathered");
        made["complete"] = false.into();
        let parts = made["parts"].as_array_mut().unwrap();
        parts.truncate(1);
        parts[0]["files"] = json!([]);
    }
    std::fs::write(&manifest, json.to_string()).unwrap();
    scene.succeeds(&["run", "p.yaml", "--until", "rewards"]);
    assert_eq!(rows::<Reward>(&scene, "rewards", Some(1)).len(), 36);
}

#[test]
fn replies_that_cannot_be_read_are_rejects_with_the_reply() {
    let verdict = "^(?<better_first>nothing like it)|^(?<tie>x)|^(?<better_second>y)";
    let judge =
        format!("judge: {{ self: {{ model: policy, ask: {{ verdict: \"{verdict}\" }} }} }}");
    let scene = scene(&judge, 4);
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert_eq!(said.code, Some(1));
    let diagnostic = "no verdict found in the judge's reply: \"";
    assert!(flat(&said.err).contains(&flat(diagnostic)), "{}", said.err);
    scene.succeeds(&[
        "run",
        "p.yaml",
        "--set",
        "reject_share_max=1.0",
        "--until",
        "rewards",
    ]);
    let query = "select count(*) as n, count(*) filter (where reason like 'no verdict%') as of_replies from rejects";
    let found = scene
        .succeeds(&["sql", "scripted", query, "--format", "csv"])
        .out;
    assert_eq!(found, "n,of_replies\n4,4\n");
}

/// Returns a message without the frame around it.
pub fn flat(said: &str) -> String {
    let words = said.split(|one: char| one.is_whitespace() || "│|:".contains(one));
    words
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

#[test]
fn an_endpoint_gets_texts_and_images_in_the_order_of_the_prompt() {
    let endpoint = Endpoint::new(Box::new(|question, _| (200, "", by_length(question))));
    let scene = scene(&endpoint.judge("concurrency_max: 1"), 1);
    let dot = |level: u8| [b"P6\n1 1\n255\n".as_slice(), &[level; 3]].concat();
    for (name, level) in [("a", 1), ("b", 2)] {
        let image = image::load_from_memory(&dot(level)).unwrap();
        image.save(scene.path(&format!("{name}.png"))).unwrap();
    }
    let record = json!([{"image": ["a.png", "b.png"], "prompt": "Is <image> or <image> darker?"}]);
    scene.write("prompts.json", record.to_string());
    scene.succeeds(&["run", "p.yaml", "--until", "rewards"]);
    let requests = endpoint.heard.requests.lock().unwrap();
    let content = requests[0].1["messages"][0]["content"].as_array().unwrap();
    let shown = |part: &Value| match &part["text"] {
        Value::String(text) => text.clone(),
        _ => part["image_url"]["url"].as_str().unwrap()[..14].to_owned(),
    };
    let shown: Vec<String> = content.iter().map(shown).collect();
    assert_eq!(shown.len(), 5, "{shown:?}");
    assert!(shown[0].ends_with("Question: Is "), "{shown:?}");
    assert_eq!(shown[1..4], ["data:image/png", " or ", "data:image/png"]);
    assert!(shown[4].starts_with(" darker?\n"), "{shown:?}");
    assert_ne!(content[1], content[3], "each image in its place");
}

/// The rule of an endpoint: status, headers and reply to a question.
type Rule = Box<dyn Fn(&str, usize) -> (u16, &'static str, String) + Send + Sync>;

/// An OpenAI-compatible endpoint that replies by a rule.
struct Endpoint {
    url: String,
    heard: Arc<Heard>,
}

#[derive(Default)]
struct Heard {
    /// The questions that were answered.
    replied: Mutex<Vec<String>>,
    /// Every request with its headers.
    requests: Mutex<Vec<(String, Value)>>,
    /// While true, the endpoint does not reply.
    is_silent: AtomicBool,
    under_way: Mutex<[usize; 2]>,
}

impl Endpoint {
    fn new(rule: Rule) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let heard = Arc::new(Heard::default());
        let (rule, there) = (Arc::new(rule), Arc::clone(&heard));
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (rule, heard) = (Arc::clone(&rule), Arc::clone(&there));
                thread::spawn(move || serve(&stream.unwrap(), &rule, &heard));
            }
        });
        Self { url, heard }
    }

    fn replied(&self) -> Vec<String> {
        self.heard.replied.lock().unwrap().clone()
    }

    fn judge(&self, more: &str) -> String {
        let url = &self.url;
        format!("judge: {{ http: {{ base_url: \"{url}\", model: m, wait_s: 0.01, {more} }} }}")
    }
}

fn serve(stream: &TcpStream, rule: &Rule, heard: &Heard) {
    let mut reader = BufReader::new(stream);
    loop {
        let (mut head, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            let lower = line.to_ascii_lowercase();
            if let Some(number) = lower.strip_prefix("content-length:") {
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
        let body: Value = serde_json::from_slice(&body).unwrap();
        let content = body["messages"][0]["content"].as_array().unwrap();
        let question = content.last().unwrap()["text"].as_str().unwrap().to_owned();
        let number = {
            let mut requests = heard.requests.lock().unwrap();
            requests.push((head, body));
            requests.len()
        };
        {
            let mut under_way = heard.under_way.lock().unwrap();
            under_way[0] += 1;
            under_way[1] = under_way[1].max(under_way[0]);
        }
        thread::sleep(Duration::from_millis(2));
        while heard.is_silent.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(5));
        }
        let (status, headers, reply) = rule(&question, number);
        heard.under_way.lock().unwrap()[0] -= 1;
        // A model that declines returns no content.
        let content = (reply != DECLINED).then_some(&reply);
        let json = json!({
            "choices": [{ "message": { "role": "assistant", "content": content } }],
            "usage": { "prompt_tokens": 1000, "completion_tokens": 10 },
        });
        let text = if status == 200 {
            json.to_string()
        } else {
            reply
        };
        let length = text.len();
        let answer =
            format!("HTTP/1.1 {status} so\r\nContent-Length: {length}\r\n{headers}\r\n{text}");
        if status == 200 {
            heard.replied.lock().unwrap().push(question);
        }
        if (&*stream).write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

/// The reply of a rule that stands for a declining model.
const DECLINED: &str = "I would rather not";

/// Prefers longer answers.
pub fn by_length(question: &str) -> String {
    let shown = question
        .lines()
        .filter_map(|line| line.split_once("nswer: "));
    let lengths: Vec<String> = shown.map(|(_, answer)| answer.len().to_string()).collect();
    lengths.join(" ")
}

#[test]
fn an_endpoint_is_asked_each_question_once_and_its_key_goes_nowhere_else() {
    let endpoint = Endpoint::new(Box::new(|question, number| match number {
        2 | 9 => (429, "Retry-After: 0\r\n", "slow down".to_owned()),
        5 => (429, "Retry-After: -1\r\n", "slow down".to_owned()),
        11 => (503, "", "busy".to_owned()),
        _ => (200, "", by_length(question)),
    }));
    let judge = endpoint.judge("key_env: OVCHAT_TEST_KEY, concurrency_max: 6");
    let scene = scene(&judge, 10);
    let key = "sk-a-secret-of-the-tests";
    let run = |arguments: &[&str]| {
        let mut command = scene.command(arguments);
        command.env("OVCHAT_TEST_KEY", key).output().unwrap()
    };
    let said = run(&["run", "p.yaml"]);
    assert!(
        said.status.success(),
        "{}",
        String::from_utf8_lossy(&said.stderr)
    );
    let candidates: Vec<Candidate> = rows(&scene, "candidates", Some(1));
    let rewards: Vec<Reward> = rows(&scene, "rewards", Some(1));
    let mut texts: HashMap<&str, Vec<&Candidate>> = HashMap::new();
    for candidate in &candidates {
        texts
            .entry(&candidate.prompt_id)
            .or_default()
            .push(candidate);
    }
    for reward in &rewards {
        let all = &texts[&reward.prompt_id.as_str()];
        let length = |candidate: &&Candidate| candidate.text.len() as f32;
        let own = all
            .iter()
            .find(|other| other.candidate == reward.candidate)
            .unwrap();
        let expected: f32 = all
            .iter()
            .map(|other| 2.0 * (length(own) - length(other)))
            .sum();
        assert!((reward.reward - expected).abs() < 1e-4);
    }
    let mut replied = endpoint.replied();
    let all = replied.len();
    replied.sort();
    replied.dedup();
    assert_eq!(replied.len(), all, "no question twice");
    let requests = endpoint.heard.requests.lock().unwrap().clone();
    assert_eq!(requests.len(), all + 4, "four were asked again later");
    let said = |head: &str| {
        head.to_ascii_lowercase()
            .contains(&format!("authorization: bearer {key}"))
    };
    assert!(requests.iter().all(|(head, _)| said(head)));
    assert_eq!(requests[0].1["temperature"], 0.0);
    let most = endpoint.heard.under_way.lock().unwrap()[1];
    assert!((2..=6).contains(&most), "{most} at once");

    let query = "select count(*) as calls, count(distinct hash) as questions, sum(prompt_tokens) as tokens from calls";
    let found = scene
        .succeeds(&["sql", "scripted", query, "--format", "csv"])
        .out;
    assert_eq!(
        found,
        format!("calls,questions,tokens\n{all},{all},{}\n", all * 1000)
    );
    // A second run calls nothing, and no file contains the key.
    assert!(run(&["run", "p.yaml"]).status.success());
    assert_eq!(endpoint.replied().len(), all);
    let mut folders = vec![scene.path("")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            match entry.path() {
                path if path.is_dir() => folders.push(path),
                path => {
                    let bytes = std::fs::read(&path).unwrap();
                    let found = bytes.windows(key.len()).any(|some| some == key.as_bytes());
                    assert!(!found, "{}", path.display());
                }
            }
        }
    }
}

#[test]
fn a_run_that_is_killed_asks_no_question_twice() {
    let endpoint = Endpoint::new(Box::new(|question, _| (200, "", by_length(question))));
    let scene = scene(&endpoint.judge("concurrency_max: 3"), 12);
    for wanted in [7, 19] {
        let mut child = scene.command(&["run", "p.yaml"]).spawn().unwrap();
        while endpoint.replied().len() < wanted {
            thread::sleep(Duration::from_millis(1));
        }
        endpoint.heard.is_silent.store(true, Ordering::SeqCst);
        // Earlier replies have arrived and are logged; new questions get no reply.
        thread::sleep(Duration::from_millis(300));
        let before = endpoint.replied().len();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(endpoint.replied().len(), before);
        // The callers of these questions are gone.
        endpoint.heard.is_silent.store(false, Ordering::SeqCst);
        thread::sleep(Duration::from_millis(100));
        endpoint.heard.replied.lock().unwrap().truncate(before);
    }
    scene.succeeds(&["run", "p.yaml"]);
    let mut replied = endpoint.replied();
    let all = replied.len();
    replied.sort();
    replied.dedup();
    assert_eq!(replied.len(), all, "no question twice");
    assert_eq!(rows::<Reward>(&scene, "rewards", Some(1)).len(), 36);
}

/// A fork keeps the calls of its own rounds, too.
#[test]
fn a_fork_asks_nothing_that_was_asked_before() {
    let endpoint = Endpoint::new(Box::new(|question, _| (200, "", by_length(question))));
    let scene = scene(&endpoint.judge("concurrency_max: 2"), 4);
    scene.succeeds(&["run", "p.yaml"]);
    let asked = endpoint.replied().len();
    // The candidates stay the same and are scored in parts of another size.
    let part = "stages.rewards.score.part=2";
    scene.succeeds(&[
        "fork",
        "scripted",
        "--at",
        "1",
        "--to",
        "runs/fork",
        "--set",
        part,
    ]);
    scene.succeeds(&["run", "p.yaml", "--run", "runs/fork", "--set", part]);
    assert_eq!(endpoint.replied().len(), asked);
}

#[test]
fn a_reply_that_cannot_be_read_is_asked_for_again() {
    let endpoint = Endpoint::new(Box::new(|question, number| match number {
        1 => (200, "", "Hard to say.".to_owned()),
        2 => (200, "", DECLINED.to_owned()),
        _ => (200, "", by_length(question)),
    }));
    let scene = scene(&endpoint.judge("concurrency_max: 2"), 3);
    scene.succeeds(&["run", "p.yaml"]);
    let requests = endpoint.heard.requests.lock().unwrap().clone();
    let drawn: Vec<&Value> = requests
        .iter()
        .map(|(_, body)| &body["temperature"])
        .collect();
    let again = drawn
        .iter()
        .filter(|temperature| **temperature == 1.0)
        .count();
    assert_eq!(again, 2, "{drawn:?}");
    let query = "select sum(retries) as again from telemetry";
    let found = scene
        .succeeds(&["sql", "scripted", query, "--format", "csv"])
        .out;
    assert_eq!(found, "again\n2\n");
}

#[test]
fn money_runs_out_without_a_loss() {
    let endpoint = Endpoint::new(Box::new(|question, _| (200, "", by_length(question))));
    // A thousandth per call.
    let spend = "spend: { limit: 0.02, per_million_prompt_tokens: 1, per_million_reply_tokens: 0 }";
    let scene = scene(&endpoint.judge(&format!("concurrency_max: 1, {spend}")), 8);
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert_eq!(said.code, Some(1));
    assert!(
        flat(&said.err).contains("have cost 0.0200 and reached `spend.limit` (0.02)"),
        "{}",
        said.err
    );
    assert_eq!(endpoint.replied().len(), 20);
    scene.succeeds(&["run", "p.yaml", "--set", "models.judge.http.spend.limit=1"]);
    let mut replied = endpoint.replied();
    let all = replied.len();
    replied.sort();
    replied.dedup();
    assert_eq!(replied.len(), all);
}

#[test]
fn an_endpoint_that_refuses_is_told_apart_from_one_that_is_busy() {
    let endpoint = Endpoint::new(Box::new(|_, _| {
        (401, "", "{\"error\": \"no such key\"}".to_owned())
    }));
    let scene = scene(&endpoint.judge("key_env: OVCHAT_TEST_NO_KEY"), 2);
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert_eq!(said.code, Some(2), "{}", said.err);
    assert!(
        said.err
            .contains("variable `OVCHAT_TEST_NO_KEY` is not set"),
        "{}",
        said.err
    );
    let mut command = scene.command(&["run", "p.yaml"]);
    let said = command
        .env("OVCHAT_TEST_NO_KEY", "wrong-key")
        .output()
        .unwrap();
    let err = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(
        err.contains("the endpoint returned HTTP 401") && err.contains("OVCHAT_TEST_NO_KEY"),
        "{err}"
    );
    assert!(!err.contains("wrong-key"), "{err}");
    assert_eq!(
        endpoint.heard.requests.lock().unwrap().len(),
        1,
        "once is enough"
    );

    let busy = Endpoint::new(Box::new(|_, _| (503, "", "come again".to_owned())));
    let scene = self::scene(&busy.judge("tries: 3, concurrency_max: 1"), 1);
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert!(
        flat(&said.err).contains("failed after 3 attempts"),
        "{}",
        said.err
    );
    assert!(
        flat(&said.err).contains("the endpoint returned HTTP 503 come again"),
        "{}",
        said.err
    );
}

#[test]
fn the_exam_refuses_a_judge_of_places() {
    let endpoint = Endpoint::new(Box::new(|_, _| (200, "", "9 1".to_owned())));
    let judge = |exam: &str| {
        endpoint.judge(&format!(
            "exam: {{ from: labels.json, accuracy_min: 0, {exam} }}"
        ))
    };
    let label = |number: usize| json!({ "id": format!("l{number}"), "prompt": "Which?", "chosen": format!("Yes {number}"), "rejected": "No" });
    let labels: Vec<_> = (0..10).map(label).collect();
    let scene = scene(&judge("flip_rate_max: 0.2"), 2);
    scene.write("labels.json", serde_json::to_vec(&labels).unwrap());
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert_eq!(said.code, Some(1));
    assert!(said.err.contains("judge_exam_flip_rate"), "{}", said.err);
    let run = ovchat_data::store::RunFolder::read(&scene.path("runs/scripted")).unwrap();
    let exam: Vec<Comparison> = run
        .reader("judge_exam", None)
        .flat_map(|batch| ovchat_data::tables::Row::from_batch(&batch.unwrap()).unwrap())
        .collect();
    assert!(exam.iter().all(|row: &Comparison| row.flips == Some(true)));
    assert!(
        run.manifest().find("rewards", Some(1)).is_none(),
        "nothing was scored"
    );
}

#[test]
fn a_reward_may_be_an_expression_and_several_may_be_one() {
    let scene = Scene::new();
    let pipeline = SCRIPTED
        .replace("judge: { scripted: {} }", "judge: { scripted: {} }\n  short: { sql: { reward: \"-length(text) + case when text = answer then 1000 else 0 end\" } }")
        .replace(
            "  pairs:",
            "  shortness: { score: { candidates: candidates, judge: short } }\n  both: { combine: { rewards: [rewards, shortness], weights: { shortness: 0.5 } } }\n  pairs:",
        )
        .replace("{ rewards: rewards }", "{ rewards: both }");
    scene.prompts(10).write("p.yaml", &pipeline);
    scene.succeeds(&["run", "p.yaml"]);
    let query = |sql: &str| {
        scene
            .succeeds(&["sql", "scripted", sql, "--format", "csv"])
            .out
    };
    let short = query(
        "select count(*) as n, count(*) filter (where r.reward <> -length(c.text)) as other from shortness r
         join candidates c on c.round = r.round and c.prompt_id = r.prompt_id and c.candidate = r.candidate",
    );
    assert_eq!(short, "n,other\n100,0\n");
    // Computed by SQL: the z-score of each judge's reward among the answers to a prompt.
    let apart = query(
        "with a as (select round, prompt_id, candidate, (reward - avg(reward) over w) / stddev_pop(reward) over w as z
                    from rewards window w as (partition by round, prompt_id)),
              b as (select round, prompt_id, candidate, case when stddev_pop(reward) over w = 0 then 0 else
                    (reward - avg(reward) over w) / stddev_pop(reward) over w end as z
                    from shortness window w as (partition by round, prompt_id))
         select count(*) as n, max(abs(c.reward - (a.z + 0.5 * b.z))) < 0.00001 as equal, min(c.judge) as judge
         from both c
         join a on a.round = c.round and a.prompt_id = c.prompt_id and a.candidate = c.candidate
         join b on b.round = c.round and b.prompt_id = c.prompt_id and b.candidate = c.candidate",
    );
    assert_eq!(apart, "n,equal,judge\n100,true,judge+short\n");
    assert_eq!(
        query("select count(*) > 0 as some from pairs"),
        "some\ntrue\n"
    );

    // A reward that is not a number rejects its prompt; an invalid expression is an error before
    // the run.
    let faulty = pipeline.replace("-length(text) +", "nullif(length(text), length(text)) +");
    scene.write("p.yaml", &faulty);
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert!(
        flat(&said.err).contains("`reward` is not a finite number for answer 0 null"),
        "{}",
        said.err
    );
    scene.write("p.yaml", pipeline.replace("-length(text)", "-length(txt)"));
    let said = scene.pipeline(&["check", "p.yaml"]);
    assert!(
        said.err.contains("config::sql") && said.err.contains("txt"),
        "{}",
        said.err
    );
}
