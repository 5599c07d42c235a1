//! Training stages that continue each other, comparisons, and the final report, with scripted
//! models.

use std::fs;

use ovchat_data::store::RunFolder;
use ovchat_data::tables::{Comparison, RewardStep, Row, SftStep};

use crate::scene::Scene;

const PIPELINE: &str = "
pipeline: trained
seed: 3
rounds: 2
models:
  judge: { scripted: {} }
stages:
  lessons: { load_prompts: { from: lessons.json } }
  feedback: { load_feedback: { from: feedback.json } }
  sft: { train_sft: { prompts: lessons, model: judge, batch_prompts: 4, save_every: 2 } }
  reward: { train_reward: { pairs: feedback, model: judge, after: sft, batch_pairs: 2 } }
evaluate:
  agreement: { compare: { pairs: feedback, judge: judge } }
report:
  agreed: { query: \"select round, avg(cast(agrees as int)) as share from agreement group by round\" }
  rounds:
    query: select * from agreed order by round
    chart: { x: round, lines: [share] }
";

/// A scene with twelve questions with answers, and six records of LLaVA-Human-Preference.
fn scene() -> Scene {
    let scene = Scene::new();
    let example = |number| serde_json::json!({ "id": format!("q{number}"), "prompt": format!("Question {number}?"), "answer": format!("Answer {number}.") });
    let examples: Vec<_> = (0..12).map(example).collect();
    scene.write("lessons.json", serde_json::to_vec(&examples).unwrap());
    let preference = |number| {
        serde_json::json!({ "id": format!("f{number}"), "preference": 1 + number % 2,
            "conversations": [{ "from": "human", "value": format!("Question {number}?") }, { "from": "gpt", "value": "" }],
            "output_1": { "value": "One." }, "output_2": { "value": "Two." } })
    };
    let feedback: Vec<_> = (0..6).map(preference).collect();
    scene.write("feedback.json", serde_json::to_vec(&feedback).unwrap());
    scene.write("p.yaml", PIPELINE);
    scene
}

fn rows<R: Row>(scene: &Scene, table: &str, round: u32) -> Vec<R> {
    let run = RunFolder::read(&scene.path("runs/trained")).unwrap();
    run.reader(table, Some(round))
        .flat_map(|batch| R::from_batch(&batch.unwrap()).unwrap())
        .collect()
}

/// Returns the memory of a scripted trainer: all examples that it has seen.
fn memory(scene: &Scene, checkpoint: &str) -> String {
    let path = format!("runs/trained/checkpoints/{checkpoint}/scripted.json");
    fs::read_to_string(scene.path(&path)).unwrap()
}

#[test]
fn a_training_goes_on_where_the_one_it_names_ended_and_rounds_go_on_from_the_last() {
    let scene = scene();
    scene.succeeds(&["run", "p.yaml"]);
    let sft: Vec<SftStep> = rows(&scene, "sft", 1);
    assert_eq!(
        sft.iter().map(|step| step.step).collect::<Vec<_>>(),
        [1, 2, 3]
    );
    assert_eq!(sft[0].learned_tokens, 4 * 3);
    assert_eq!(rows::<RewardStep>(&scene, "reward", 2).len(), 3);
    let memories = [
        "round-1-sft",
        "round-1-reward",
        "round-2-sft",
        "round-2-reward",
    ]
    .map(|checkpoint| memory(&scene, checkpoint));
    for (number, memory) in memories.iter().enumerate() {
        assert!(!memories[..number].contains(memory), "{memories:?}");
    }
    // A reward model trained on other answers is a different model.
    scene.write(
        "p.yaml",
        PIPELINE.replace("batch_prompts: 4", "batch_prompts: 3"),
    );
    let said = scene.succeeds(&["run", "p.yaml"]);
    assert!(
        said.err
            .contains("rebuilding sft (round 1): `batch_prompts` 4 → 3"),
        "{}",
        said.err
    );
    assert_ne!(memory(&scene, "round-1-reward"), memories[1]);
    // Restoring costs nothing.
    scene.write("p.yaml", PIPELINE);
    scene.succeeds(&["run", "p.yaml"]);
    assert_eq!(memory(&scene, "round-2-reward"), memories[3]);
}

#[test]
fn comparisons_say_whether_the_judge_agrees() {
    let scene = scene();
    scene.succeeds(&["run", "p.yaml"]);
    for round in 0..=2 {
        let rows: Vec<Comparison> = rows(&scene, "agreement", round);
        assert_eq!(rows.len(), 6);
        for row in &rows {
            assert_eq!(row.agrees, row.chosen_reward > row.rejected_reward);
            assert!((row.margin - (row.chosen_reward - row.rejected_reward)).abs() < 1e-6);
        }
        assert!(rows.iter().any(|row| row.agrees) && rows.iter().any(|row| !row.agrees));
    }
}

#[test]
fn the_report_is_printed_drawn_and_there_for_queries() {
    let scene = scene();
    let said = scene.succeeds(&["run", "p.yaml"]);
    assert!(said.out.contains("| round | share"), "{}", said.out);
    assert!(said.out.contains("\nrounds\n"), "{}", said.out);
    let svg = fs::read_to_string(scene.path("runs/trained/report/rounds.svg")).unwrap();
    assert_eq!(svg.matches("<circle").count(), 3);
    let query = "select round from rounds where share >= 0 order by round";
    let said = scene.succeeds(&["sql", "trained", query, "--format", "csv"]);
    assert_eq!(said.out, "round\n0\n1\n2\n");
    // A finished run prints the report again, and a changed report rebuilds nothing.
    scene.write(
        "p.yaml",
        PIPELINE.replace(
            "select * from agreed",
            "select round as r, share, round from agreed",
        ),
    );
    let said = scene.succeeds(&["run", "p.yaml"]);
    assert!(said.out.contains("| r | share"), "{}", said.out);
    assert!(said.err.contains("nothing to do"), "{}", said.err);
}

#[test]
fn a_prompt_without_an_answer_stops_the_training_by_name() {
    let scene = scene();
    scene.write(
        "lessons.json",
        r#"[{"id": "a", "prompt": "Why?", "answer": "So."}, {"id": "b", "prompt": "How?"}]"#,
    );
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert_eq!(said.code, Some(1));
    let words = "prompt b of `lessons` has no `answer` to train on";
    assert!(
        said.err.replace("\n  │ ", " ").contains(words),
        "{}",
        said.err
    );
}
