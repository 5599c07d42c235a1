//! Plans of `pipeline plan`, compared with the run that follows.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::run::SCRIPTED;
use crate::scene::{ROOT, Scene};

/// Returns the plan of each table and round.
fn planned(scene: &Scene, more: &[&str]) -> BTreeMap<String, Value> {
    let said = scene.succeeds(&[&["plan", "p.yaml", "--json"], more].concat());
    let plan: Value = serde_json::from_str(&said.out).unwrap();
    let tables = plan["tables"].as_array().unwrap().iter();
    let name = |table: &Value| format!("{} {}", table["table"].as_str().unwrap(), table["round"]);
    tables.map(|table| (name(table), table.clone())).collect()
}

/// Counts the tables with this action.
fn those(tables: &BTreeMap<String, Value>, plan: &str) -> usize {
    tables
        .values()
        .filter(|table| table["plan"] == plan)
        .count()
}

#[test]
fn a_plan_says_what_is_made_and_why_and_it_happens_so() {
    let scene = Scene::new();
    scene.prompts(40).write("p.yaml", SCRIPTED);
    let first = planned(&scene, &[]);
    assert_eq!(those(&first, "make"), first.len());
    assert_eq!(first["candidates 1"]["rows"], 200);
    assert_eq!(first["pairs 1"]["rows"], 40, "one a prompt at most");
    assert_eq!(first["steps 2"]["rows"], 5);
    assert!(!scene.path("runs").exists(), "a plan writes nothing");
    scene.succeeds(&["run", "p.yaml"]);
    let done = planned(&scene, &[]);
    assert_eq!(those(&done, "reuse"), done.len());
    // The estimate of a new run comes from earlier rows on this machine.
    let other = planned(&scene, &["--run", "runs/other"]);
    for table in ["candidates 1", "pairs 2", "steps 1"] {
        let table = &other[table];
        assert_eq!(table["plan"], "make");
        assert!(table["seconds"].as_f64().unwrap() > 0.0, "{table}");
        assert!(table["bytes"].as_u64().unwrap() > 0, "{table}");
    }

    // A changed setting rebuilds the tables that depend on it, with the line of the setting as the
    // reason.
    let changed = SCRIPTED.replace("judge, part: 5 }", "judge, part: 5 }\n  # a remark");
    let changed = changed.replace("policy, part: 7 }", "policy, part: 7, count: 4 }");
    scene.write("p.yaml", &changed);
    let tables = planned(&scene, &[]);
    let candidates = &tables["candidates 1"];
    assert_eq!(candidates["reasons"][0]["text"], "`count` 5 → 4");
    assert_eq!(candidates["reasons"][0]["place"], "p.yaml:12");
    assert_eq!(
        (&candidates["plan"], &candidates["rows"]),
        (&"make".into(), &160.into())
    );
    assert!(candidates["seconds"].as_f64().unwrap() > 0.0);
    assert_eq!(tables["prompts null"]["plan"], "reuse");
    assert_eq!(
        tables["answers 0"]["plan"], "reuse",
        "no model has changed yet"
    );
    assert_eq!(
        tables["answers 1"]["reasons"][0]["text"],
        "its model `model` changed"
    );
    let text = scene.succeeds(&["plan", "p.yaml"]).out;
    assert!(text.contains("`count` 5 → 4 (p.yaml:12)"), "{text}");
    let said = scene.succeeds(&["run", "p.yaml"]).err;
    let make = those(&tables, "make");
    let reuse = those(&tables, "reuse");
    let expected = format!("done: {make} built, {reuse} up to date");
    assert!(said.contains(&expected), "{said}\n{expected}");

    // An archived table is restored.
    scene.write("p.yaml", SCRIPTED);
    let back = planned(&scene, &[]);
    assert_eq!(those(&back, "return"), make);
    let said = scene.succeeds(&["run", "p.yaml"]).err;
    assert!(said.contains("nothing to do"), "{said}");

    // A setting on the command line is a reason, too.
    let set = ["--set", "stages.rewards.score.part=9", "--set", "seed=4"];
    let seeded = planned(&scene, &set);
    assert_eq!(seeded["candidates 1"]["reasons"][0]["text"], "`seed` 3 → 4");
    assert_eq!(
        seeded["answers 0"]["plan"], "reuse",
        "greedy answers draw nothing"
    );

    let status = scene.succeeds(&["status", "runs/scripted", "--json"]).out;
    let status: Value = serde_json::from_str(&status).unwrap();
    let of_round_2 = status["tables"].as_array().unwrap().iter();
    let mut of_round_2 = of_round_2.filter(|table| table["round"] == 2);
    let candidates = of_round_2
        .find(|table| table["table"] == "candidates")
        .unwrap();
    assert_eq!(candidates["expected"]["rows"], 200);
    assert!(candidates["expected"]["seconds"].is_f64(), "by round 1");
}

/// `extends`: relative paths start at their own file, and the result equals that of a single file.
#[test]
fn a_file_says_what_differs_from_another() {
    let scene = Scene::new();
    scene.prompts(12).write("base.yaml", SCRIPTED);
    scene.write("p.yaml", SCRIPTED.replace("rounds: 2", "rounds: 1"));
    scene.succeeds(&["run", "p.yaml"]);
    scene.write(
        "prod/common.yaml",
        "extends: ../base.yaml\nrounds: 1\nvars: { many: 4 }\n",
    );
    scene.write(
        "prod/p.yaml",
        "extends: common.yaml\nevaluate: { grades: null }\n",
    );
    let said = scene.succeeds(&["plan", "prod/p.yaml"]).out;
    assert!(
        said.contains("extends prod/common.yaml\nextends base.yaml"),
        "{said}"
    );
    assert!(
        said.contains("8 of 8 tables up to date") || said.contains("7 of 7"),
        "{said}"
    );
    assert!(!said.contains("grades ="), "an entry is taken away");
    scene.write(
        "prod/p.yaml",
        "extends: common.yaml\nstages:\n  candidates:\n    sample: { count: \"${many}\" }\n",
    );
    let said = scene.succeeds(&["plan", "prod/p.yaml"]).out;
    assert!(said.contains("`count` 5 → 4 (prod/p.yaml:4)"), "{said}");
    let said = scene
        .succeeds(&["plan", "prod/p.yaml", "--set", "seed=4"])
        .out;
    assert!(said.contains("rows"), "{said}");
}

/// The scripted policy does not improve, so a round with a gain below the threshold is the last.
#[test]
fn rounds_end_when_a_query_says_so() {
    let scene = Scene::new();
    let until = |query: &str| {
        let rounds = format!("rounds:\n  max: 4\n  stop_when: {query}");
        SCRIPTED.replace("rounds: 2", &rounds)
    };
    let second = until("select max(round) >= 2 from rewards where round <= $round");
    scene.prompts(20).write("p.yaml", &second);
    assert_eq!(
        planned(&scene, &[])
            .keys()
            .filter(|name| name.starts_with("steps"))
            .count(),
        4
    );
    let said = scene.succeeds(&["run", "p.yaml"]).err;
    assert!(said.contains("stopping after round 2"), "{said}");
    let rounds = |scene: &Scene| {
        let tables = scene.tables("runs/scripted");
        tables
            .keys()
            .filter(|name| name.starts_with("steps Some"))
            .count()
    };
    assert_eq!(rounds(&scene), 2);
    let tables = planned(&scene, &[]);
    assert_eq!(those(&tables, "reuse"), tables.len(), "{tables:?}");
    assert!(
        scene
            .succeeds(&["run", "p.yaml"])
            .err
            .contains("nothing to do")
    );

    // Another query continues from there, and back.
    scene.write(
        "p.yaml",
        until("select avg(reward) < 0 from rewards where round = $round"),
    );
    assert!(
        scene
            .succeeds(&["plan", "p.yaml"])
            .out
            .contains("at most 4 rounds")
    );
    scene.succeeds(&["run", "p.yaml"]);
    assert_eq!(rounds(&scene), 4);
    scene.write("p.yaml", &second);
    scene.succeeds(&["run", "p.yaml"]);
    assert_eq!(rounds(&scene), 2, "later rounds are set aside");

    // An aggregate without conditions is known to give one row before anything runs; a filter is
    // not.
    scene.write("p.yaml", until("select round > 9 from rewards"));
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert_eq!(said.code, Some(2), "{}", said.err);
    assert!(
        said.err.contains("returns one per row of `rewards`"),
        "{}",
        said.err
    );
    scene.write(
        "p.yaml",
        until("select round > 9 from rewards where round = $round"),
    );
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert_eq!(said.code, Some(1), "{}", said.err);
    assert!(said.err.contains("may return several"), "{}", said.err);
    assert!(
        said.err
            .contains("returned 100 rows after round 1, expected one"),
        "{}",
        said.err
    );
}

#[test]
fn only_what_has_a_meaning_makes_a_table_anew() {
    let scene = Scene::new();
    let before = SCRIPTED.replace("seed: 3", "seed: 3\nvars: { k: 5, j: judge }");
    let before = before.replace("policy, part: 7", "policy, count: \"${k}\", part: 7");
    scene
        .prompts(12)
        .write("p.yaml", &before)
        .succeeds(&["run", "p.yaml"]);
    // Whitespace, comments, order, names of variables, part sizes.
    let after = "
# rewritten
seed: 3
pipeline: scripted
vars:
    many: 5
rounds:   2
models: { judge: { scripted: {} }, policy: { scripted: {} } }
evaluate:
  grades: { score: { judge: judge, candidates: answers } }
  answers: { sample: { temperature: 0.0, count: 1, model: policy, prompts: prompts } }
stages:
  steps: { train_dpo: { model: policy, pairs: pairs, save_every: 1 } }
  pairs: { select_extremes: { rewards: rewards } }
  rewards: { score: { judge: judge, candidates: candidates, part: 2 } }
  candidates: { sample: { prompts: prompts, count: \"${many}\", model: policy, part: 3 } }
  prompts: { load_prompts: { from: ./prompts.json } }
";
    scene.write("p.yaml", after);
    let tables = planned(&scene, &[]);
    assert_eq!(those(&tables, "reuse"), tables.len(), "{tables:?}");

    // The location of the files does not matter, either.
    let moved = Scene::new();
    copy(&scene.path(""), &moved.path(""));
    let tables = planned(&moved, &[]);
    assert_eq!(those(&tables, "reuse"), tables.len(), "{tables:?}");
    let said = moved.succeeds(&["run", "p.yaml"]).err;
    assert!(said.contains("nothing to do"), "{said}");

    // Three more prompts cost three prompts.
    moved.prompts(15);
    let tables = planned(&moved, &[]);
    assert_eq!(
        tables["prompts null"]["reasons"][0]["text"],
        "the content of `from` changed"
    );
    moved.succeeds(&["run", "p.yaml"]);
    let text = moved.succeeds(&["status", "runs/scripted", "--json"]).out;
    let status: Value = serde_json::from_str(&text).unwrap();
    let rows = |name: &str| {
        let tables = status["tables"].as_array().unwrap().iter();
        let mut of_name = tables.filter(|table| table["table"] == name && table["round"] == 1);
        let table = of_name.next().unwrap();
        (table["rows"].clone(), table["computed"].clone())
    };
    assert_eq!(rows("candidates"), (75.into(), 15.into()));
    assert_eq!(rows("rewards"), (75.into(), 15.into()));
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() {
            fs::create_dir_all(&to).unwrap();
            copy(&path, &to);
        } else {
            fs::copy(&path, &to).unwrap();
        }
    }
}

/// Reasons name the change and its location, not its consequences.
#[test]
fn the_reason_for_making_a_table_again_is_what_was_changed() {
    let scene = Scene::new();
    let pipeline = SCRIPTED.replace(
        "policy, part: 7 }",
        "policy, part: 7, max_new_tokens: \"${tokens}\" }",
    );
    let pipeline = format!("{pipeline}\nvars: {{ tokens: 16 }}\n");
    assert!(pipeline.contains("${tokens}"), "{pipeline}");
    let records: Vec<Value> = (0..6)
        .map(|number| serde_json::json!({ "id": number, "image": "a.png", "prompt": format!("Question {number}?") }))
        .collect();
    let image = fs::read_dir(format!("{ROOT}/data-samples/images/heldout"))
        .unwrap()
        .next();
    let image = fs::read(image.unwrap().unwrap().path()).unwrap();
    scene
        .write("prompts.json", serde_json::to_vec(&records).unwrap())
        .write("a.png", &image)
        .write("photos/a.png", [&image[..], b" "].concat())
        .write("p.yaml", &pipeline);
    scene.succeeds(&["run", "p.yaml", "--until", "candidates"]);

    let set = ["--set", "vars.tokens=12"];
    let reason = "`vars.tokens` 16 → 12 (--set)";
    let tables = planned(&scene, &set);
    let reasons = tables["candidates 1"]["reasons"].as_array().unwrap();
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    assert_eq!(reasons[0]["text"], "`vars.tokens` 16 → 12");
    assert_eq!(reasons[0]["place"], "--set");
    let text = scene
        .succeeds(&[&["plan", "p.yaml"], &set[..]].concat())
        .out;
    assert!(text.contains(reason), "{text}");
    let until = ["run", "p.yaml", "--until", "candidates"];
    let said = scene.succeeds(&[&until, &set[..]].concat()).err;
    assert!(
        said.contains(&format!("rebuilding candidates (round 1): {reason}\n")),
        "{said}"
    );

    let with_images = pipeline.replace("from: prompts.json", "from: prompts.json, images: photos");
    assert_ne!(pipeline, with_images);
    scene.write("p.yaml", with_images);
    let tables = planned(&scene, &[]);
    let reasons = tables["prompts null"]["reasons"].as_array().unwrap();
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    assert_eq!(reasons[0]["text"], "`images` was added");
    assert!(
        reasons[0]["place"].as_str().unwrap().starts_with("p.yaml:"),
        "{reasons:?}"
    );
}
