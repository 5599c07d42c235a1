//! Kills and power losses at every commit and at random operations: finished work stays, incomplete
//! files are never read, and the result equals that of an undisturbed run.
//!
//! The failing file layer is `chaos/shim.c`, compiled here and preloaded into the program.

/// Kills during calls to an endpoint.
mod calls;
/// Kills of the labeling page.
mod labels;
/// Kills while networks sample, score and train.
#[cfg(feature = "torch")]
pub mod networks;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use ovchat_data::store::{RunFolder, TableVersion};

use crate::run::SCRIPTED;
use crate::scene::{Numbers, ROOT, Scene};

/// The seed of the random operations.
const SEED: u64 = 20_261_126;

/// The number of kills at random operations.
const RANDOM_KILLS: usize = 120;

/// The moments of a kill relative to its operation.
const MODES: [&str; 3] = ["before", "torn", "after"];

/// One thread for networks: several threads wait for each other, which takes minutes on a busy
/// machine.
const ONE_THREAD: (&str, &str) = ("OMP_NUM_THREADS", "1");

/// The tables of training stages.
const TRAININGS: [&str; 3] = ["steps", "words", "reward"];

/// A pipeline with every kind of stage, in three rounds.
fn pipeline() -> String {
    let pipeline = SCRIPTED.replace("rounds: 2", "rounds: 3");
    pipeline.replace(
        "evaluate:",
        "  long: { sql: { tables: [candidates], query: select prompt_id from candidates where length(text) > 20 } }\nevaluate:",
    )
}

/// A scene with a pipeline `p.yaml` whose run is killed.
struct Chaos {
    scene: Scene,
    /// The run folder.
    run: &'static str,
    shim: PathBuf,
    kills: usize,
}

impl Chaos {
    fn new(scene: Scene, run: &'static str, shim: &Path) -> Self {
        Self {
            scene,
            run,
            shim: shim.to_owned(),
            kills: 0,
        }
    }

    /// Runs the pipeline, which is killed as `plan` specifies. Returns true if it ran to the end.
    fn run(&mut self, plan: &str) -> bool {
        let mut command = self.scene.command(&["run", "p.yaml"]);
        doom(&mut command, &self.scene, &self.shim, plan);
        let output = command.env("CHAOS_CLOCK", "1").envs([ONE_THREAD]).output();
        let output = output.unwrap();
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

    /// Returns the number of complete tables and of committed rows. Rows of training stages do not
    /// count: steps are kept only up to the last saved state.
    fn finished(&self) -> (usize, u64) {
        let run = RunFolder::read(&self.scene.path(self.run));
        let made = run
            .map(|run| run.manifest().made.clone())
            .unwrap_or_default();
        let rows = made
            .iter()
            .filter(|made| !TRAININGS.contains(&made.table.as_str()));
        (
            made.iter().filter(|made| made.complete).count(),
            rows.map(TableVersion::rows).sum(),
        )
    }

    /// Asserts that no finished work is lost; returns the new counts.
    fn keeps(&self, before: (usize, u64), plan: &str) -> (usize, u64) {
        let now = self.finished();
        assert!(
            now.0 >= before.0 && now.1 >= before.1,
            "{plan}: {now:?} tables and rows are there, and {before:?} were"
        );
        assert!(self.kills < 1000, "the run does not go on");
        now
    }

    /// Asserts that the run has the same content as an undisturbed one, and nothing else.
    fn is_like(&self, undisturbed: &Scene) {
        let run = self.run;
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

/// Prepares a command that is killed as `plan` specifies.
pub fn doom(command: &mut Command, scene: &Scene, shim: &Path, plan: &str) {
    command
        .env("LD_PRELOAD", shim)
        .env("CHAOS_ROOT", scene.path("runs"))
        .env("CHAOS", plan);
}

/// Returns a plan for an operation on line files, each kind in turn. The power stays on for a torn
/// line, because a power loss would remove the line; even operations are writes then.
fn line_plan(class: &str, turn: usize, operation: usize) -> String {
    match turn % 3 {
        0 => format!("{class} before {operation} 1"),
        1 => format!("{class} torn {} 0", operation.next_multiple_of(2)),
        _ => format!("{class} after {operation} 1"),
    }
}

/// Lists the files that `**/*.parquet` matches.
fn parquet_files(folder: &Path) -> Vec<PathBuf> {
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

pub fn shim(scene: &Scene) -> PathBuf {
    let path = scene.path("shim.so");
    let source = format!("{ROOT}/tests/chaos/shim.c");
    let compiled = Command::new("cc")
        .args(["-O1", "-shared", "-fPIC", "-o"])
        .arg(&path)
        .args([&source, "-ldl", "-lpthread"])
        .output()
        .expect("a C compiler, as the README asks for");
    assert!(
        compiled.status.success(),
        "{}",
        String::from_utf8_lossy(&compiled.stderr)
    );
    path
}

fn scripted() -> Scene {
    let scene = Scene::new();
    scene.prompts(16).write("p.yaml", pipeline());
    scene
}

fn undisturbed() -> Scene {
    let scene = scripted();
    scene.succeeds(&["run", "p.yaml"]);
    scene
}

/// Kills before, during and after each commit, with and without losing unsynced data. A process
/// commits its start twice before it continues, so the kills hit the commits after that, and one
/// more process advances the run by two commits.
#[test]
fn killed_at_every_commit() {
    let undisturbed = undisturbed();
    let shim = shim(&undisturbed);
    for power in [0, 1] {
        let mut chaos = Chaos::new(scripted(), "runs/scripted", &shim);
        let mut before = (0, 0);
        'run: loop {
            for commit in 3..=6 {
                for mode in ["before", "torn"] {
                    if chaos.run(&format!("commit {mode} {commit} {power}")) {
                        break 'run;
                    }
                }
            }
            // Not always the same, or a training whose first state takes one commit more never has it.
            let plan = format!("commit after {} {power}", 6 + chaos.kills / 9 % 3);
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

/// Kills at any file operation, including those at the start of a run.
#[test]
fn killed_at_random_operations() {
    let undisturbed = undisturbed();
    let shim = shim(&undisturbed);
    let mut numbers = Numbers(SEED);
    let mut kills = 0;
    let mut runs = 0;
    while kills < RANDOM_KILLS {
        let mut chaos = Chaos::new(scripted(), "runs/scripted", &shim);
        let mut before = (0, 0);
        loop {
            let mode = MODES[numbers.below(3)];
            let (operation, power) = (1 + numbers.below(90), numbers.below(2));
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
