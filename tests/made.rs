//! Models that a pipeline trains from examples and labels, and their files.

use ovchat_data::store::RunFolder;
use ovchat_data::tables::{Candidate, Comparison, Row};

use crate::networks::names;
use crate::scene::{ROOT, Scene};

/// The folder of the reward model without an adapter in `tests/parity`.
fn folder(part: &str) -> String {
    format!("{ROOT}/tests/parity/reward/{part}")
}

fn judge(base: &str, vision: &str, adapter: &str) -> String {
    let prompt = folder("prompt.txt");
    format!(
        "judge: {{ llava_rlhf: {{ base: {base}, vision: {vision}, {adapter} prompt: {prompt}, device: cpu }} }}"
    )
}

/// A `compare` stage over the pairs that the judge was trained on.
fn compare() -> String {
    format!(
        "
  records: {{ load_feedback: {{ from: records.json, images: {} }} }}
  agreement: {{ compare: {{ pairs: records, judge: judge }} }}
",
        folder("images")
    )
}

/// Trains an adapter for a reward model's base, and a policy on one answer, from a few examples.
fn made() -> Scene {
    let scene = Scene::new();
    let parity = format!("{ROOT}/tests/parity");
    let record = |number: usize| {
        serde_json::json!({ "id": format!("q{number}"), "image": "wide.png", "prompt": format!("Is it {number}?"),
            "answer": "It is so.", "chosen": "It is so.", "rejected": "No." })
    };
    let records: Vec<_> = (0..4).map(record).collect();
    scene.write("records.json", serde_json::to_vec(&records).unwrap());
    let compare = compare();
    scene.write(
        "p.yaml",
        format!(
            "
pipeline: made
models:
  {}
  policy: {{ llava_onevision: {{ weights: {parity}/onevision, device: cpu }} }}
stages:
  lessons: {{ load_prompts: {{ from: records.json, images: {images} }} }}
  feedback: {{ load_feedback: {{ from: records.json, images: {images} }} }}
  sft: {{ train_sft: {{ prompts: lessons, model: judge, learning_rate: 1.0e-3, batch_prompts: 2 }} }}
  reward: {{ train_reward: {{ pairs: feedback, model: judge, after: sft, rank: 4, learning_rate: 2.0e-2, batch_pairs: 1, epochs: 3, save_every: 2 }} }}
  words: {{ train_sft: {{ prompts: lessons, model: policy, learning_rate: 1.0e-2, batch_prompts: 2, epochs: 20, save_every: 7 }} }}
evaluate:{compare}  answers: {{ sample: {{ prompts: lessons, model: policy, count: 1, temperature: 0, max_new_tokens: 16 }} }}
",
            judge(&folder("base"), &folder("vision"), ""),
            images = folder("images"),
        ),
    );
    scene.succeeds(&["run", "p.yaml"]);
    scene
}

#[test]
fn a_plan_counts_what_trainings_read_and_says_what_they_take() {
    let scene = made();
    let plan = scene.succeeds(&["plan", "p.yaml", "--json"]).out;
    let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
    let of = |list: &str, table: &str| {
        let list = plan[list].as_array().unwrap().iter();
        let found = list.clone().find(|one| one["table"] == table);
        found.unwrap_or_else(|| panic!("{list:?}")).clone()
    };
    for (table, epochs) in [("sft", 1), ("reward", 3), ("words", 20)] {
        let counted = of("tokens", table);
        let query = format!("select sum(tokens) / {epochs} as tokens from {table}");
        let read = scene
            .succeeds(&["sql", "made", &query, "--format", "csv"])
            .out;
        let read: u64 = read.lines().nth(1).unwrap().parse().unwrap();
        let sum = counted["sum"].as_u64().unwrap();
        match table {
            // Both texts of a pair count in full.
            "reward" => assert!(read / 2 < sum && sum < read, "{sum} of {read}"),
            _ => assert_eq!(sum, read),
        }
        let taken = of("memory", table);
        let longest = counted["longest_id"].as_str().unwrap();
        assert!(
            taken["worst"].as_str().unwrap().contains(longest),
            "{taken}"
        );
        assert!(taken["peak"].as_u64() > taken["bytes"]["weights"].as_u64());
    }
}

/// The answers before and after training stand one below the other.
#[test]
fn a_model_is_asked_as_it_was_and_as_it_is() {
    let scene = made();
    let image = format!("{}/wide.png", folder("images"));
    let ask = |more: &[&str]| {
        let arguments = [
            "ask",
            "made",
            "--image",
            &image,
            "Is it 0?",
            "--max-new-tokens",
            "16",
        ];
        scene.pipeline(&[&arguments[..], more].concat())
    };
    let said = ask(&["--json"]);
    assert_eq!(said.code, Some(0), "{}", said.err);
    let answers: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(
        (answers[0]["round"].as_i64(), answers[1]["round"].as_i64()),
        (Some(0), Some(1))
    );
    assert_eq!(answers[1]["answer"], "It is so.");
    assert_ne!(answers[0]["answer"], answers[1]["answer"]);
    let said = ask(&["--rounds", "1"]);
    assert_eq!(said.out, "round 1\nIt is so.\n\n");
    let said = ask(&["--rounds", "2"]);
    assert_eq!(said.code, Some(2));
    assert!(
        said.err
            .contains("was not trained in round 2; its last round is 1"),
        "{}",
        said.err
    );
    let missing = scene.pipeline(&["ask", "made", "--image", "none.png", "Is it 0?"]);
    assert!(
        missing
            .err
            .contains("cannot read image none.png: No such file"),
        "{}",
        missing.err
    );
}

#[test]
fn a_reward_model_and_a_policy_are_made_and_taken_out() {
    let scene = made();
    let compare = compare();
    let read = |run: &str, table: &str, round| {
        let run = RunFolder::read(&scene.path(run)).unwrap();
        run.reader(table, round)
            .map(Result::unwrap)
            .collect::<Vec<_>>()
    };
    let comparisons = |run: &str, round| -> Vec<Comparison> {
        let batches = read(run, "agreement", round);
        batches
            .iter()
            .flat_map(|batch| Comparison::from_batch(batch).unwrap())
            .collect()
    };
    let trained = comparisons("runs/made", Some(1));
    assert!(trained.iter().all(|row| row.agrees), "{trained:?}");
    // A judge without an adapter scores only after its training.
    let run = RunFolder::read(&scene.path("runs/made")).unwrap();
    assert!(run.manifest().find("agreement", Some(0)).is_none());
    let answers = read("runs/made", "answers", Some(1));
    let answers = answers
        .iter()
        .flat_map(|batch| Candidate::from_batch(batch).unwrap());
    let texts: Vec<String> = answers.map(|answer| answer.text).collect();
    assert_eq!(texts, ["It is so."; 4]);

    // The exported model gives the same scores.
    let said = scene.pipeline(&["export", "made", "checkpoint", "--to", "out"]);
    assert!(
        said.err.contains("--model judge or --model policy"),
        "{}",
        said.err
    );
    scene.succeeds(&[
        "export",
        "made",
        "checkpoint",
        "--model",
        "judge",
        "--to",
        "out",
    ]);
    assert_eq!(names(&scene.path("out")), ["adapter", "base", "vision"]);
    scene.write(
        "again.yaml",
        format!(
            "
pipeline: again
models:
  {}
stages:{compare}",
            judge("out/base", "out/vision", "adapter: out/adapter,")
        ),
    );
    scene.succeeds(&["run", "again.yaml"]);
    for (first, second) in trained.iter().zip(comparisons("runs/again", None)) {
        assert!((first.margin - second.margin).abs() < 1e-6);
    }
}
