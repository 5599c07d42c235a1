//! Workers: processes that compute parts of tables. The tables are those of a run without workers,
//! whatever dies.

/// Ranks of a cluster.
#[cfg(feature = "torch")]
mod ranks;

use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use ovchat_data::store::RunFolder;

use crate::chaos::{doom, shim};
use crate::run::SCRIPTED;
use crate::scene::{CommandOutput, Numbers, Scene, said};

const RUN: &str = "runs/scripted";

/// The seed of the kills.
const SEED: u64 = 20_261_130;

fn scene(prompts: usize) -> Scene {
    let scene = Scene::new();
    scene.prompts(prompts).write("p.yaml", SCRIPTED);
    scene
}

/// The command of a run with workers, whose output is collected.
fn command(scene: &Scene, workers: &str) -> Command {
    let mut command = scene.command(&["run", "p.yaml", "--workers", workers]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn ended(child: Child) -> CommandOutput {
    said(child.wait_with_output().unwrap())
}

/// Returns the processes that a process has started.
fn children(parent: u32) -> Vec<u32> {
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let after = stat.rsplit_once(')').map(|(_, rest)| rest);
        let is_child = after.and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok());
        if is_child == Some(parent)
            && let Ok(pid) = entry.file_name().to_string_lossy().parse()
        {
            children.push(pid);
        }
    }
    children
}

fn kill(pid: u32) {
    let killed = Command::new("kill").args(["-9", &pid.to_string()]).output();
    killed.expect("the program kill");
}

/// Waits until so many parts of the candidates are committed.
fn wait_for_parts(scene: &Scene, parts: usize) {
    let begun = Instant::now();
    loop {
        let run = RunFolder::read(&scene.path(RUN)).ok();
        let made = run.and_then(|run| run.manifest().find("candidates", Some(1)).cloned());
        if made.is_some_and(|made| made.parts.len() >= parts || made.complete) {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "no part is done");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn tables_are_the_same_with_any_number_of_workers() {
    let alone = scene(60);
    alone.succeeds(&["run", "p.yaml"]);
    let expected = alone.tables(RUN);
    for workers in ["1", "2", "4"] {
        let scene = scene(60);
        let ran = scene.succeeds(&["run", "p.yaml", "--workers", workers]);
        assert_eq!(scene.tables(RUN), expected, "{workers} workers");
        let note = format!("{workers} workers: candidates, rewards, answers, grades");
        assert_eq!(ran.err.contains(&note), workers != "1", "{}", ran.err);
        let again = scene.succeeds(&["run", "p.yaml", "--workers", workers]);
        assert!(again.err.contains("nothing to do"), "{}", again.err);
    }
}

/// The rows of prompts that are not adjacent are gathered, in workers as without them.
#[test]
fn rows_that_lie_apart_are_gathered_by_workers_too() {
    let pipeline = SCRIPTED.replace(
        "    score: { candidates: candidates,",
        "    score: { candidates: mixed,",
    );
    let pipeline = pipeline.replace(
        "  pairs:\n",
        "  mixed: { sql: { tables: [candidates], query: 'select * from candidates order by candidate, prompt_id' } }\n  pairs:\n",
    );
    let made = |arguments: &[&str]| {
        let scene = Scene::new();
        scene.prompts(30).write("p.yaml", &pipeline);
        let ran = scene.succeeds(&[&["run", "p.yaml", "--set", "rounds=1"], arguments].concat());
        assert_eq!(
            ran.err.contains("3 workers: "),
            !arguments.is_empty(),
            "{}",
            ran.err
        );
        scene.tables(RUN)
    };
    assert_eq!(made(&["--workers", "3"]), made(&[]));
}

/// The number of parts that a run has committed.
fn parts(scene: &Scene) -> usize {
    let run = RunFolder::read(&scene.path(RUN));
    run.map_or(0, |run| {
        let made = run.manifest().made.iter();
        made.map(|made| made.parts.len()).sum()
    })
}

#[test]
fn workers_that_are_killed_are_replaced_and_nothing_is_lost() {
    let alone = scene(4_000);
    alone.succeeds(&["run", "p.yaml"]);
    let scene = scene(4_000);
    let mut numbers = Numbers(SEED);
    let run = command(&scene, "2").spawn().unwrap();
    let (pid, mut kills) = (run.id(), 0);
    let run = thread::spawn(move || ended(run));
    let mut done = 0;
    while !run.is_finished() && kills < 10 {
        thread::sleep(Duration::from_millis(numbers.below(60) as u64));
        // On a busy machine, workers may take longer to start; three that finish nothing end the run.
        let now = parts(&scene);
        if now == done {
            continue;
        }
        done = now;
        let workers = children(pid);
        if let Some(worker) = workers.get(numbers.below(workers.len().max(1))) {
            kill(*worker);
            kills += 1;
        }
    }
    let ran = run.join().unwrap();
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    println!("{kills} workers killed, seed {SEED}");
    assert!(kills >= 5, "{kills}");
    assert!(
        ran.err.contains("a worker ended with signal 9"),
        "{}",
        ran.err
    );
    assert_eq!(scene.tables(RUN), alone.tables(RUN));
}

#[test]
fn a_run_that_is_killed_takes_its_workers_along_and_goes_on() {
    let alone = scene(3_000);
    alone.succeeds(&["run", "p.yaml"]);
    let scene = scene(3_000);
    let mut numbers = Numbers(SEED);
    for _ in 0..5 {
        let mut run = command(&scene, "2").spawn().unwrap();
        let begun = Instant::now();
        let mut workers = children(run.id());
        while workers.is_empty() && begun.elapsed() < Duration::from_secs(20) {
            thread::sleep(Duration::from_millis(2));
            workers = children(run.id());
        }
        assert!(!workers.is_empty(), "no worker is started");
        thread::sleep(Duration::from_millis(numbers.below(150) as u64));
        workers.extend(children(run.id()));
        run.kill().unwrap();
        run.wait().unwrap();
        let killed = Instant::now();
        let runs = |pid: &u32| {
            fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
        };
        while workers.iter().any(runs) {
            assert!(
                killed.elapsed() < Duration::from_secs(10),
                "a worker outlives its run"
            );
            thread::sleep(Duration::from_millis(5));
        }
    }
    let ran = ended(command(&scene, "3").spawn().unwrap());
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    assert_eq!(scene.tables(RUN), alone.tables(RUN));
}

/// One file is written by one part of one table, so each process that computes this part is killed.
#[test]
fn the_third_death_of_a_part_is_a_fault_of_its_rows() {
    let scene = scene(60);
    let shim = shim(&scene);
    let mut run = command(&scene, "2");
    doom(
        &mut run,
        &scene,
        &shim,
        "candidates/round-1/part-00003 before 1 0",
    );
    let run = run.args(["--set", "rounds=1", "--set", "reject_share_max=0.5"]);
    let ran = said(run.output().unwrap());
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    let rejects = scene.succeeds(&[
        "sql",
        RUN,
        "select count(*) as rows, min(reason) as reason, min(class) as class from rejects where stage = 'candidates'",
        "--format",
        "csv",
    ]);
    assert_eq!(
        rejects.out,
        "rows,reason,class\n7,\"the worker that computed it, or another row of its part, ended 3 times, \
         the last time with signal 9\",fault\n"
    );
    let rows = scene.succeeds(&[
        "sql",
        RUN,
        "select count(*) as n from candidates",
        "--format",
        "csv",
    ]);
    assert_eq!(rows.out, format!("n\n{}\n", (60 - 7) * 5));
}

/// Workers that end before anything was computed are no fault of the rows.
#[test]
fn workers_that_never_finish_anything_end_the_run() {
    let scene = scene(60);
    let shim = shim(&scene);
    let mut run = command(&scene, "2");
    doom(
        &mut run,
        &scene,
        &shim,
        "candidates/round-1/part- before 1 0",
    );
    let ran = said(run.output().unwrap());
    assert_eq!(ran.code, Some(1), "{}", ran.err);
    let words = "workers have ended without finishing a part, the last one with signal 9";
    assert!(ran.err.contains(words), "{}", ran.err);
    let rest = scene.succeeds(&["run", "p.yaml"]);
    assert!(rest.err.contains("done:"), "{}", rest.err);
}

#[test]
fn a_signal_stops_workers_and_progress_is_kept() {
    let scene = scene(20_000);
    let run = command(&scene, "2").spawn().unwrap();
    wait_for_parts(&scene, 1);
    let pid = run.id().to_string();
    Command::new("kill").args(["-INT", &pid]).output().unwrap();
    let ran = ended(run);
    assert_eq!(ran.code, Some(130), "{}", ran.err);
    assert!(ran.err.contains("progress is saved"), "{}", ran.err);
    wait_for_parts(&scene, 1);
}

#[test]
fn plan_divides_times_and_tells_the_workers() {
    let scene = scene(60);
    scene.succeeds(&["run", "p.yaml", "--set", "rounds=1"]);
    let seconds = |workers: &[&str]| -> f64 {
        let arguments = [&["plan", "p.yaml", "--format", "json"], workers].concat();
        let plan: serde_json::Value =
            serde_json::from_str(&scene.succeeds(&arguments).out).unwrap();
        let tables = plan["tables"].as_array().unwrap();
        let table = tables
            .iter()
            .find(|one| one["table"] == "candidates" && one["round"] == 2);
        table.unwrap()["seconds"].as_f64().unwrap()
    };
    let (one, two) = (seconds(&[]), seconds(&["--workers", "2"]));
    assert!((one / two - 2.0).abs() < 1e-6, "{one} {two}");
}
