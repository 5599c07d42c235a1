//! Exams of judges before they score.

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use ovchat_data::store::{RunFolder, TableWriter};
use serde_json::json;

use crate::run::SCRIPTED;
use crate::scene::Scene;

/// Forty labels; the scripted judge, which scores by a hash, agrees with about half of them.
fn scene(exam: &str) -> Scene {
    let scene = Scene::new();
    let label = |number: usize| {
        let longer = if number.is_multiple_of(2) {
            "a rather long one"
        } else {
            "short"
        };
        json!({ "id": format!("label-{number}"), "prompt": format!("Question {number}?"),
                "chosen": format!("Answer {number}, {longer}"), "rejected": format!("Another {number}") })
    };
    let labels: Vec<_> = (0..40).map(label).collect();
    scene.write("labels.json", serde_json::to_vec(&labels).unwrap());
    let judge = format!("judge: {{ scripted: {{ exam: {{ from: labels.json, {exam} }} }} }}");
    scene.prompts(6).write(
        "p.yaml",
        SCRIPTED.replace("judge: { scripted: {} }", &judge),
    );
    scene
}

fn made(scene: &Scene) -> Vec<String> {
    let run = RunFolder::read(&scene.path("runs/scripted")).unwrap();
    let made = run.manifest().made.iter();
    made.map(|made| made.table.clone()).collect()
}

#[test]
fn a_judge_that_passes_scores_and_its_exam_is_a_table() {
    let scene = scene("accuracy_min: 0.2, length_correlation_max: 0.6");
    let plan = scene.succeeds(&["plan", "p.yaml"]).out;
    assert!(
        plan.contains("judge_exam = compare(pairs: judge_exam_labels, judge: judge)"),
        "{plan}"
    );
    scene.succeeds(&["run", "p.yaml"]);
    let tables = made(&scene);
    let place = |table: &str| tables.iter().position(|other| other == table).unwrap();
    assert!(place("judge_exam") < place("grades") && place("judge_exam") < place("rewards"));
    let query = "select count(*) as n, count(*) filter (where agrees) as agreed from judge_exam";
    let found = scene
        .succeeds(&["sql", "scripted", query, "--format", "csv"])
        .out;
    assert!(found.starts_with("n,agreed\n40,"), "{found}");
}

/// Labels in the format of hub data sets.
#[test]
fn labels_may_be_parquet() {
    let scene = scene("accuracy_min: 0.2");
    scene.succeeds(&["run", "p.yaml"]);
    let agreed = "select count(*) filter (where agrees) as agreed from judge_exam";
    let csv = |run: &str| scene.succeeds(&["sql", run, agreed, "--format", "csv"]).out;
    let before = csv("scripted");
    let text = std::fs::read(scene.path("labels.json")).unwrap();
    let labels: Vec<serde_json::Value> = serde_json::from_slice(&text).unwrap();
    let column = |name: &str| -> ArrayRef {
        let texts = labels.iter().map(|label| label[name].as_str());
        Arc::new(texts.collect::<StringArray>())
    };
    let names = ["id", "prompt", "chosen", "rejected"];
    let rows = RecordBatch::try_from_iter(names.map(|name| (name, column(name)))).unwrap();
    let mut writer = TableWriter::new(&scene.path(""), "labels", rows.schema(), &[]);
    writer.write(&rows).unwrap();
    writer.finish().unwrap();
    let from = "models.judge.scripted.exam.from=labels.parquet";
    scene.succeeds(&["run", "p.yaml", "--run", "runs/parquet", "--set", from]);
    assert_eq!(csv("runs/parquet"), before);
}

#[test]
fn a_judge_that_fails_scores_nothing() {
    let refused = |exam: &str, words: &str| {
        let scene = scene(exam);
        let said = scene.pipeline(&["run", "p.yaml"]);
        assert_eq!(said.code, Some(1), "{}", said.err);
        let told = said.err.replace("\n  │ ", " ").replace("\n  | ", " ");
        assert!(told.contains(words), "{told}");
        let tables = made(&scene);
        assert!(tables.contains(&"judge_exam".to_owned()), "{tables:?}");
        assert!(
            !tables
                .iter()
                .any(|table| table == "grades" || table == "rewards"),
            "{tables:?}"
        );
        scene
    };
    refused(
        "accuracy_min: 0.95",
        "expectation `judge_exam_accuracy` failed",
    );
    refused("accuracy_min: 0, length_correlation_max: 0", "is above 0");
    let golden = |reward: &str| {
        format!("accuracy_min: 0, golden: {{ id: label-3, chosen_reward: {reward} }}")
    };
    let scene = refused(&golden("7.5"), "expectation `judge_exam_golden` failed");
    refused(
        &golden("7.5").replace("label-3", "label-99"),
        "the value is null, or there are no rows",
    );
    let query = "select chosen_reward as reward from judge_exam where id = 'label-3'";
    let found = scene
        .succeeds(&["sql", "scripted", query, "--format", "csv"])
        .out;
    let reward = found.lines().nth(1).unwrap();
    let said = scene.succeeds(&[
        "run",
        "p.yaml",
        "--set",
        &format!("models.judge.scripted.exam.golden.chosen_reward={reward}"),
    ]);
    assert!(
        said.err.contains("judge_exam: 40 rows, up to date"),
        "{}",
        said.err
    );
}
