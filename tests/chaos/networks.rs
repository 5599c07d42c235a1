//! Kills while networks sample, score and train: the result is byte-identical to that of an
//! undisturbed run.

use super::{Chaos, MODES, ONE_THREAD, doom, shim};
use ovchat_data::store::RunFolder;

use crate::networks::models;
use crate::scene::{Numbers, ROOT, Scene, said};

/// The seed of the operations.
const SEED: u64 = 20_261_129;

/// The number of kills.
const KILLS: usize = 20;

/// The classes of operations that a kill hits, and the number of operations to draw from.
const PLACES: [(&str, usize); 4] = [
    ("commit", 16),
    ("state-", 60),
    ("checkpoints/", 60),
    ("any", 200),
];

pub const RUN: &str = "runs/chaos";

/// Two rounds with the smallest checkpoints: answers, rewards, and each kind of training stage.
pub fn scene() -> Scene {
    let scene = Scene::new();
    let record = |number: usize| {
        serde_json::json!({ "id": format!("q{number}"), "image": "wide.png", "prompt": format!("Is it {number}?"),
            "answer": "It is so.", "chosen": "It is so.", "rejected": format!("No, {number}.") })
    };
    let records: Vec<_> = (0..6).map(record).collect();
    scene.write("records.json", serde_json::to_vec(&records).unwrap());
    let parity = format!("{ROOT}/tests/parity");
    let models = models(&format!("{parity}/onevision"), &format!("{parity}/reward"));
    scene.write(
        "p.yaml",
        format!(
            "
pipeline: chaos
seed: 5
rounds: 2
{models}
stages:
  prompts: {{ load_prompts: {{ from: records.json, images: {parity}/reward/images }} }}
  feedback: {{ load_feedback: {{ from: records.json, images: {parity}/reward/images }} }}
  reward: {{ train_reward: {{ pairs: feedback, model: judge, learning_rate: 1.0e-2, batch_pairs: 2, save_every: 1 }} }}
  words: {{ train_sft: {{ prompts: prompts, model: policy, learning_rate: 1.0e-3, batch_prompts: 2, save_every: 1, keep_last: 2 }} }}
  candidates:
    sample: {{ prompts: prompts, model: policy, count: 3, temperature: 1.5, top_p: 1.0, max_new_tokens: 4, part: 2 }}
  rewards: {{ score: {{ candidates: candidates, judge: judge, part: 2 }} }}
  pairs: {{ select_extremes: {{ rewards: rewards }} }}
  steps: {{ train_dpo: {{ pairs: pairs, model: policy, after: words, learning_rate: 1.0e-3, batch_pairs: 2, save_every: 1 }} }}
"
        ),
    );
    scene
}

#[test]
fn networks_killed_at_commits_states_and_checkpoints_end_with_the_same_weights() {
    let undisturbed = scene();
    let mut command = undisturbed.command(&["run", "p.yaml"]);
    let said = said(command.envs([ONE_THREAD]).output().unwrap());
    assert_eq!(said.code, Some(0), "{}", said.err);
    let weights = undisturbed.checkpoints(RUN);
    let of_trainings = ["reward", "words", "steps"].map(|name| {
        let of_one = |round| undisturbed.path(&format!("{RUN}/checkpoints/round-{round}-{name}"));
        [of_one(1), of_one(2)].map(|folder| weights.keys().any(|file| file.starts_with(&folder)))
    });
    assert_eq!(of_trainings, [[true; 2]; 3]);
    let shim = shim(&undisturbed);
    let mut numbers = Numbers(SEED);
    let mut kills = [0; PLACES.len()];
    let mut runs = 0;
    while kills.iter().sum::<usize>() < KILLS {
        let mut chaos = Chaos::new(scene(), RUN, &shim);
        let mut before = (0, 0);
        loop {
            let place = numbers.below(PLACES.len());
            let (class, most) = PLACES[place];
            let mode = MODES[numbers.below(3)];
            let (operation, power) = (1 + numbers.below(most), numbers.below(2));
            // The last run is not killed.
            let is_last = kills.iter().sum::<usize>() == KILLS;
            let operation = if is_last { 0 } else { operation };
            let plan = format!("{class} {mode} {operation} {power}");
            if chaos.run(&plan) {
                break;
            }
            kills[place] += 1;
            before = chaos.keeps(before, &plan);
        }
        chaos.is_like(&undisturbed);
        runs += 1;
    }
    let places = PLACES.map(|(class, _)| class);
    println!("kills of {runs} runs with networks: {kills:?} at {places:?}, seed {SEED}");
    assert!(kills.iter().all(|kills| *kills > 0), "{kills:?}");
}

/// A table or training that a process with two threads began is finished with two by a process that would
/// take one, since the number affects the last bits.
#[test]
fn what_was_begun_with_two_threads_is_finished_with_two() {
    const THREADS: &str = "OMP_NUM_THREADS";
    let threads_of = |scene: &Scene, table: &str, round: u32| {
        let run = RunFolder::read(&scene.path(RUN)).unwrap();
        let made = run.manifest().find(table, Some(round));
        made.and_then(|made| made.threads)
    };
    let is_begun = |scene: &Scene, table: &str| {
        let Ok(run) = RunFolder::read(&scene.path(RUN)) else {
            return false;
        };
        let made = run.manifest().under_way(table, Some(1));
        made.is_some_and(|made| !made.complete && made.parts.len() + made.states.len() > 0)
    };
    let undisturbed = scene();
    let mut whole = undisturbed.command(&["run", "p.yaml"]);
    let whole = said(whole.env(THREADS, "2").output().unwrap());
    assert_eq!(whole.code, Some(0), "{}", whole.err);
    let kills: [(&str, fn(usize) -> String); 2] = [
        ("reward", |turn| format!("commit after {} 1", turn + 2)),
        ("candidates", |_| {
            "candidates/round-1/part-00001 before 1 0".to_owned()
        }),
    ];
    for (table, kill) in kills {
        let scene = scene();
        let shim = shim(&scene);
        for turn in 0.. {
            let mut command = scene.command(&["run", "p.yaml"]);
            doom(&mut command, &scene, &shim, &kill(turn));
            let killed = said(command.env(THREADS, "2").output().unwrap());
            assert_eq!(killed.code, None, "{table} is never seen begun");
            if is_begun(&scene, table) {
                break;
            }
        }
        let mut rest = scene.command(&["run", "p.yaml"]);
        let rest = said(rest.env(THREADS, "1").output().unwrap());
        assert_eq!(rest.code, Some(0), "{}", rest.err);
        assert_eq!(threads_of(&scene, table, 1), Some(2), "{table}");
        assert_eq!(threads_of(&scene, table, 2), Some(1), "{table}");
        let own = |scene: &Scene| scene.tables(RUN)[&format!("{table} Some(1)")].clone();
        assert_eq!(own(&scene), own(&undisturbed), "{table}");
    }
}
