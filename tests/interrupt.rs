//! Killed, stopped and concurrent runs: finished work stays, and the next run gives the same
//! result.

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ovchat_data::store::RunFolder;
use ovchat_data::tables::Reward;

use crate::run::{SCRIPTED, rows};
use crate::scene::Scene;

/// A pipeline with many parts in every table, so that a kill can hit the middle of each.
fn slow() -> String {
    SCRIPTED
        .replace("part: 7", "part: 1")
        .replace("part: 5", "part: 1")
        .replace("save_every: 2", "save_every: 1")
}

fn start(scene: &Scene) -> Child {
    let mut command = scene.command(&["run", "p.yaml"]);
    command
        .stderr(Stdio::null())
        .spawn()
        .expect("the program starts")
}

/// Waits until a table is started and has at least `parts` parts.
fn wait_for(scene: &Scene, child: &mut Child, table: &str, round: Option<u32>, parts: usize) {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_mins(1) {
        if let Ok(run) = RunFolder::read(&scene.path("runs/scripted"))
            && let Some(made) = run.manifest().find(table, round)
            && (made.complete || made.parts.len() >= parts)
        {
            return;
        }
        if child.try_wait().unwrap().is_some() {
            return;
        }
        std::thread::yield_now();
    }
    panic!("`{table}` was not begun within a minute");
}

#[test]
fn a_run_killed_in_every_kind_of_stage_ends_as_an_undisturbed_one() {
    let undisturbed = Scene::new();
    undisturbed
        .prompts(60)
        .write("p.yaml", slow())
        .succeeds(&["run", "p.yaml"]);
    let scene = Scene::new();
    scene.prompts(60).write("p.yaml", slow());
    let moments = [
        ("prompts", None, 0),
        ("answers", Some(0), 1),
        ("candidates", Some(1), 3),
        ("rewards", Some(1), 5),
        ("pairs", Some(1), 0),
        ("steps", Some(1), 2),
        ("candidates", Some(2), 20),
        ("steps", Some(2), 4),
        ("grades", Some(2), 0),
    ];
    let mut killed = 0;
    for (table, round, parts) in moments {
        let mut child = start(&scene);
        wait_for(&scene, &mut child, table, round, parts);
        let _ = child.kill();
        killed += usize::from(child.wait().unwrap().signal() == Some(9));
    }
    assert!(
        killed >= 6,
        "only {killed} runs were still going when they were killed"
    );
    println!("{killed} kills in the middle of tables");
    scene.succeeds(&["run", "p.yaml"]);
    assert_eq!(
        scene.tables("runs/scripted"),
        undisturbed.tables("runs/scripted")
    );
    let weights = |scene: &Scene| {
        scene
            .checkpoints("runs/scripted")
            .into_values()
            .collect::<Vec<_>>()
    };
    assert_eq!(weights(&scene), weights(&undisturbed));
}

#[test]
fn a_stopped_run_says_so_with_its_exit_code_and_goes_on() {
    let scene = Scene::new();
    scene.prompts(400).write("p.yaml", slow());
    let mut child = start(&scene);
    wait_for(&scene, &mut child, "candidates", Some(1), 2);
    let stopped = std::process::Command::new("kill")
        .args(["-TERM", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(stopped.success());
    assert_eq!(child.wait().unwrap().code(), Some(143));
    scene.succeeds(&["run", "p.yaml"]);
    assert!(
        scene
            .succeeds(&["run", "p.yaml"])
            .err
            .contains("nothing to do")
    );
}

/// Both find no folder; the second one gets an error that names the first, or finds everything up
/// to date.
#[test]
fn of_two_first_starts_at_once_one_is_told_of_the_other() {
    let mut refused = 0;
    for _ in 0..8 {
        let scene = Scene::new();
        scene.prompts(200).write("p.yaml", SCRIPTED);
        let both = [(), ()].map(|()| {
            let mut command = scene.command(&["run", "p.yaml"]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().unwrap()
        });
        let ids = both.each_ref().map(Child::id);
        let both = both.map(|child| crate::scene::said(child.wait_with_output().unwrap()));
        for (said, other) in both.iter().zip([ids[1], ids[0]]) {
            if said.code == Some(0) {
                continue;
            }
            refused += 1;
            let told = format!("the run runs/scripted is in use by process {other} ");
            assert!(said.err.contains(&told), "{}", said.err);
        }
        assert!(both.iter().any(|said| said.code == Some(0)));
        assert_eq!(rows::<Reward>(&scene, "rewards", Some(2)).len(), 1000);
    }
    assert!(refused > 0, "they never met");
}

#[test]
fn a_run_in_use_is_refused_and_its_holder_is_named() {
    let scene = Scene::new();
    scene.prompts(400).write("p.yaml", slow());
    let mut child = start(&scene);
    wait_for(&scene, &mut child, "candidates", Some(1), 1);
    let second = scene.pipeline(&["run", "p.yaml"]);
    let status = scene.pipeline(&["status", "scripted"]);
    let _ = child.kill();
    child.wait().unwrap();
    assert_eq!(second.code, Some(1));
    assert!(
        second
            .err
            .contains(&format!("is in use by process {}", child.id())),
        "{}",
        second.err
    );
    assert!(status.out.contains("running, process"), "{}", status.out);
}

#[test]
fn a_report_that_never_ends_hears_the_first_signal() {
    let scene = Scene::new();
    let endless =
        "with recursive t as (select 1 a union all select a + 1 from t) select count(*) n from t";
    let pipeline = format!(
        "pipeline: scripted\nstages:\n  prompts: {{ load_prompts: {{ from: prompts.json }} }}\nreport:\n  \
         endless: {{ query: \"{endless}\" }}\n"
    );
    scene.prompts(3).write("p.yaml", pipeline);
    let mut command = scene.command(&["run", "p.yaml"]);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("prompts: 3 rows")));
    let asked = Instant::now();
    let sent = Command::new("kill")
        .args(["-TERM", &child.id().to_string()])
        .status();
    assert!(sent.unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert!(
        asked.elapsed() < Duration::from_secs(2),
        "{:?}",
        asked.elapsed()
    );
}
