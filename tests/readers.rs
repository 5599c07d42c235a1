//! The tables of a run as other programs read them: files found by a glob, during a run.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{DataType, Int32Type};
use ovchat_data::store::{Manifest, RunFolder};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::run::SCRIPTED;
use crate::scene::{ROOT, Scene, stream_of_ids};

/// Lists the files that `<folder>/**/*.parquet` finds; hidden folders are skipped, as usual.
pub fn glob(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_hidden = entry.file_name().to_string_lossy().starts_with('.');
        if path.is_dir() && !is_hidden {
            files.extend(glob(&path));
        } else if path.extension() == Some("parquet".as_ref()) {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// Reads the rows of a file without the manifest; `None` for a file that is gone.
fn read(path: &Path) -> Option<Vec<RecordBatch>> {
    let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(path).ok()?);
    let reader = reader.unwrap().build().unwrap();
    Some(reader.map(Result::unwrap).collect())
}

/// Counts each row by round and its key columns `names`; `None` if a file disappeared after the
/// listing.
fn rows(folder: &Path, names: &[&str]) -> Option<BTreeMap<(i32, String), usize>> {
    let mut rows = BTreeMap::new();
    for path in glob(folder) {
        for batch in read(&path)? {
            let rounds = batch.column_by_name("round").expect("a column `round`");
            let rounds = rounds.as_primitive::<Int32Type>();
            for row in 0..batch.num_rows() {
                let cell = |name: &&str| {
                    let column = batch.column_by_name(name).unwrap();
                    arrow::util::display::array_value_to_string(column, row).unwrap()
                };
                let name: Vec<String> = names.iter().map(cell).collect();
                *rows.entry((rounds.value(row), name.join(" "))).or_default() += 1;
            }
        }
    }
    Some(rows)
}

fn rounds(rows: &BTreeMap<(i32, String), usize>) -> BTreeSet<i32> {
    rows.keys().map(|(round, _)| *round).collect()
}

#[test]
fn files_hold_the_round_as_a_column_and_folders_have_no_equals_sign() {
    let scene = Scene::new();
    scene
        .prompts(8)
        .write("p.yaml", SCRIPTED)
        .succeeds(&["run", "p.yaml"]);
    let run = scene.path("runs/scripted");
    for round in [1, 2] {
        let files = glob(&run.join(format!("rewards/round-{round}")));
        assert!(!files.is_empty());
        for batch in files.iter().flat_map(|file| read(file).unwrap()) {
            let column = batch.column_by_name("round").unwrap();
            assert_eq!(*column.data_type(), DataType::Int32);
            assert_eq!(column.null_count(), 0);
            assert!(
                column
                    .as_primitive::<Int32Type>()
                    .values()
                    .iter()
                    .all(|value| *value == round)
            );
        }
    }
    assert!(
        !glob(&run)
            .iter()
            .any(|path| path.to_string_lossy().contains('='))
    );
    // SQL sees a single `round` column, also in queries over several tables.
    let said = scene.succeeds(&[
        "sql", "scripted", "--format", "csv",
        "select c.round, count(*) as n from candidates c join rewards r using (round, prompt_id, candidate) \
         group by c.round order by c.round",
    ]);
    assert_eq!(said.out, "round,n\n1,40\n2,40\n");
}

/// Reads the tables repeatedly while `work` runs: no existing round is ever missing, and no row
/// appears twice. Returns the number of readings.
fn watched(scene: &Scene, work: impl FnOnce()) -> usize {
    let tables: [(&str, &[&str]); 4] = [
        ("candidates", &["prompt_id", "candidate"]),
        ("rewards", &["prompt_id", "candidate"]),
        ("answers", &["prompt_id", "candidate"]),
        ("steps", &["step"]),
    ];
    let folder = scene.path("runs/scripted");
    let before = tables.map(|(table, names)| rounds(&rows(&folder.join(table), names).unwrap()));
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut looks = 0;
            while !is_done.load(Ordering::Relaxed) {
                for ((table, names), before) in tables.iter().zip(&before) {
                    let Some(seen) = rows(&folder.join(table), names) else {
                        continue;
                    };
                    let missing: Vec<_> = before.difference(&rounds(&seen)).copied().collect();
                    assert!(missing.is_empty(), "{table} lacks rounds {missing:?}");
                    let twice = seen.iter().find(|(_, count)| **count > 1);
                    assert_eq!(twice, None, "{table}");
                    looks += 1;
                }
            }
            looks
        });
        work();
        is_done.store(true, Ordering::Relaxed);
        watcher.join().unwrap()
    })
}

#[test]
fn a_finished_run_is_seen_whole_while_it_is_made_again() {
    let scene = Scene::new();
    scene.prompts(40).write("p.yaml", SCRIPTED);
    scene.succeeds(&["run", "p.yaml"]);
    let before = scene.tables("runs/scripted");
    let warmer = [
        "run",
        "p.yaml",
        "--set",
        "stages.candidates.sample.temperature=0.9",
    ];
    let looks = watched(&scene, || {
        scene.succeeds(&warmer);
    });
    assert!(looks > 20, "looked {looks} times");
    let after = scene.tables("runs/scripted");
    assert_ne!(before, after);
    // The rebuilt tables equal those of a run from scratch.
    let mut anew = warmer.to_vec();
    anew.extend(["--run", "anew"]);
    scene.succeeds(&anew);
    assert_eq!(after, scene.tables("anew"));
    assert_eq!(
        scene
            .checkpoints("runs/scripted")
            .into_values()
            .collect::<Vec<_>>(),
        scene.checkpoints("anew").into_values().collect::<Vec<_>>()
    );
    // Restoring costs nothing.
    let looks = watched(&scene, || {
        let said = scene.succeeds(&["run", "p.yaml"]);
        assert!(said.err.contains("nothing to do"), "{}", said.err);
    });
    assert!(looks > 0);
    assert_eq!(before, scene.tables("runs/scripted"));
}

/// Counts the rows of every table by round, as `pipeline sql` sees them.
fn counts(scene: &Scene) -> BTreeMap<(String, Option<u32>), u64> {
    let run = RunFolder::read(&scene.path("runs/scripted")).unwrap();
    let made = run.manifest().made.iter();
    made.map(|made| ((made.table.clone(), made.round), made.rows()))
        .collect()
}

#[test]
fn until_leaves_the_later_tables_where_they_are_and_the_start_names_what_is_replaced() {
    let scene = Scene::new();
    scene.prompts(12).write("p.yaml", SCRIPTED);
    scene.succeeds(&["run", "p.yaml"]);
    let before = counts(&scene);
    let said = scene.succeeds(&[
        "run",
        "p.yaml",
        "--set",
        "stages.pairs.select_extremes.margin_min=0.5",
        "--until",
        "pairs",
    ]);
    assert!(
        said.err.contains(
            "replacing tables of runs/scripted: pairs (round 1); reason: `margin_min` 0.0 → 0.5 (--set); each \
             stays readable until its new version is complete, and is then archived in .cache\nto restore them, run: \
             pipeline run p.yaml\n"
        ),
        "{}",
        said.err
    );
    let after = counts(&scene);
    assert_eq!(
        before.keys().collect::<Vec<_>>(),
        after.keys().collect::<Vec<_>>()
    );
    let pairs = ("pairs".to_owned(), Some(1));
    assert!(
        after[&pairs] < before[&pairs],
        "{} {}",
        after[&pairs],
        before[&pairs]
    );
    assert_eq!(
        after[&("steps".to_owned(), Some(2))],
        before[&("steps".to_owned(), Some(2))]
    );
    // The command that the run named restores everything.
    let said = scene.succeeds(&["run", "p.yaml"]);
    assert!(said.err.contains("nothing to do"), "{}", said.err);
    assert_eq!(before, counts(&scene));
}

#[test]
fn a_run_that_fails_leaves_all_tables_as_they_were() {
    let scene = Scene::new();
    let failing = SCRIPTED.replace(
        "  rewards:\n",
        "  seen:\n    exec: { command: [sh, seen.sh], table: candidates, columns: { prompt_id: text } }\n  rewards:\n",
    );
    scene
        .prompts(12)
        .write("p.yaml", &failing)
        .write("seen.sh", "exec cat seen.arrow\n");
    scene.write("seen.arrow", stream_of_ids(&["a"]));
    scene.succeeds(&["run", "p.yaml"]);
    let before = scene.tables("runs/scripted");
    let said = scene.pipeline(&[
        "run",
        "p.yaml",
        "--set",
        "stages.seen.exec.command=[\"false\"]",
    ]);
    assert_eq!(said.code, Some(1), "{}", said.err);
    assert_eq!(before, scene.tables("runs/scripted"));
    // A pipeline with fewer tables removes them only when it is complete.
    let said = scene.pipeline(&[
        "run",
        "p.yaml",
        "--set",
        "rounds=1",
        "--set",
        "stages.seen.exec.command=[\"false\"]",
    ]);
    assert_eq!(said.code, Some(1), "{}", said.err);
    assert_eq!(before, scene.tables("runs/scripted"));
    let said = scene.succeeds(&["run", "p.yaml", "--set", "rounds=1"]);
    assert!(
        said.err
            .contains("removing tables of runs/scripted that are no longer in the pipeline"),
        "{}",
        said.err
    );
    assert!(counts(&scene).keys().all(|(_, round)| *round < Some(2)));
}

#[test]
fn a_run_of_format_1_is_whole_and_goes_on_in_its_own_form() {
    let scene = Scene::new();
    let fixture = PathBuf::from(ROOT).join("tests/format-1");
    for name in ["p.yaml", "prompts.json"] {
        scene.write(name, fs::read(fixture.join(name)).unwrap());
    }
    ovchat_data::store::copy_folder(&fixture.join("run"), &scene.path("runs/scripted")).unwrap();
    let said = scene.succeeds(&["run", "p.yaml"]);
    assert!(
        said.err.contains("nothing to do: all 15 tables"),
        "{}",
        said.err
    );

    scene.succeeds(&["run", "p.yaml", "--set", "rounds=3"]);
    assert!(scene.path("runs/scripted/rewards/round=3").is_dir());
    let run = scene.path("runs/scripted");
    let files = glob(&run.join("rewards"));
    let has_round = |batch: &RecordBatch| batch.column_by_name("round").is_some();
    assert!(
        !files
            .iter()
            .flat_map(|file| read(file).unwrap())
            .any(|batch| has_round(&batch))
    );
    let said = scene.succeeds(&[
        "sql",
        "scripted",
        "--format",
        "csv",
        "select round, count(*) as n from rewards group by round order by round",
    ]);
    assert_eq!(said.out, "round,n\n1,30\n2,30\n3,30\n");
    assert!(!Manifest::read(&run).unwrap().has_round_column());

    // A fork keeps the folder layout of the run that it shares files with.
    scene.succeeds(&["fork", "scripted", "--at", "2", "--to", "forked"]);
    scene.succeeds(&[
        "run",
        "p.yaml",
        "--run",
        "forked",
        "--set",
        "stages.steps.train_dpo.beta=0.3",
    ]);
    assert!(scene.path("forked/rewards/round=2").is_dir());
}

/// Made by commit ce4bf7f, the last before the crates and their names.
#[test]
fn runs_of_before_the_crates_go_on_where_they_were() {
    go_on_where_they_were("tests/before-crates");
}

/// Made by commit 82e73a2, which names the folders of rounds differently, and seals nothing.
#[test]
fn runs_of_before_the_words_go_on_where_they_were() {
    go_on_where_they_were("tests/before-words");
}

/// Continues the runs of an earlier commit: one that is finished, and one that was interrupted after the first of
/// eight steps of a training.
fn go_on_where_they_were(fixture: &str) {
    let scene = Scene::new();
    let fixture = PathBuf::from(ROOT).join(fixture);
    for name in ["p.yaml", "prompts.json"] {
        scene.write(name, fs::read(fixture.join(name)).unwrap());
    }
    let copy = |name: &str| {
        let to = scene.path("runs").join(name);
        ovchat_data::store::copy_folder(&fixture.join(name), &to).unwrap();
    };
    copy("finished");
    copy("stopped");
    let run = |name: &str| scene.succeeds(&["run", "p.yaml", "--run", &format!("runs/{name}")]);
    let said = run("finished");
    assert!(
        said.err.contains("nothing to do: all 15 tables"),
        "{}",
        said.err
    );
    let query = "select count(*) as n, count(distinct prompt_id) as prompts from pairs";
    let said = scene.succeeds(&["sql", "finished", "--format", "csv", query]);
    assert_eq!(said.out, "n,prompts\n128,64\n");
    scene.succeeds(&["fork", "finished", "--at", "2", "--to", "forked"]);
    let said = scene.succeeds(&["run", "p.yaml", "--run", "forked"]);
    assert!(said.err.contains("candidates (round 1)"), "{}", said.err);

    let said = run("stopped");
    assert!(
        said.err
            .contains("candidates (round 1): 320 rows, up to date"),
        "{}",
        said.err
    );
    assert_eq!(scene.tables("runs/stopped"), scene.tables("runs/finished"));
    // One round was built before there were videos.
    let query = "select count(*) as n, count(videos) as videos from pairs";
    let said = scene.succeeds(&["sql", "stopped", "--format", "csv", query]);
    assert_eq!(said.out, "n,videos\n128,0\n");
    let weights = |name: &str| {
        let found = scene.checkpoints(&format!("runs/{name}"));
        found.into_values().collect::<Vec<_>>()
    };
    assert_eq!(weights("stopped"), weights("finished"));
}
