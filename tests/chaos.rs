//! Kills and power losses at every commit and at random operations: finished work stays, nothing
//! half-made is ever read, and what comes out is what an undisturbed run makes.
//!
//! The file layer that fails is `chaos/shim.c`, compiled here and preloaded into the program.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use ovchat::store::{Made, RunFolder};

use crate::run::SCRIPTED;
use crate::scene::{ROOT, Scene};

/// Decides the random operations.
const SEED: u64 = 20_261_126;

/// Kills at random operations.
const RANDOM_KILLS: usize = 120;

/// A pipeline of every kind of stage, in three rounds.
fn pipeline() -> String {
    let pipeline = SCRIPTED.replace("rounds: 2", "rounds: 3");
    pipeline.replace(
        "evaluate:",
        "  long: { sql: { tables: [candidates], query: select prompt_id from candidates where length(text) > 20 } }\nevaluate:",
    )
}

struct Chaos {
    scene: Scene,
    shim: PathBuf,
    kills: usize,
}

impl Chaos {
    fn new(shim: &str) -> Self {
        let scene = Scene::new();
        scene.prompts(16).write("p.yaml", pipeline());
        Self {
            scene,
            shim: shim.into(),
            kills: 0,
        }
    }

    /// Runs the pipeline; `plan` says when it is killed. Whether it came to its end.
    fn run(&mut self, plan: &str) -> bool {
        let mut command = self.scene.command(&["run", "p.yaml"]);
        command
            .env("LD_PRELOAD", &self.shim)
            .env("CHAOS_ROOT", self.scene.path("runs"))
            .env("CHAOS_CLOCK", "1")
            .env("CHAOS", plan);
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            Some(0) => true,
            None => {
                self.kills += 1;
                false
            }
            Some(code) => panic!("after {plan}: exit code {code}: {said}"),
        }
    }

    /// Tables that are complete, and rows that are committed. Those of a training are left out: steps
    /// are kept as far as there is a state behind them.
    fn finished(&self) -> (usize, u64) {
        let run = RunFolder::read(&self.scene.path("runs/scripted"));
        let made = run
            .map(|run| run.manifest().made.clone())
            .unwrap_or_default();
        let rows = made.iter().filter(|made| made.table != "steps");
        (
            made.iter().filter(|made| made.complete).count(),
            rows.map(Made::rows).sum(),
        )
    }

    /// Asserts that nothing that was finished is gone; returns what is now.
    fn keeps(&self, before: (usize, u64), plan: &str) -> (usize, u64) {
        let now = self.finished();
        assert!(
            now.0 >= before.0 && now.1 >= before.1,
            "{plan}: {now:?} tables and rows are there, and {before:?} were"
        );
        assert!(self.kills < 1000, "the run does not go on");
        now
    }

    /// Asserts that the run has what an undisturbed one has, and nothing else.
    fn is_like(&self, undisturbed: &Scene) {
        let run = "runs/scripted";
        assert_eq!(self.scene.tables(run), undisturbed.tables(run));
        assert_eq!(
            self.scene.checkpoints(run).len(),
            undisturbed.checkpoints(run).len()
        );
        let files =
            |scene: &Scene| -> Vec<Vec<u8>> { scene.checkpoints(run).into_values().collect() };
        assert!(
            files(&self.scene) == files(undisturbed),
            "the weights differ"
        );
        let folder = RunFolder::read(&self.scene.path(run)).unwrap();
        let listed: Vec<PathBuf> = folder
            .manifest()
            .made
            .iter()
            .flat_map(|made| made.all_files().map(|file| folder.root().join(&file.file)))
            .collect();
        let found = parquet_files(folder.root());
        let strangers: Vec<_> = found
            .iter()
            .filter(|file| {
                !listed.contains(file) && !file.starts_with(folder.root().join("images"))
            })
            .collect();
        assert!(strangers.is_empty(), "{strangers:?}");
    }
}

/// What a reader of `**/*.parquet` sees.
fn parquet_files(folder: &std::path::Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let is_hidden = path.file_name().unwrap().to_string_lossy().starts_with('.');
        if path.is_dir() && !is_hidden {
            files.extend(parquet_files(&path));
        } else if path.extension().is_some_and(|end| end == "parquet") {
            files.push(path);
        }
    }
    files
}

fn shim(scene: &Scene) -> String {
    let path = scene.path("shim.so").display().to_string();
    let source = format!("{ROOT}/tests/chaos/shim.c");
    let compiled = Command::new("cc")
        .args([
            "-O1",
            "-shared",
            "-fPIC",
            "-o",
            &path,
            &source,
            "-ldl",
            "-lpthread",
        ])
        .output()
        .expect("a C compiler, as the README asks for");
    assert!(
        compiled.status.success(),
        "{}",
        String::from_utf8_lossy(&compiled.stderr)
    );
    path
}

fn undisturbed() -> Scene {
    let scene = Scene::new();
    scene.prompts(16).write("p.yaml", pipeline());
    scene.succeeds(&["run", "p.yaml"]);
    scene
}

/// Before, in the middle of and after each commit, with and without what was not synced. A process
/// commits its start twice, then goes on; so the next commits are hit, and one more process takes the
/// run two commits further.
#[test]
fn killed_at_every_commit() {
    let undisturbed = undisturbed();
    let shim = shim(&undisturbed);
    for power in [0, 1] {
        let mut chaos = Chaos::new(&shim);
        let mut before = (0, 0);
        'run: loop {
            for commit in 3..=6 {
                for mode in ["before", "torn"] {
                    if chaos.run(&format!("commit {mode} {commit} {power}")) {
                        break 'run;
                    }
                }
            }
            let plan = format!("commit after 6 {power}");
            if chaos.run(&plan) {
                break;
            }
            before = chaos.keeps(before, &plan);
        }
        chaos.is_like(&undisturbed);
        println!("{} kills at commits, power lost: {power}", chaos.kills);
        assert!(chaos.kills > 100, "{} kills", chaos.kills);
    }
}

/// At any operation on a file, also those of a run's first moments.
#[test]
fn killed_at_random_operations() {
    let undisturbed = undisturbed();
    let shim = shim(&undisturbed);
    let mut state = SEED;
    let mut random = |below: u64| {
        // The generator of Knuth's MMIX.
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut kills = 0;
    let mut runs = 0;
    while kills < RANDOM_KILLS {
        let mut chaos = Chaos::new(&shim);
        let mut before = (0, 0);
        loop {
            let mode = ["before", "torn", "after"][random(3) as usize];
            let (operation, power) = (1 + random(90), random(2));
            let plan = format!("any {mode} {operation} {power}");
            if chaos.run(&plan) {
                break;
            }
            before = chaos.keeps(before, &plan);
        }
        chaos.is_like(&undisturbed);
        kills += chaos.kills;
        runs += 1;
    }
    println!("{kills} kills at random operations of {runs} runs, seed {SEED}");
}
