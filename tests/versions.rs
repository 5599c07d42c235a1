//! Versions of tables: readers during a change of a finished run, and after a failed run.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use ovchat_data::store::{RunFolder, TableVersion};

use crate::readers::glob;
use crate::run::SCRIPTED;
use crate::scene::{CommandOutput, Scene, stream_of_ids};

/// A stage before the training stage that can fail on demand.
const GATE: &str = "  gate:
    exec: { command: [sh, gate.sh], table: candidates, columns: { prompt_id: text } }
  rewards:
";

/// A finished run of the pipeline, with a stage before `pairs` that can fail on demand.
fn finished(pipeline: &str) -> Scene {
    let scene = Scene::new();
    scene
        .prompts(12)
        .write("p.yaml", gated(pipeline))
        .write("gate.sh", "cat gate.arrow\n");
    scene.write("gate.arrow", stream_of_ids(&["a"]));
    scene.succeeds(&["run", "p.yaml"]);
    scene
}

fn gated(pipeline: &str) -> String {
    pipeline.replace("  rewards:\n", GATE)
}

/// The state that readers see: rows of tables, and checkpoint files.
type Seen = (BTreeMap<String, String>, BTreeMap<PathBuf, Vec<u8>>);

fn seen(scene: &Scene, run: &str) -> Seen {
    let root = scene.path(run);
    let checkpoints = scene.checkpoints(run).into_iter();
    let relative = checkpoints.map(|(path, bytes)| {
        let path = path.strip_prefix(&root).unwrap().to_owned();
        (path, bytes)
    });
    (scene.tables(run), relative.collect())
}

/// Returns the Parquet files that a glob finds, with their bytes.
fn files(scene: &Scene) -> BTreeMap<PathBuf, Vec<u8>> {
    let found = glob(&scene.path("runs/scripted")).into_iter();
    let read = found.map(|path| {
        let bytes = fs::read(&path).unwrap();
        (path, bytes)
    });
    read.collect()
}

/// True if a glob over the tables finds the files in the manifest.
fn is_listed(scene: &Scene) -> bool {
    let root = scene.path("runs/scripted");
    let run = RunFolder::read(&root).unwrap();
    let made = run.manifest().made.iter().flat_map(TableVersion::all_files);
    let listed = made.chain(&run.manifest().images);
    let mut listed: Vec<PathBuf> = listed.map(|file| root.join(&file.file)).collect();
    listed.sort();
    listed == glob(&root)
}

/// Runs a changed pipeline that fails at the gate, and asserts that readers see no change.
fn fails_and_changes_nothing(scene: &Scene, changed: &str) {
    let before = (seen(scene, "runs/scripted"), files(scene));
    let broken = gated(changed).replace("[sh, gate.sh]", "[\"false\"]");
    scene.write("broken.yaml", broken);
    let said = scene.pipeline(&["run", "broken.yaml"]);
    assert_eq!(said.code, Some(1), "{}", said.err);
    assert!(before == (seen(scene, "runs/scripted"), files(scene)));
}

/// Runs a changed pipeline, asserts that its tables equal those of a run from scratch, then returns
/// to the first pipeline.
fn goes_over_and_back(scene: &Scene, changed: &str) -> CommandOutput {
    goes_over_and_back_from(scene, changed, "p.yaml")
}

fn goes_over_and_back_from(scene: &Scene, changed: &str, first: &str) -> CommandOutput {
    let before = seen(scene, "runs/scripted");
    scene.write("changed.yaml", gated(changed));
    let told = scene.succeeds(&["run", "changed.yaml"]);
    scene.succeeds(&["run", "changed.yaml", "--run", "anew"]);
    assert!(seen(scene, "runs/scripted") == seen(scene, "anew"));
    let run = RunFolder::read(&scene.path("runs/scripted")).unwrap();
    assert_eq!(run.manifest().staged, []);
    assert!(is_listed(scene), "files that the manifest does not list");

    scene.succeeds(&["run", first]);
    assert!(is_listed(scene), "files that the manifest does not list");
    fs::remove_dir_all(scene.path("anew")).unwrap();
    assert!(before == seen(scene, "runs/scripted"));
    told
}

/// A stage that is built once or in each round, depending on the table that it counts.
const COUNTED: &str = "  counted:
    sql: { query: \"select prompt_id, count(*) as n from TABLE group by prompt_id\", tables: [TABLE] }
  pairs:
";

#[test]
fn a_table_goes_from_once_to_each_round_and_back() {
    let counted = |table: &str| SCRIPTED.replace("  pairs:\n", &COUNTED.replace("TABLE", table));
    let (once, each) = (counted("prompts"), counted("candidates"));
    let scene = finished(&once);
    fails_and_changes_nothing(&scene, &each);
    let told = goes_over_and_back(&scene, &each);
    assert!(
        told.err
            .contains("replacing tables of runs/scripted: counted;"),
        "{}",
        told.err
    );
    // In the other direction, the table that is built once is complete before the gate.
    let told = goes_over_and_back(&finished(&each), &once);
    assert!(
        told.err
            .contains("replacing tables of runs/scripted: counted (rounds 1 to 2);"),
        "{}",
        told.err
    );
}

#[test]
fn a_training_that_is_renamed_keeps_the_old_table_and_checkpoint_until_the_new_one_is_complete() {
    let renamed = SCRIPTED.replace("  steps:\n", "  dpo:\n");
    let scene = finished(SCRIPTED);
    fails_and_changes_nothing(&scene, &renamed);
    let told = goes_over_and_back(&scene, &renamed);
    assert!(
        told.err
            .contains("replacing tables of runs/scripted: steps (rounds 1 to 2)"),
        "{}",
        told.err
    );

    let before = seen(&scene, "runs/scripted");
    scene.write("renamed.yaml", gated(&renamed));
    scene.succeeds(&["run", "renamed.yaml", "--until", "pairs"]);
    assert!(before == seen(&scene, "runs/scripted"));
    // Killed training leaves a staged version, from which a different pipeline does not resume.
    let said = scene.succeeds(&["run", "renamed.yaml", "--until", "dpo"]);
    assert!(said.err.contains("steps (round 1)"), "{}", said.err);
    let run = RunFolder::read(&scene.path("runs/scripted")).unwrap();
    assert!(run.manifest().find("steps", Some(1)).is_none());
    assert!(run.manifest().find("steps", Some(2)).is_some());
    scene.succeeds(&["run", "p.yaml"]);
    assert!(before == seen(&scene, "runs/scripted"));
}

#[test]
fn rounds_that_stop_when_removes_are_named_before_they_go() {
    let stopped = SCRIPTED.replace("rounds: 2", "rounds: { max: 2, stop_when: select true }");
    let scene = finished(SCRIPTED);
    let before = seen(&scene, "runs/scripted");
    scene.write("stopped.yaml", gated(&stopped));
    scene.succeeds(&["run", "stopped.yaml", "--until", "grades"]);
    assert!(before == seen(&scene, "runs/scripted"));
    let said = scene.succeeds(&["run", "stopped.yaml"]);
    assert!(
        said.err.contains(
            "removing tables of runs/scripted after round 1, the last one: candidates (round 2), gate (round 2), \
             rewards (round 2), pairs (round 2), steps (round 2), steps_reference (round 2), answers (round 2), grades (round 2), health (round 2); they are archived in \
             .cache\nto restore them, run: pipeline run p.yaml\n"
        ),
        "{}",
        said.err
    );
    scene.succeeds(&["run", "stopped.yaml", "--run", "anew"]);
    assert!(seen(&scene, "runs/scripted") == seen(&scene, "anew"));
    scene.succeeds(&["run", "p.yaml"]);
    assert!(before == seen(&scene, "runs/scripted"));
}

#[test]
fn a_version_that_is_not_as_expected_replaces_nothing_and_can_be_queried() {
    let expecting =
        format!("{SCRIPTED}expect:\n  some: {{ table: pairs, value: count(*), at_least: 5 }}\n");
    let scene = finished(&expecting);
    let before = (seen(&scene, "runs/scripted"), files(&scene));
    let wide = [
        "run",
        "p.yaml",
        "--set",
        "stages.pairs.select_extremes.margin_min=100",
    ];
    // The second time, the version is complete but still fails `expect`.
    for _ in 0..2 {
        let said = scene.pipeline(&wide);
        assert_eq!(said.code, Some(1), "{}", said.err);
        assert!(
            said.err
                .contains("pipeline sql --staged runs/scripted \"select * from pairs\"\n"),
            "{}",
            said.err
        );
        assert!(before == (seen(&scene, "runs/scripted"), files(&scene)));
    }
    let count = "select count(*) as n from pairs where round = 1";
    let of = |arguments: &[&str]| {
        scene
            .succeeds(&[&["sql"], arguments, &["--format", "csv"]].concat())
            .out
    };
    assert_eq!(of(&["--staged", "scripted", count]), "n\n0\n");
    assert_ne!(of(&["scripted", count]), "n\n0\n");
    scene.succeeds(&["run", "p.yaml"]);
    assert!(before.0 == seen(&scene, "runs/scripted"));
}

#[test]
fn rejects_of_a_version_that_was_refused_can_be_queried() {
    let scene = finished(SCRIPTED);
    let before = seen(&scene, "runs/scripted");
    let records =
        r#"[{"id": "a", "prompt": "What?"}, {"id": "b", "image": "no.png", "prompt": "What?"}]"#;
    scene.write("bad.json", records);
    let bad = [
        "run",
        "p.yaml",
        "--set",
        "stages.prompts.load_prompts.from=bad.json",
    ];
    let said = scene.pipeline(&bad);
    assert_eq!(said.code, Some(1), "{}", said.err);
    let query = "select * from rejects where stage = 'prompts'";
    assert!(
        said.err.contains(&format!(
            "pipeline sql --staged runs/scripted \"{query}\"\n"
        )),
        "{}",
        said.err
    );
    let rows = scene
        .succeeds(&["sql", "--staged", "scripted", query, "--format", "jsonl"])
        .out;
    assert_eq!(rows.lines().count(), 1, "{rows}");
    assert_eq!(
        scene
            .succeeds(&["sql", "scripted", query, "--format", "jsonl"])
            .out,
        ""
    );
    assert!(before == seen(&scene, "runs/scripted"));

    // The failed attempt is not the run that restores the tables.
    let said = scene.succeeds(&["run", "p.yaml", "--set", "seed=8"]);
    assert!(
        said.err
            .contains("to restore them, run: pipeline run p.yaml\n"),
        "{}",
        said.err
    );
    // After a run with `--until`, both restore commands are right.
    let other = ["run", "p.yaml", "--set", "seed=9", "--until", "pairs"];
    let said = scene.succeeds(&other);
    assert!(
        said.err
            .contains("to restore them, run: pipeline run p.yaml --set seed=8\n"),
        "{}",
        said.err
    );
    let said = scene.succeeds(&["run", "p.yaml", "--set", "seed=8"]);
    assert!(
        said.err
            .contains("to restore them, run: pipeline run p.yaml --set seed=9\n"),
        "{}",
        said.err
    );
}

#[test]
fn status_and_fork_name_tables_that_were_made_from_earlier_versions() {
    let scene = finished(SCRIPTED);
    let marked = |scene: &Scene| {
        let out = scene.succeeds(&["status", "scripted"]).out;
        let marked = out
            .lines()
            .filter(|line| line.contains("its inputs changed"));
        let name = |line: &str| {
            line.split_whitespace()
                .take(2)
                .collect::<Vec<_>>()
                .join(" ")
        };
        marked.map(name).collect::<Vec<_>>()
    };
    assert_eq!(marked(&scene), Vec::<String>::new());
    let margin = "stages.pairs.select_extremes.margin_min=0.5";
    scene.succeeds(&["run", "p.yaml", "--set", margin, "--until", "pairs"]);
    let stale = [
        "steps 1",
        "steps_reference 1",
        "answers 1",
        "grades 1",
        "health 1",
        "candidates 2",
        "gate 2",
        "rewards 2",
        "pairs 2",
        "steps 2",
        "steps_reference 2",
        "answers 2",
        "grades 2",
        "health 2",
    ];
    assert_eq!(marked(&scene), stale);
    let said = scene.succeeds(&["fork", "scripted", "--at", "2"]);
    assert!(
        said.err.contains("built from earlier versions of their inputs: steps (round 1), steps_reference (round 1), answers (round 1), grades (round 1), health (round 1)"),
        "{}",
        said.err
    );

    // A fork keeps the settings of the run.
    scene.succeeds(&["run", "p.yaml", "--set", margin, "--set", "seed=8"]);
    let said = scene.succeeds(&[
        "fork", "scripted", "--at", "2", "--to", "other", "--set", "seed=9",
    ]);
    assert_eq!(
        said.out,
        format!("pipeline run p.yaml --run other --set {margin} --set seed=9\n")
    );
}

/// An answer of round 0 and one that is built once have the same key.
#[test]
fn a_table_of_the_evaluation_goes_from_rounds_to_once_and_back() {
    let trained = SCRIPTED.to_owned();
    let training = "  steps:\n    train_dpo: { pairs: pairs, model: policy, save_every: 2 }\n";
    assert!(trained.contains(training));
    let untrained = trained.replace(training, "");
    goes_over_and_back(&finished(&trained), &untrained);
    goes_over_and_back(&finished(&untrained), &trained);
    // With the table removed in between.
    let scene = finished(&trained);
    let before = seen(&scene, "runs/scripted");
    let (without, _) = trained.split_once("evaluate:").unwrap();
    scene.write("without.yaml", gated(without));
    scene.succeeds(&["run", "without.yaml"]);
    goes_over_and_back_from(&scene, &untrained, "without.yaml");
    scene.succeeds(&["run", "p.yaml"]);
    assert!(before == seen(&scene, "runs/scripted"));
}

#[test]
fn the_reference_of_a_training_that_fails_stays() {
    let expecting = SCRIPTED.to_owned()
        + "expect:\n  steps: { table: steps, value: count(*), at_most: 1000 }\n";
    let scene = finished(&expecting);
    let before = (seen(&scene, "runs/scripted"), files(&scene));
    let failing = expecting.replace("at_most: 1000", "at_least: 1000");
    scene.write("failing.yaml", gated(&failing));
    let other = "stages.pairs.select_extremes.margin_min=0.3";
    let said = scene.pipeline(&["run", "failing.yaml", "--set", other]);
    assert_eq!(said.code, Some(1), "{}", said.err);
    assert!(
        said.err.contains("steps_reference (rounds 1 to 2)"),
        "{}",
        said.err
    );
    let of_training = |seen: &Seen| {
        let tables = seen.0.iter().filter(|(name, _)| name.starts_with("steps"));
        tables
            .map(|(name, rows)| (name.clone(), rows.clone()))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        of_training(&before.0),
        of_training(&seen(&scene, "runs/scripted"))
    );
    scene.succeeds(&["gc", "scripted", "--yes"]);
    scene.succeeds(&["run", "p.yaml"]);
    assert!(before.0 == seen(&scene, "runs/scripted"));
}

#[test]
fn a_table_that_is_there_is_held_to_the_share_of_rejects_of_today() {
    let scene = Scene::new();
    let bad = r#"[{"prompt": "What?"}, {"prompt": ""}]"#;
    scene.write("prompts.json", bad).write("p.yaml", SCRIPTED);
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert_eq!(said.code, Some(1), "{}", said.err);
    scene.succeeds(&["run", "p.yaml", "--set", "reject_share_max=0.5"]);
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert_eq!(said.code, Some(1), "{}", said.err);
    assert!(said.err.contains("1 of 2 rows are faulty"), "{}", said.err);
}

/// A killed process may have recorded a replacement without moving its files.
#[test]
fn moves_that_a_kill_cut_off_are_made_by_whoever_reads_next() {
    let scene = finished(SCRIPTED);
    let root = scene.path("runs/scripted");
    let before = seen(&scene, "runs/scripted");
    let made = RunFolder::read(&root).unwrap().manifest().made.clone();
    for (table, folder) in [("pairs", "pairs/round-1"), ("steps", "checkpoints/round-2")] {
        let round = folder[folder.len() - 1..].parse().unwrap();
        let made = made
            .iter()
            .find(|made| made.is(table, Some(round)))
            .unwrap();
        let staged = root.join(".cache").join(&made.key).join(folder);
        fs::create_dir_all(staged.parent().unwrap()).unwrap();
        fs::rename(root.join(folder), staged).unwrap();
    }
    let query = [
        "sql",
        "scripted",
        "select count(*) as n from pairs",
        "--format",
        "csv",
    ];
    assert_ne!(scene.succeeds(&query).out, "n\n0\n");
    scene.succeeds(&["verify", "scripted"]);
    assert_eq!(seen(&scene, "runs/scripted"), before);
}

#[test]
fn a_run_that_fails_leaves_views_and_the_file_that_is_forked() {
    let viewed = format!("{SCRIPTED}report:\n  r: {{ query: select count(*) as n from pairs }}\n");
    let scene = finished(&viewed);
    let broken = SCRIPTED.replace("from: prompts.json", "from: broken.jsonl");
    scene
        .write("b.yaml", broken)
        .write("broken.jsonl", "{\"prompt\": 1}\n{\"prompt\": \"Why?\"}\n");
    assert_eq!(scene.pipeline(&["run", "b.yaml"]).code, Some(1));
    scene.succeeds(&["sql", "scripted", "select * from r"]);
    let told = scene.succeeds(&["fork", "scripted", "--at", "2", "--to", "f"]);
    assert!(told.out.contains("p.yaml"), "{}", told.out);
}

/// The command of the last whole run no longer builds its tables.
#[test]
fn the_way_back_names_a_change_of_the_file() {
    let scene = finished(SCRIPTED);
    let edited = gated(SCRIPTED).replace("seed: 3", "seed: 4");
    scene.write("p.yaml", edited);
    let said = scene.pipeline(&["run", "p.yaml", "--set", "rounds=1"]);
    let told = "to restore them, undo the change to the file and run: pipeline run p.yaml";
    assert!(said.err.contains(told), "{}", said.err);
}
