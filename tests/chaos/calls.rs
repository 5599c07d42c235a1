//! Kills of a run during calls to an endpoint: an answered call is never repeated, and the rewards
//! equal those of an undisturbed run.

use std::collections::{BTreeSet, HashSet};
use std::os::unix::process::ExitStatusExt as _;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{doom, line_plan, shim};
use crate::hostile_endpoints::{Endpoint, reply};
use crate::judges::{by_length, pipeline};
use crate::scene::{Numbers, Scene};

/// The seed of the moments.
const SEED: u64 = 20_261_129;

/// The number of kills, every other one at an operation on the call log.
const KILLS: usize = 16;

/// Concurrent calls.
const CONCURRENCY: usize = 6;

/// The longest duration of a run.
const LIMIT: Duration = Duration::from_mins(1);

/// Returns the numbers of the calls in the call log, from the reported token counts, and the hashes
/// of their questions.
fn journaled(scene: &Scene) -> (BTreeSet<usize>, HashSet<String>) {
    let text = std::fs::read(scene.path("runs/scripted/calls/judge.jsonl")).unwrap_or_default();
    let whole = text.split_inclusive(|byte| *byte == b'\n');
    let calls: Vec<Value> = whole
        .filter(|line| line.ends_with(b"\n"))
        .map(|line| serde_json::from_slice(line).unwrap())
        .collect();
    let number = |call: &Value| call["prompt_tokens"].as_u64().unwrap() as usize;
    let hash = |call: &Value| call["hash"].as_str().unwrap().to_owned();
    let numbers: BTreeSet<usize> = calls.iter().map(number).collect();
    assert_eq!(numbers.len(), calls.len(), "a call is written down twice");
    (numbers, calls.iter().map(hash).collect())
}

/// Starts a slow endpoint that numbers its replies and appends each question to `heard`.
fn slow_endpoint(heard: &Arc<Mutex<Vec<String>>>) -> Endpoint {
    let heard = Arc::clone(heard);
    Endpoint::new(move |out, _, question| {
        let number = {
            let mut heard = heard.lock().unwrap();
            heard.push(question.to_owned());
            heard.len()
        };
        thread::sleep(Duration::from_millis(10 + (number as u64 * 7) % 30));
        let usage = json!({ "prompt_tokens": number, "completion_tokens": 1 });
        // The connection is closed after a kill.
        drop(out.write_all(&reply(&by_length(question), &usage)));
    })
}

#[test]
fn what_was_paid_for_is_asked_once_however_often_the_run_is_killed() {
    // All questions in the order of their arrival.
    let heard: Arc<Mutex<Vec<String>>> = Arc::default();
    let endpoint = slow_endpoint(&heard);
    let judge = endpoint.judge(&format!("concurrency_max: {CONCURRENCY}"));
    let scene = || {
        let scene = Scene::new();
        scene.prompts(30).write("p.yaml", pipeline(&judge));
        scene
    };
    let undisturbed = scene();
    undisturbed.succeeds(&["run", "p.yaml"]);
    let questions = std::mem::take(&mut *heard.lock().unwrap());
    let distinct = questions.iter().collect::<HashSet<_>>().len();
    assert_eq!(questions.len(), distinct, "a question comes twice");

    let scene = scene();
    let shim = shim(&undisturbed);
    let mut numbers = Numbers(SEED);
    let (mut known, mut under_way) = (BTreeSet::new(), 0);
    for kill in 0..KILLS {
        let before = heard.lock().unwrap().len();
        let mut command = scene.command(&["run", "p.yaml"]);
        command.stderr(Stdio::null());
        let is_planned = kill % 2 == 0;
        // The first kill hits a new call log.
        let plan = line_plan("/calls", kill / 2, 10 + numbers.below(14));
        if is_planned {
            doom(&mut command, &scene, &shim, &plan);
        }
        let begun = Instant::now();
        let mut child = command.spawn().unwrap();
        let wanted = before + 2 + numbers.below(12);
        let rest = Duration::from_micros(numbers.below(20_000) as u64);
        while child.try_wait().unwrap().is_none() {
            if !is_planned && heard.lock().unwrap().len() >= wanted {
                thread::sleep(rest);
                child.kill().unwrap();
            }
            assert!(begun.elapsed() < LIMIT, "kill {kill}: the run hangs");
            thread::sleep(Duration::from_millis(1));
        }
        let ended = child.wait().unwrap();
        assert_eq!(ended.signal(), Some(9), "kill {kill} ({plan}): {ended}");
        // Gives the run time to read the replies that were sent.
        thread::sleep(Duration::from_millis(200));
        let (now, _) = journaled(&scene);
        assert!(
            known.is_subset(&now),
            "kill {kill} ({plan}): calls that were written down are gone"
        );
        let lost = (heard.lock().unwrap().len() - before) - (now.len() - known.len());
        assert!(
            lost <= CONCURRENCY,
            "kill {kill} ({plan}): {lost} calls are lost, and {CONCURRENCY} can be under way"
        );
        under_way += lost;
        known = now;
    }
    scene.succeeds(&["run", "p.yaml"]);
    assert_eq!(
        scene.tables("runs/scripted"),
        undisturbed.tables("runs/scripted")
    );
    let (now, hashes) = journaled(&scene);
    assert!(known.is_subset(&now));
    assert_eq!((now.len(), hashes.len()), (distinct, distinct));
    let heard = heard.lock().unwrap();
    assert_eq!(heard.iter().collect::<HashSet<_>>().len(), distinct);
    let torn =
        std::fs::read(scene.path("runs/scripted/calls/judge.jsonl.torn")).unwrap_or_default();
    let torn = torn.split_inclusive(|byte| *byte == b'\n').count();
    println!(
        "{KILLS} kills mid-call: {distinct} questions, {} calls, {under_way} of them under way at a kill, \
         {torn} torn lines set aside, seed {SEED}",
        heard.len()
    );
    assert!(torn > 0, "no line was torn");
    assert_eq!(
        heard.len(),
        distinct + under_way,
        "a call was paid for twice"
    );
    assert!(under_way >= KILLS, "kills hit no calls");
}
