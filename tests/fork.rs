//! Forks, diffs between runs, and archived versions.

use std::fs;
use std::os::unix::fs::MetadataExt;

use ovchat_data::store::RunFolder;
use serde_json::Value;

use crate::run::SCRIPTED;
use crate::scene::Scene;

/// A finished run of three rounds.
fn scene() -> Scene {
    let scene = Scene::new();
    let pipeline = SCRIPTED.replace("rounds: 2", "rounds: 3");
    scene.prompts(20).write("p.yaml", pipeline);
    scene.succeeds(&["run", "p.yaml"]);
    scene
}

#[test]
fn a_fork_shares_the_rounds_before_and_makes_the_others_its_own_way() {
    let scene = scene();
    let before = scene.tables("runs/scripted");
    let set = "stages.candidates.sample.count=3";
    let said = scene.succeeds(&["fork", "scripted", "--at", "2", "--set", set]);
    let command: Vec<&str> = said.out.split_whitespace().skip(1).collect();
    assert_eq!(
        command,
        [
            "run",
            "p.yaml",
            "--run",
            "runs/scripted-fork-2",
            "--set",
            set
        ]
    );
    let plan = scene.succeeds(&[&["plan"], &command[1..]].concat()).out;
    assert!(plan.contains("9 of 21 tables up to date"), "{plan}");
    scene.succeeds(&command);
    let fork = scene.tables("runs/scripted-fork-2");
    for (table, rows) in &fork {
        let is_shared =
            table.ends_with("None") || table.ends_with("Some(0)") || table.ends_with("Some(1)");
        let is_changed = table.starts_with("candidates") || table.starts_with("pairs");
        assert!(!is_shared || *rows == before[table], "{table}");
        assert!(
            is_shared || !is_changed || *rows != before[table],
            "{table}"
        );
    }
    assert_eq!(
        scene.tables("runs/scripted"),
        before,
        "the other run is as it was"
    );
    let file = |run: &str| {
        let folder = RunFolder::read(&scene.path(run)).unwrap();
        fs::metadata(&folder.files("candidates", Some(1))[0])
            .unwrap()
            .ino()
    };
    assert_eq!(
        file("runs/scripted"),
        file("runs/scripted-fork-2"),
        "one file, two names"
    );
    assert!(scene.succeeds(&command).err.contains("nothing to do"));

    // Rounds from which a fork cannot start.
    let late = scene.pipeline(&["fork", "scripted", "--at", "5"]);
    assert!(
        late.err.contains("the last round of runs/scripted is 3"),
        "{}",
        late.err
    );
    let wrong = scene.pipeline(&[
        "fork",
        "scripted",
        "--at",
        "2",
        "--set",
        "stages.nothing.sql.query=x",
    ]);
    assert_eq!(wrong.code, Some(2), "{}", wrong.err);

    // The differences, table by table.
    let diff = scene
        .succeeds(&["diff", "scripted", "scripted-fork-2", "--json"])
        .out;
    let diff: Value = serde_json::from_str(&diff).unwrap();
    let tables = diff["tables"].as_array().unwrap();
    let of = |table: &str, round: u32| {
        let mut all = tables.iter();
        all.find(|one| one["table"] == table && one["round"] == round)
            .unwrap()
    };
    assert_eq!(of("candidates", 1)["shared"], 100);
    assert_eq!(of("candidates", 1)["reasons"], Value::Array(Vec::new()));
    assert_eq!(of("candidates", 2)["rows"], serde_json::json!([100, 60]));
    assert_eq!(of("candidates", 2)["reasons"][0], "`count` 5 → 3");
    assert!(of("pairs", 2)["pairs"]["other"].as_u64().unwrap() > 0);
    assert!(of("pairs", 1)["pairs"].is_null());
    let text = scene.succeeds(&["diff", "scripted", "scripted-fork-2"]).out;
    assert!(text.contains("`count` 5 → 3"), "{text}");
}

#[test]
fn what_was_set_aside_goes_when_it_is_told_to() {
    let scene = scene();
    let none = scene.succeeds(&["gc", "scripted"]);
    assert!(none.err.contains("no archived tables"), "{}", none.err);
    scene.succeeds(&["run", "p.yaml", "--set", "stages.candidates.sample.count=4"]);
    let now = scene.tables("runs/scripted");
    let asked = scene.succeeds(&["gc", "scripted"]);
    assert!(asked.out.contains("24 archived tables"), "{}", asked.out);
    assert!(
        asked.err.contains("pass --yes to remove them"),
        "{}",
        asked.err
    );
    let archived = || {
        let folder = RunFolder::read(&scene.path("runs/scripted")).unwrap();
        let folders = fs::read_dir(scene.path("runs/scripted/.cache")).unwrap();
        let folders = folders.map(|entry| entry.unwrap().path());
        let folders = folders.filter(|path| path.is_dir() && !path.ends_with("records"));
        (folder.manifest().archived.len(), folders.count())
    };
    assert!(archived().0 == 24 && archived().1 > 0, "{:?}", archived());
    scene.succeeds(&["gc", "scripted", "--yes"]);
    assert_eq!(archived(), (0, 0));
    assert_eq!(scene.tables("runs/scripted"), now);
    let said = scene.succeeds(&["run", "p.yaml"]).err;
    assert!(said.contains("done: 18 built"), "{said}");
}
