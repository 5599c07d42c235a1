//! Ranks of a cluster, which find each other by the variables that a launcher sets.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::{RUN, ended, scene, wait_for_parts};
use crate::chaos::networks;
use crate::scene::{Scene, said};

/// The time after which a rank without rank 0 has ended.
const ENDS_WITHIN: Duration = Duration::from_secs(10);

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// The command of a rank of `world`.
fn rank(scene: &Scene, rank: u32, world: u32, port: u16) -> Command {
    let mut command = scene.command(&["run", "p.yaml"]);
    command
        .env("RANK", rank.to_string())
        .env("WORLD_SIZE", world.to_string())
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", port.to_string())
        .env("OMP_NUM_THREADS", "1")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn start(scene: &Scene, world: u32) -> Vec<Child> {
    let port = free_port();
    let ranks = 0..world;
    ranks
        .map(|number| rank(scene, number, world, port).spawn().unwrap())
        .collect()
}

#[test]
fn three_ranks_make_the_tables_of_one_process() {
    let alone = scene(600);
    alone.succeeds(&["run", "p.yaml"]);
    let scene = scene(600);
    let mut outputs = start(&scene, 3).into_iter().map(ended);
    let first = outputs.next().unwrap();
    assert_eq!(first.code, Some(0), "{}", first.err);
    for said in [
        "1 worker of each of 3 ranks: candidates, rewards, answers, grades",
        "rank 0 alone: prompts, pairs, steps",
    ] {
        assert!(first.err.contains(said), "{}", first.err);
    }
    for other in outputs {
        assert_eq!(other.code, Some(0), "{}", other.err);
        assert!(
            other.err.contains("computing candidates (round 2)"),
            "{}",
            other.err
        );
    }
    assert_eq!(scene.tables(RUN), alone.tables(RUN));
}

/// The launcher starts all ranks again.
#[test]
fn a_rank_that_dies_costs_the_parts_that_it_had() {
    let alone = scene(6_000);
    alone.succeeds(&["run", "p.yaml"]);
    let scene = scene(6_000);
    let mut ranks = start(&scene, 3);
    wait_for_parts(&scene, 20);
    ranks[1].kill().unwrap();
    thread::sleep(Duration::from_millis(200));
    for mut rank in ranks {
        rank.kill().unwrap();
        rank.wait().unwrap();
    }
    for rank in start(&scene, 3) {
        let rank = ended(rank);
        assert_eq!(rank.code, Some(0), "{}", rank.err);
    }
    assert_eq!(scene.tables(RUN), alone.tables(RUN));
}

/// As by Kubernetes, which starts a lost pod again without the others.
#[test]
fn a_rank_that_is_started_again_ends_the_run() {
    let scene = scene(20_000);
    let port = free_port();
    let first = rank(&scene, 0, 2, port).spawn().unwrap();
    let mut second = rank(&scene, 1, 2, port).spawn().unwrap();
    wait_for_parts(&scene, 4);
    second.kill().unwrap();
    second.wait().unwrap();
    let again = rank(&scene, 1, 2, port).spawn().unwrap();
    let first = ended(first);
    assert_eq!(first.code, Some(1), "{}", first.err);
    assert!(
        first.err.contains("a rank was started again"),
        "{}",
        first.err
    );
    ended(again);
}

#[test]
fn without_rank_0_the_others_end_with_words() {
    let scene = scene(20_000);
    let mut ranks = start(&scene, 3);
    wait_for_parts(&scene, 4);
    let mut first = ranks.remove(0);
    first.kill().unwrap();
    first.wait().unwrap();
    let killed = Instant::now();
    for rank in ranks {
        let rank = ended(rank);
        assert_eq!(rank.code, Some(1), "{}", rank.err);
        let words = "the connection to the other ranks is lost";
        assert!(rank.err.contains(words), "{}", rank.err);
    }
    assert!(killed.elapsed() < ENDS_WITHIN, "{:?}", killed.elapsed());
}

#[test]
fn workers_with_networks_make_the_same_bits() {
    let made = |workers: &[&str]| {
        let scene = networks::scene();
        let mut command = scene.command(&[&["run", "p.yaml"], workers].concat());
        let ran = said(command.env("OMP_NUM_THREADS", "1").output().unwrap());
        assert_eq!(ran.code, Some(0), "{}", ran.err);
        assert_eq!(
            ran.err.contains("2 workers: "),
            !workers.is_empty(),
            "{}",
            ran.err
        );
        let weights: Vec<Vec<u8>> = scene.checkpoints(networks::RUN).into_values().collect();
        (scene.tables(networks::RUN), weights)
    };
    let alone = made(&[]);
    assert!(
        alone == made(&["--workers", "2"]),
        "the tables or weights differ"
    );
}
