//! LLaVA-1.5 through the engine: the tiny checkpoints of the parity recording as policies and critics.

use std::path::Path;

use ovchat_data::store::RunFolder;
use ovchat_data::tables::{Candidate, DpoStep, Row, SftStep};

use crate::scene::{ROOT, Scene};

/// A pipeline of two rounds that trains the checkpoint in `folder` of the recording.
fn scene(folder: &str, training: &str) -> Scene {
    let scene = Scene::new();
    let weights = format!("{ROOT}/tests/parity/recorded/llava/{folder}");
    let samples = format!("{ROOT}/data-samples");
    scene.write(
        "p.yaml",
        format!(
            "
pipeline: llava
seed: 5
rounds: 2
models:
  policy: {{ llava: {{ weights: {weights}, device: cpu }} }}
  judge: {{ sql: {{ reward: length(text) }} }}
  critic: {{ critic: {{ weights: {weights}, device: cpu, ask: {{ max_new_tokens: 4 }} }} }}
stages:
  prompts:
    load_prompts: {{ from: {samples}/prompts.json, images: {samples}/images, limit: 6 }}
  candidates:
    sample: {{ prompts: prompts, model: policy, count: 3, temperature: 1.5, top_p: 1.0, max_new_tokens: 6 }}
  rewards:
    score: {{ candidates: candidates, judge: judge }}
  pairs:
    select_extremes: {{ rewards: rewards }}
  steps:
    {training}
"
        ),
    );
    scene
}

fn rows<R: Row>(scene: &Scene, table: &str, round: u32) -> Vec<R> {
    let run = RunFolder::read(&scene.path("runs/llava")).unwrap();
    run.reader(table, Some(round))
        .flat_map(|batch| R::from_batch(&batch.unwrap()).unwrap())
        .collect()
}

/// Returns the SHA-256 of a checkpoint's weights.
fn weights_of(folder: &Path) -> String {
    ovchat_data::store::digest(&std::fs::read(folder.join("model.safetensors")).unwrap())
}

#[test]
fn two_rounds_of_dpo_each_start_from_the_last_checkpoint() {
    let dpo = "train_dpo: { pairs: pairs, model: policy, learning_rate: 1.0e-3, batch_pairs: 2, reference_audit: { share: 1 } }";
    let scene = scene("training-trl", dpo);
    let plan = scene.succeeds(&["plan", "p.yaml"]).out;
    assert!(plan.contains("weights"), "{plan}");
    scene.succeeds(&["run", "p.yaml"]);
    let [first, second] = [1, 2].map(|round| rows::<Candidate>(&scene, "candidates", round));
    assert_eq!((first.len(), second.len()), (18, 18));
    assert_ne!(first[0].model, second[0].model);
    for step in rows::<DpoStep>(&scene, "steps", 2) {
        assert!(step.loss.is_finite() && step.grad_norm > 0.0, "{step:?}");
    }
    let run = scene.path("runs/llava");
    scene.succeeds(&["export", "llava", "checkpoint", "--to", "out"]);
    let out = scene.path("out");
    assert_eq!(
        weights_of(&out),
        weights_of(&run.join("checkpoints/round-2"))
    );
    assert!(out.join("tokenizer.json").is_file());
    // The exported folder is a policy again, and nothing is left to do.
    let yaml = std::fs::read_to_string(scene.path("p.yaml")).unwrap();
    let recorded = format!("{ROOT}/tests/parity/recorded/llava/training-trl");
    scene.write("q.yaml", yaml.replace(&recorded, "out"));
    scene.succeeds(&["check", "q.yaml"]);
    let again = scene.succeeds(&["run", "p.yaml"]).err;
    assert!(again.contains("up to date"), "{again}");
}

#[test]
fn an_adapter_is_trained_over_two_rounds() {
    let lora = "train_dpo: { pairs: pairs, model: policy, learning_rate: 1.0e-3, batch_pairs: 2, lora: { rank: 2, alpha: 4, targets: [q_proj, v_proj] } }";
    let scene = scene("training-trl", lora);
    scene.succeeds(&["run", "p.yaml"]);
    let folder = scene.path("runs/llava/checkpoints/round-2");
    assert!(folder.join("adapter_model.safetensors").is_file());
    let config = std::fs::read_to_string(folder.join("adapter_config.json")).unwrap();
    assert!(config.contains("model\\\\.language_model"), "{config}");
}

#[test]
fn answers_are_learned_and_a_critic_is_asked() {
    let sft = "train_sft: { prompts: answered, model: policy, learning_rate: 1.0e-3, batch_prompts: 2 }
  answered:
    sql: { query: \"select * exclude (answer), 'A red circle.' as answer from prompts\", tables: [prompts] }
  opinions:
    score: { candidates: candidates, judge: critic }";
    let scene = scene("training-sft", sft);
    scene.succeeds(&[
        "run",
        "p.yaml",
        "--set",
        "rounds=1",
        "--set",
        "reject_share_max=1",
    ]);
    let steps = rows::<SftStep>(&scene, "steps", 1);
    assert_eq!(steps.len(), 3);
    assert!(steps[2].loss < steps[0].loss + 1.0, "{steps:?}");
    // Random weights write no verdicts: every prompt is scored or rejected with the reason.
    let query = "select count(distinct id) as n from rejects where stage = 'opinions'";
    let rejected = scene
        .succeeds(&["sql", "llava", query, "--format", "csv"])
        .out;
    let query = "select count(distinct prompt_id) as n from opinions";
    let scored = scene
        .succeeds(&["sql", "llava", query, "--format", "csv"])
        .out;
    let number = |text: &str| text.lines().last().unwrap().parse::<u32>().unwrap();
    assert_eq!(number(&rejected) + number(&scored), 6);
}
