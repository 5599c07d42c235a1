//! The whole loop with networks: the tiny checkpoints of `data-samples`, through the engine.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use ovchat::store::RunFolder;
use ovchat::tables::{Candidate, DpoStep, Finish, Pair, Reference, Reward, Row};

use crate::scene::{ROOT, Scene};

/// Two short rounds on the small world.
fn scene() -> Scene {
    let scene = Scene::new();
    let samples = format!("{ROOT}/data-samples");
    scene.write(
        "p.yaml",
        format!(
            "
pipeline: networks
seed: 5
rounds: 2
models:
  policy: {{ llava_onevision: {{ weights: {samples}/policy, device: cpu }} }}
  judge:
    llava_rlhf:
      base: {samples}/reward/base
      vision: {samples}/reward/vision
      adapter: {samples}/reward/adapter
      prompt: {samples}/reward/prompt.txt
      device: cpu
stages:
  prompts:
    load_prompts: {{ from: {samples}/prompts.json, images: {samples}/images, captions: {samples}/captions.json, limit: 8 }}
  candidates:
    sample: {{ prompts: prompts, model: policy, count: 3, max_new_tokens: 6, part: 2 }}
  rewards:
    score: {{ candidates: candidates, judge: judge, part: 2 }}
  pairs:
    select_extremes: {{ rewards: rewards }}
  steps:
    train_dpo: {{ pairs: pairs, model: policy, learning_rate: 1.0e-4, batch_pairs: 2, save_every: 1 }}
"
        ),
    );
    scene
}

fn rows<R: Row>(scene: &Scene, table: &str, round: u32) -> Vec<R> {
    let run = RunFolder::read(&scene.path("runs/networks")).unwrap();
    run.reader(table, Some(round))
        .flat_map(|batch| R::from_batch(&batch.unwrap()).unwrap())
        .collect()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn networks_answer_score_and_learn_and_a_killed_run_ends_with_the_same_weights() {
    let undisturbed = scene();
    undisturbed.succeeds(&["run", "p.yaml"]);
    for round in [1, 2] {
        let candidates: Vec<Candidate> = rows(&undisturbed, "candidates", round);
        assert_eq!(candidates.len(), 24);
        for candidate in &candidates {
            assert_eq!(candidate.token_ids.len(), candidate.token_logps.len());
            assert!(candidate.token_ids.len() <= 6);
            assert!(candidate.finish == Finish::Stop || candidate.token_ids.len() == 6);
            assert!(candidate.token_logps.iter().all(|logp| *logp <= 0.0));
        }
        let rewards: Vec<Reward> = rows(&undisturbed, "rewards", round);
        assert!(rewards.len() == 24 && rewards.iter().all(|row| row.reward.is_finite()));
        let pairs: Vec<Pair> = rows(&undisturbed, "pairs", round);
        assert!(pairs.iter().all(|pair| pair.margin.unwrap() > 0.0));
        let steps: Vec<DpoStep> = rows(&undisturbed, "steps", round);
        assert_eq!(steps.len(), pairs.len().div_ceil(2));
        // The round starts at its reference, whose log-probabilities sampling left: no second pass,
        // and a loss of exactly log 2 but for float32.
        assert!(rows::<Reference>(&undisturbed, "steps_reference", round).is_empty());
        assert!(
            (steps[0].loss - std::f64::consts::LN_2).abs() < 1e-5,
            "{}",
            steps[0].loss
        );
        assert!(steps[0].grad_norm > 0.0);
        let checkpoint = undisturbed.path(&format!("runs/networks/checkpoints/round-{round}"));
        assert_eq!(
            names(&checkpoint),
            names(&Path::new(ROOT).join("data-samples/policy"))
        );
    }
    let weights = |scene: &Scene| {
        scene
            .checkpoints("runs/networks")
            .into_values()
            .collect::<Vec<_>>()
    };
    let before = fs::read(format!("{ROOT}/data-samples/policy/model.safetensors")).unwrap();
    assert!(
        weights(&undisturbed).iter().all(|file| *file != before),
        "the weights did not change"
    );

    let killed = scene();
    let moments = [
        ("candidates", 1, 1),
        ("rewards", 1, 1),
        ("steps", 1, 2),
        ("candidates", 2, 2),
        ("steps", 2, 1),
    ];
    for (table, round, parts) in moments {
        let mut child = killed
            .command(&["run", "p.yaml"])
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        loop {
            assert!(
                begun.elapsed() < Duration::from_mins(5),
                "`{table}` was not begun"
            );
            let run = RunFolder::read(&killed.path("runs/networks"));
            let made = run
                .as_ref()
                .ok()
                .and_then(|run| run.manifest().find(table, Some(round)));
            if made.is_some_and(|made| made.complete || made.parts.len() >= parts) {
                break;
            }
            assert!(
                child
                    .try_wait()
                    .unwrap()
                    .is_none_or(|status| status.success())
            );
            std::thread::yield_now();
        }
        let _ = child.kill();
        child.wait().unwrap();
    }
    killed.succeeds(&["run", "p.yaml"]);
    assert_eq!(
        killed.tables("runs/networks"),
        undisturbed.tables("runs/networks")
    );
    assert_eq!(weights(&killed), weights(&undisturbed));
}

#[test]
fn doctor_says_which_libtorch_it_found() {
    let said = Scene::new().succeeds(&["doctor"]);
    assert!(said.out.contains("libtorch 2.11"), "{}", said.out);
}
