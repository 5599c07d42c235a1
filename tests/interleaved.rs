//! Prompts with no, one and several images, in front of the text, within it and in later turns,
//! through the whole loop.

use std::path::Path;

use arrow::array::{Array, AsArray};
use serde_json::{Value, json};

use ovchat_data::store::{RunFolder, TableReader};
use ovchat_data::tables::{Candidate, DpoStep, Pair, Prompt, Row};

use crate::scene::{ROOT, Scene};

/// A loop of one round over seven prompts whose images stand in different places.
fn scene() -> Scene {
    let scene = Scene::new();
    let samples = format!("{ROOT}/data-samples");
    let mut images: Vec<_> = std::fs::read_dir(format!("{samples}/images/train"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    images.sort();
    let [one, two, three] = [0, 1, 2].map(|index| format!("train/{}", images[index]));
    let turns = json!([
        {"role": "user", "text": "<image>\nWhat is this?"},
        {"role": "assistant", "text": "A circle."},
    ]);
    let records = json!([
        {"id": "none", "prompt": "Say something."},
        {"id": "one", "image": one, "prompt": "What is this? <image>"},
        {"id": "front", "image": [one, two], "prompt": "Which is larger?"},
        {"id": "within", "image": [one, two], "prompt": "Is <image> larger than <image>?"},
        {"id": "again", "image": [one, three], "prompt": "Is <image> larger than <image>?"},
        {"id": "later", "image": [one, two], "turns": turns, "prompt": "And <image>?"},
        {"id": "three", "image": [one, two, three], "turns": turns,
            "prompt": "Image-2: <image>\nImage-3: <image>"},
        {"id": "few", "image": [one, two, three], "prompt": "<image> or <image>?"},
    ]);
    scene.write("prompts.json", records.to_string());
    let load = format!("images: {samples}/images");
    scene.write("p.yaml", pipeline("places", &load));
    scene
}

/// Returns a loop of one round with the networks of the small world; `load` are settings of
/// `load_prompts`.
pub fn pipeline(name: &str, load: &str) -> String {
    let samples = format!("{ROOT}/data-samples");
    format!(
        "
pipeline: {name}
seed: 5
models:
  policy: {{ llava_onevision: {{ weights: {samples}/policy, device: cpu }} }}
  judge: {{ sql: {{ reward: length(text) }} }}
  own: {{ self: {{ model: policy, ask: {{ max_new_tokens: 2, retries: 0, verdict: \"^(?<better_first>[^z]*$)|^(?<better_second>z)|^(?<tie>$)\" }} }} }}
stages:
  prompts:
    load_prompts: {{ from: prompts.json, {load} }}
  candidates:
    sample: {{ prompts: prompts, model: policy, count: 3, temperature: 1.5, top_p: 1.0, max_new_tokens: 6 }}
  opinions:
    score: {{ candidates: candidates, judge: own }}
  rewards:
    score: {{ candidates: candidates, judge: judge }}
  pairs:
    select_extremes: {{ rewards: rewards }}
  steps:
    train_dpo: {{ pairs: pairs, model: policy, learning_rate: 1.0e-3, batch_pairs: 4 }}
reject_share_max: 0.9
"
    )
}

fn rows<R: Row>(scene: &Scene, table: &str) -> Vec<R> {
    let run = RunFolder::read(&scene.path("runs/places")).unwrap();
    let round = (table != "prompts").then_some(1);
    run.reader(table, round)
        .flat_map(|batch| R::from_batch(&batch.unwrap()).unwrap())
        .collect()
}

#[test]
fn images_in_any_place_are_sampled_judged_trained_on_and_exported() {
    let scene = scene();
    scene.succeeds(&["run", "p.yaml", "--until", "prompts"]);
    let prompts: Vec<Prompt> = rows(&scene, "prompts");
    let questions: Vec<&str> = prompts.iter().map(|row| row.question.as_str()).collect();
    assert_eq!(
        questions,
        [
            "Say something.",
            "What is this?",
            "Which is larger?",
            "Is <image> larger than <image>?",
            "Is <image> larger than <image>?",
            "<image>\nAnd ?",
            "Image-2: <image>\nImage-3: <image>",
        ]
    );
    let reason = "select reason from rejects where stage = 'prompts'";
    let reason = scene
        .succeeds(&["sql", "places", reason, "--format", "csv"])
        .out;
    assert!(
        reason.contains(
            "found 3 images but 2 `<image>` placeholders; write one for each image, or none"
        ),
        "{reason}"
    );

    let plan = scene.succeeds(&["plan", "p.yaml", "--format", "json"]).out;
    let plan: Value = serde_json::from_str(&plan).unwrap();
    scene.succeeds(&["run", "p.yaml"]);
    let tokens = "select sum(prompt_tokens) as n from telemetry where stage = 'candidates'";
    let read = scene
        .succeeds(&["sql", "places", tokens, "--format", "csv"])
        .out;
    let read: u64 = read.lines().last().unwrap().parse().unwrap();
    let counted = find(&plan, &json!("candidates")).expect("the tokens of the stage");
    assert_eq!(counted, read, "{plan}");

    let candidates: Vec<Candidate> = rows(&scene, "candidates");
    assert_eq!(candidates.len(), 21);
    for step in rows::<DpoStep>(&scene, "steps") {
        assert!(step.loss.is_finite() && step.grad_norm > 0.0, "{step:?}");
    }
    let again = scene.succeeds(&["run", "p.yaml"]).err;
    assert!(again.contains("up to date"), "{again}");

    let pairs: Vec<Pair> = rows(&scene, "pairs");
    assert!(pairs.len() > 4, "{pairs:?}");
    let to = [
        "export",
        "places",
        "pairs",
        "--format",
        "trl",
        "--to",
        "out/pairs.parquet",
    ];
    scene.succeeds(&to);
    let written = conversations(&scene.path("out/pairs.parquet"));
    assert_eq!(written.len(), pairs.len());
    let of = |id: &str| &written.iter().find(|(own, _)| own == id).unwrap().1;
    if written.iter().any(|(id, _)| id == "within") {
        assert_eq!(of("within"), "user: Is |[image]| larger than |[image]|?");
    }
    if written.iter().any(|(id, _)| id == "later") {
        assert_eq!(
            of("later"),
            "user: [image]|What is this?; assistant: A circle.; user: [image]|And ?"
        );
    }
    let said = scene.pipeline(&["export", "places", "pairs", "--to", "out/pairs.json"]);
    assert_eq!(said.code, Some(1));
    assert!(said.err.contains("--format trl"), "{}", said.err);
}

/// A query can build prompts with another number of placeholders than images.
#[test]
fn a_plan_tells_the_prompts_that_cannot_be_read() {
    let scene = scene();
    let query = "select * replace (question || ' <image>' as question) from prompts";
    let twisted =
        format!("  twisted:\n    sql: {{ query: \"{query}\", tables: [prompts] }}\nreject");
    let yaml = std::fs::read_to_string(scene.path("p.yaml")).unwrap();
    let yaml = yaml.replace("sample: { prompts: prompts,", "sample: { prompts: twisted,");
    scene.write("p.yaml", yaml.replace("reject", &twisted));
    scene.succeeds(&["run", "p.yaml", "--until", "twisted"]);
    let plan = scene.succeeds(&["plan", "p.yaml"]).out;
    let words = "5 prompts cannot be read and will be rejected; the first is `front`: the prompt has 2 images \
                 but its texts have 1 `<image>` placeholder; write one for each image, or none";
    assert!(plan.contains(words), "{plan}");
    scene.succeeds(&["run", "p.yaml", "--until", "candidates"]);
    assert_eq!(rows::<Candidate>(&scene, "candidates").len(), 6);
}

/// Returns the number of tokens that a plan counts for a stage.
fn find(plan: &Value, stage: &Value) -> Option<u64> {
    let counts = plan["tokens"].as_array()?;
    counts.iter().find(|own| own["table"] == *stage)?["sum"].as_u64()
}

/// Returns the ids and the conversations of an export for TRL, as text.
fn conversations(path: &Path) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for batch in TableReader::new(vec![path.to_owned()]) {
        let batch = batch.unwrap();
        let ids = batch.column(0).as_string::<i32>();
        let prompts = batch.column(2).as_list::<i32>();
        let images = batch.column(1).as_list::<i32>();
        for row in 0..batch.num_rows() {
            let messages = prompts.value(row);
            let messages = messages.as_struct();
            let roles = messages.column(0).as_string::<i32>();
            let contents = messages.column(1).as_list::<i32>();
            let said = (0..messages.len()).map(|message| {
                let parts = contents.value(message);
                let texts = parts.as_struct().column(1).as_string::<i32>();
                let parts = (0..texts.len()).map(|part| match texts.is_null(part) {
                    true => "[image]",
                    false => texts.value(part),
                });
                let parts: Vec<&str> = parts.collect();
                format!("{}: {}", roles.value(message), parts.join("|"))
            });
            let said = said.collect::<Vec<_>>().join("; ");
            assert_eq!(said.matches("[image]").count(), images.value(row).len());
            all.push((ids.value(row).to_owned(), said));
        }
    }
    all
}
