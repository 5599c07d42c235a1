//! The health of rounds, the guard that acts on it, and the best round.

use std::collections::HashSet;

use ovchat_data::tables::{Candidate, DpoStep, Health, Pair, Reward};

use crate::run::{SCRIPTED, rows};
use crate::scene::Scene;

/// A finished run of the scripted pipeline with changes.
fn ran(changes: &[(&str, &str)]) -> Scene {
    let scene = Scene::new();
    scene
        .prompts(40)
        .write("p.yaml", changed(changes))
        .succeeds(&["run", "p.yaml"]);
    scene
}

fn changed(changes: &[(&str, &str)]) -> String {
    let text = SCRIPTED.to_owned();
    changes.iter().fold(text, |text, (from, to)| {
        assert!(text.contains(from), "{from}");
        text.replace(from, to)
    })
}

/// The metric of a round.
fn metric(scene: &Scene, round: u32, name: &str) -> Health {
    let all: Vec<Health> = rows(scene, "health", Some(round));
    let found = all.iter().find(|row| row.metric == name);
    found
        .unwrap_or_else(|| panic!("no `{name}` in {all:?}"))
        .clone()
}

fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let values: Vec<f64> = values.into_iter().collect();
    values.iter().sum::<f64>() / values.len() as f64
}

#[track_caller]
fn assert_near(found: Option<f64>, expected: f64) {
    let found = found.expect("a value");
    assert!((found - expected).abs() < 1e-9, "{found} is not {expected}");
}

/// The distinct n-grams of some sequences, and the number of all.
fn grams<'a>(sequences: impl Iterator<Item = &'a [i32]>, n: usize) -> (HashSet<&'a [i32]>, usize) {
    let all: Vec<&[i32]> = sequences.flat_map(|tokens| tokens.windows(n)).collect();
    (all.iter().copied().collect(), all.len())
}

#[test]
fn the_metrics_are_what_their_formulas_say() {
    let scene = ran(&[]);
    let answers: Vec<Candidate> = rows(&scene, "candidates", Some(2));
    let rewards: Vec<Reward> = rows(&scene, "rewards", Some(2));
    let lengths = || answers.iter().map(|answer| answer.token_ids.len() as f64);
    assert_near(metric(&scene, 2, "answer_tokens").value, mean(lengths()));
    assert_near(
        metric(&scene, 2, "reward").value,
        mean(rewards.iter().map(|row| f64::from(row.reward))),
    );

    // Both as differences from the mean of the prompt.
    let centered: Vec<(f64, f64)> = answers
        .chunks(5)
        .zip(rewards.chunks(5))
        .flat_map(|(answers, rewards)| {
            let length = mean(answers.iter().map(|row| row.token_ids.len() as f64));
            let reward = mean(rewards.iter().map(|row| f64::from(row.reward)));
            let both = answers.iter().zip(rewards);
            both.map(move |(answer, row)| {
                (
                    answer.token_ids.len() as f64 - length,
                    f64::from(row.reward) - reward,
                )
            })
        })
        .collect();
    let sum = |value: fn(&(f64, f64)) -> f64| centered.iter().map(value).sum::<f64>();
    let expected = sum(|(x, y)| x * y) / (sum(|(x, _)| x * x) * sum(|(_, y)| y * y)).sqrt();
    let found = metric(&scene, 2, "length_correlation_within");
    assert_near(found.value, expected);
    assert_eq!((found.source.as_str(), found.n), ("rewards", Some(200)));

    let per_prompt = answers.chunks(5).filter_map(|answers| {
        let (distinct, all) = grams(answers.iter().map(|answer| &answer.token_ids[..]), 2);
        (all > 0).then(|| distinct.len() as f64 / all as f64)
    });
    assert_near(metric(&scene, 2, "distinct_2").value, mean(per_prompt));
    let per_answer = answers.iter().filter_map(|answer| {
        let (distinct, all) = grams(std::iter::once(&answer.token_ids[..]), 4);
        (all > 0).then(|| 1.0 - distinct.len() as f64 / all as f64)
    });
    assert_near(metric(&scene, 2, "repeated_4").value, mean(per_answer));
    let cut = answers
        .iter()
        .filter(|answer| answer.finish.as_str() == "length")
        .count();
    assert_near(metric(&scene, 2, "cut_off").value, cut as f64 / 200.0);

    let pairs: Vec<Pair> = rows(&scene, "pairs", Some(2));
    let tokens = |ids: &Option<Vec<i32>>| ids.as_ref().unwrap().len() as f64;
    let chosen = mean(pairs.iter().map(|pair| tokens(&pair.chosen_token_ids)));
    let rejected = mean(pairs.iter().map(|pair| tokens(&pair.rejected_token_ids)));
    assert_near(metric(&scene, 2, "length_ratio").value, chosen / rejected);
    assert_near(metric(&scene, 1, "length_growth").value, 1.0);

    // Greedy scripted answers never change.
    assert_near(metric(&scene, 1, "heldout_unchanged").value, 1.0);
    let gain = metric(&scene, 2, "heldout_gain");
    assert_eq!(
        (gain.value, gain.low, gain.high, gain.n),
        (Some(0.0), Some(0.0), Some(0.0), Some(40))
    );
    assert_near(
        metric(&scene, 0, "heldout_reward").value,
        metric(&scene, 2, "heldout_reward").value.unwrap(),
    );
    let start: Vec<Health> = rows(&scene, "health", Some(0));
    assert!(
        start.iter().all(|row| row.metric.starts_with("heldout")),
        "{start:?}"
    );
}

#[test]
fn a_gain_has_the_interval_of_paired_prompts() {
    let scene = ran(&[("count: 1, temperature: 0", "count: 1, temperature: 1.0")]);
    let rewards = |round| -> Vec<f64> {
        let rows: Vec<Reward> = rows(&scene, "grades", Some(round));
        rows.iter().map(|row| f64::from(row.reward)).collect()
    };
    for (name, before) in [("heldout_gain", 0), ("heldout_step", 1)] {
        let gains: Vec<f64> = rewards(2)
            .iter()
            .zip(rewards(before))
            .map(|(now, then)| now - then)
            .collect();
        let gain = mean(gains.iter().copied());
        // No two prompts share an image, so each is a cluster.
        let squares: f64 = gains.iter().map(|one| (one - gain).powi(2)).sum();
        let error = (40.0 / 39.0 * squares).sqrt() / 40.0;
        let found = metric(&scene, 2, name);
        assert_near(found.value, gain);
        let reach = found.high.unwrap() - gain;
        assert_near(found.low, gain - reach);
        // The quantile 0.975 of t(39), from a table.
        assert!((reach / error - 2.0227).abs() < 1e-3, "{}", reach / error);
    }
}

#[test]
fn the_queries_are_those_that_anyone_can_run() {
    let scene = ran(&[]);
    let said = scene.succeeds(&["health", "scripted"]);
    assert!(said.out.contains("heldout_gain"), "{}", said.out);
    let said = scene.succeeds(&["health", "scripted", "--sql"]);
    for query in said
        .out
        .split(";\n")
        .map(str::trim)
        .filter(|query| !query.is_empty())
    {
        let said = scene.succeeds(&["sql", "scripted", query]);
        assert!(said.out.contains("metric"), "{query}\n{}", said.out);
    }
}

#[test]
fn a_condition_that_stops_keeps_everything_and_is_left_by_changing_it() {
    let scene = Scene::new();
    let guard = "rounds: 2\nguard: { answer_tokens > 1: stop, heldout_unchanged > 0.5: warn }";
    scene
        .prompts(12)
        .write("p.yaml", changed(&[("rounds: 2", guard)]));
    for _ in 0..2 {
        let said = scene.pipeline(&["run", "p.yaml"]);
        assert_eq!(said.code, Some(1), "{}", said.err);
        let stopped = "the guard stops the run after round 1: `answer_tokens` of `candidates` is";
        assert!(said.err.contains(stopped), "{}", said.err);
        assert!(
            said.err.contains("pipeline health runs/scripted"),
            "{}",
            said.err
        );
    }
    assert!(scene.path("runs/scripted/checkpoints/round-1").exists());
    let status = scene.succeeds(&["status", "scripted"]);
    assert!(
        status.out.contains("! round 1: answer_tokens > 1 (stop)"),
        "{}",
        status.out
    );
    let free = guard.replace("stop", "off");
    scene.write("p.yaml", changed(&[("rounds: 2", &free)]));
    let said = scene.succeeds(&["run", "p.yaml"]);
    let warned = "warning: round 2: `heldout_unchanged` of `answers` is 1, and the guard watches for heldout_unchanged > 0.5";
    assert!(said.err.contains(warned), "{}", said.err);
    let again = scene.succeeds(&["run", "p.yaml"]);
    assert!(again.err.contains("up to date"), "{}", again.err);
    assert!(
        again.err.contains(warned),
        "a rerun warns again: {}",
        again.err
    );
}

#[test]
fn a_query_guards_with_all_tables_and_the_metrics_of_the_round() {
    let query = "select value > 0 from health where metric = 'answer_tokens' and round = $round";
    let guard = format!("rounds: 2\nguard: {{ defaults: off, \"{query}\": warn }}");
    let scene = ran(&[("rounds: 2", &guard)]);
    let found: Vec<Health> = rows(&scene, "health", Some(2));
    let of_query = found.iter().find(|row| row.metric == "query").unwrap();
    assert_eq!(
        (of_query.value, of_query.action.as_deref()),
        (Some(1.0), Some("warn"))
    );
    assert_eq!(of_query.source, query);
    let others = found.iter().filter(|row| row.metric != "query");
    assert!(
        others.into_iter().all(|row| row.action.is_none()),
        "defaults are off"
    );
}

#[test]
fn rounds_can_end_by_the_health() {
    let query = "select value > 0 from health where metric = 'answer_tokens' and round = $round";
    let rounds = format!("rounds: {{ max: 3, stop_when: \"{query}\" }}");
    let scene = ran(&[("rounds: 2", &rounds)]);
    assert!(scene.path("runs/scripted/checkpoints/round-1").exists());
    assert!(!scene.path("runs/scripted/checkpoints/round-2").exists());
}

#[test]
fn a_judge_that_rewards_length_trips_the_defaults() {
    let scene = ran(&[(
        "judge: { scripted: {} }",
        "judge: { sql: { reward: length(text) } }",
    )]);
    for round in [1, 2] {
        for name in ["length_correlation_within", "length_ratio"] {
            let row = metric(&scene, round, name);
            assert_eq!(row.action.as_deref(), Some("warn"), "{row:?}");
        }
    }
}

#[test]
fn the_best_round_is_exported_and_of_equal_ones_the_first() {
    let rounds = |by: &str| format!("rounds: {{ max: 3, keep: best, by: \"{by}\" }}");
    let scene = Scene::new();
    let exported = |scene: &Scene, by: &str, round: &[&str]| -> Vec<u8> {
        let to = format!(
            "out-{}",
            std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .unwrap()
                .as_nanos()
        );
        scene
            .write("p.yaml", changed(&[("rounds: 2", &rounds(by))]))
            .succeeds(&["run", "p.yaml"]);
        let mut arguments = vec!["export", "scripted", "checkpoint", "--to", &to];
        arguments.extend(round);
        scene.succeeds(&arguments);
        std::fs::read(scene.path(&to).join("scripted.json")).unwrap()
    };
    scene.prompts(12);
    let checkpoint = |scene: &Scene, round: u32| {
        std::fs::read(scene.path(&format!(
            "runs/scripted/checkpoints/round-{round}/scripted.json"
        )))
        .unwrap()
    };
    let second = exported(&scene, "select 1.0 - abs($round - 2)", &[]);
    assert_eq!(second, checkpoint(&scene, 2));
    assert_ne!(second, checkpoint(&scene, 3));
    assert_eq!(
        exported(&scene, "select 7", &[]),
        checkpoint(&scene, 1),
        "of equal rounds, the first"
    );
    assert_eq!(
        exported(&scene, "select 7", &["--round", "3"]),
        checkpoint(&scene, 3)
    );
    let status = scene.succeeds(&["status", "scripted"]);
    assert!(
        status.out.contains("best round so far: 1"),
        "{}",
        status.out
    );
    // A null is no value, and the start model is no round.
    let by = "select case when $round = 3 then 0.5 when $round = 0 then 9 end";
    assert_eq!(exported(&scene, by, &[]), checkpoint(&scene, 3));
    let said = scene.succeeds(&["run", "p.yaml"]);
    let warned = "warning: round 2: `rounds.by` has no value, so this round cannot be the best";
    assert_eq!(
        said.err.matches("`rounds.by` has no value").count(),
        2,
        "{}",
        said.err
    );
    assert!(said.err.contains(warned), "{}", said.err);
}

#[test]
fn a_table_of_the_users_with_the_name_is_left_alone() {
    let own = "  health: { sql: { tables: [rewards], query: select count(*) as rows from rewards } }\nevaluate:";
    let scene = ran(&[("evaluate:", own)]);
    let said = scene.succeeds(&[
        "sql",
        "scripted",
        "select rows from health",
        "--format",
        "csv",
    ]);
    assert_eq!(said.out.lines().nth(1), Some("200"));
    let said = scene.succeeds(&["health", "scripted"]);
    assert!(said.out.contains("has no health yet"), "{}", said.out);
}

#[test]
fn agreement_with_known_answers_and_the_log_ratio_are_what_their_formulas_say() {
    let scene = Scene::new();
    let record = |number: u32| serde_json::json!({"id": number.to_string(), "prompt": format!("Which {number}?"), "answer": " Red"});
    let records: Vec<_> = (0..40).map(record).collect();
    scene.write("prompts.json", serde_json::json!(records).to_string());
    let one_word = changed(&[(
        "policy: { scripted: {} }",
        "policy: { scripted: { words: 1 } }",
    )]);
    scene.write("p.yaml", one_word).succeeds(&["run", "p.yaml"]);
    let answers: Vec<Candidate> = rows(&scene, "candidates", Some(2));
    let rewards: Vec<Reward> = rows(&scene, "rewards", Some(2));
    let is_right = |answer: &Candidate| answer.text.trim().to_lowercase() == "red";
    let right = answers
        .iter()
        .map(|answer| f64::from(u8::from(is_right(answer))));
    assert_near(metric(&scene, 2, "right").value, mean(right));
    let mut agrees = Vec::new();
    for (answers, rewards) in answers.chunks(5).zip(rewards.chunks(5)) {
        let of = |wanted: bool| {
            let both = answers.iter().zip(rewards);
            both.filter(move |(answer, _)| is_right(answer) == wanted)
                .map(|(_, row)| row.reward)
        };
        for one in of(true) {
            agrees.extend(of(false).map(|other| match one.total_cmp(&other) {
                std::cmp::Ordering::Greater => 1.0,
                std::cmp::Ordering::Equal => 0.5,
                std::cmp::Ordering::Less => 0.0,
            }));
        }
    }
    let found = metric(&scene, 2, "judge_right");
    assert_eq!(found.n, Some(agrees.len() as i64));
    assert!(agrees.len() > 10, "{}", agrees.len());
    assert_near(found.value, mean(agrees));
    let heldout: Vec<Candidate> = rows(&scene, "answers", Some(2));
    let right = heldout
        .iter()
        .map(|answer| f64::from(u8::from(is_right(answer))));
    assert_near(metric(&scene, 2, "heldout_right").value, mean(right));

    // The last tenth of the steps of each round, added up; the default beta is 0.1.
    let of_round = |round| {
        let steps: Vec<DpoStep> = rows(&scene, "steps", Some(round));
        let last = steps
            .iter()
            .filter(|step| f64::from(step.step) > 0.9 * steps.len() as f64);
        mean(last.map(|step| (step.rewards_chosen + step.rewards_rejected) / 2.0 / 0.1))
    };
    assert_near(
        metric(&scene, 2, "log_ratio").value,
        of_round(1) + of_round(2),
    );
}
