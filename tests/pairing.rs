//! Pairing strategies, their previews, and exams of judges.

use ovchat_data::tables::{DpoStep, Pair};

use crate::run::{SCRIPTED, rows};
use crate::scene::Scene;

/// Returns the pairs of round 1 with these settings of `select_pairs`; the run trains on them.
fn selected(settings: &str) -> Vec<Pair> {
    let scene = Scene::new();
    let pipeline = SCRIPTED.replace(
        "select_extremes: { rewards: rewards }",
        &format!("select_pairs: {{ rewards: rewards, {settings} }}"),
    );
    scene
        .prompts(12)
        .write("p.yaml", &pipeline)
        .succeeds(&["run", "p.yaml", "--set", "rounds=1"]);
    let steps: Vec<DpoStep> = rows(&scene, "steps", Some(1));
    assert!(steps.iter().all(|step| step.loss.is_finite()));
    rows(&scene, "pairs", Some(1))
}

#[test]
fn each_strategy_pairs_what_its_name_says() {
    let scene = Scene::new();
    scene
        .prompts(12)
        .write("p.yaml", SCRIPTED)
        .succeeds(&["run", "p.yaml", "--set", "rounds=1"]);
    let names = |pairs: &[Pair]| -> Vec<(String, Option<i32>, Option<i32>)> {
        let pairs = pairs.iter();
        pairs
            .map(|pair| {
                (
                    pair.prompt_id.clone(),
                    pair.chosen_candidate,
                    pair.rejected_candidate,
                )
            })
            .collect()
    };
    let extremes: Vec<Pair> = rows(&scene, "pairs", Some(1));
    let best_worst = selected("strategy: best_worst");
    assert_eq!(names(&best_worst), names(&extremes));

    let all = selected("strategy: all_pairs");
    assert!(all.len() > 6 * 12 && all.iter().all(|pair| pair.margin.unwrap() > 0.0));
    let keys: std::collections::BTreeSet<&str> =
        all.iter().map(|pair| pair.row_key.as_str()).collect();
    assert_eq!(keys.len(), all.len(), "each pair has a name of its own");
    let two = selected("strategy: all_pairs, pairs_max: 2");
    assert_eq!(two.len(), 24);
    // The two pairs of a prompt with the largest margins, the largest first.
    for (pair, extreme) in two.chunks(2).zip(&extremes) {
        assert_eq!(pair[0].margin, extreme.margin);
        assert!(pair[1].margin <= pair[0].margin);
    }

    let seconds = selected("strategy: best_second");
    let random = selected("strategy: best_random");
    for ((second, random), extreme) in seconds.iter().zip(&random).zip(&extremes) {
        assert_eq!(second.chosen_candidate, extreme.chosen_candidate);
        assert_eq!(random.chosen_candidate, extreme.chosen_candidate);
        assert!(second.margin <= random.margin && random.margin <= extreme.margin);
    }
    assert!(names(&random) != names(&seconds) && names(&random) != names(&best_worst));
    assert_eq!(names(&random), names(&selected("strategy: best_random")));
}

#[test]
fn pairs_are_matched_in_length_and_margin_when_asked_for() {
    let tokens = |ids: &Option<Vec<i32>>| ids.as_ref().unwrap().len() as f64;
    let matched = selected("strategy: all_pairs, length_ratio_max: 1.25");
    assert!(!matched.is_empty());
    for pair in &matched {
        let (chosen, rejected) = (
            tokens(&pair.chosen_token_ids),
            tokens(&pair.rejected_token_ids),
        );
        assert!(chosen.max(rejected) <= 1.25 * chosen.min(rejected));
    }
    let wide = selected("strategy: all_pairs, margin_min: 0.5");
    assert!(!wide.is_empty() && wide.iter().all(|pair| pair.margin.unwrap() >= 0.5));
    // With such a large penalty, the shortest answer wins.
    for pair in selected("strategy: best_worst, length_penalty: 1000") {
        assert!(tokens(&pair.chosen_token_ids) <= tokens(&pair.rejected_token_ids));
    }
}

/// Every answer is one of two texts that differ in case and punctuation only.
#[test]
fn answers_that_nearly_read_the_same_make_a_pair_unless_they_are_dropped() {
    let pairs_with = |near_equal: &str| {
        let scene = Scene::new();
        let pipeline = SCRIPTED
            .replace(
                "  pairs:\n    select_extremes: { rewards: rewards }",
                &format!(
                    "  alike:\n    sql:\n      tables: [candidates]\n      query: >\n        select * exclude (text), \
                     case when candidate % 2 = 0 then 'Yes, it is.' else 'yes it  is' end as text from candidates \
                     order by prompt_id, candidate\n  pairs:\n    select_pairs: {{ rewards: rewards, \
                     candidates: alike, prompts: prompts, strategy: all_pairs, near_equal: {near_equal} }}"
                ),
            );
        scene
            .prompts(12)
            .write("p.yaml", &pipeline)
            .succeeds(&["run", "p.yaml", "--set", "rounds=1", "--until", "pairs"]);
        rows::<Pair>(&scene, "pairs", Some(1)).len()
    };
    assert!(pairs_with("keep") > 12);
    assert_eq!(pairs_with("drop"), 0);
}

/// Answers in any order give the same pairs: the rows of a prompt need not be adjacent.
#[test]
fn the_order_of_candidates_does_not_matter() {
    for stage_type in ["select_extremes", "select_pairs"] {
        let pairs_by = |order: &str| {
            let scene = Scene::new();
            let pipeline = SCRIPTED.replace(
                "  pairs:\n    select_extremes: { rewards: rewards }",
                &format!(
                    "  sorted:\n    sql:\n      tables: [candidates]\n      query: select * from candidates order by {order}\n  \
                     pairs:\n    {stage_type}: {{ rewards: rewards, candidates: sorted, prompts: prompts }}"
                ),
            );
            scene
                .prompts(12)
                .write("p.yaml", &pipeline)
                .succeeds(&["run", "p.yaml", "--set", "rounds=1", "--until", "pairs"]);
            rows::<Pair>(&scene, "pairs", Some(1))
        };
        let adjacent = pairs_by("prompt_id, candidate");
        assert_eq!(adjacent.len(), 12);
        assert_eq!(pairs_by("candidate, prompt_id"), adjacent, "{stage_type}");
    }
}

/// Rewards in any order give the same pairs; those of a prompt need not be adjacent.
#[test]
fn the_order_of_rewards_does_not_matter() {
    let pairs_by = |order: &str| {
        let scene = Scene::new();
        let pipeline = SCRIPTED.replace(
            "  pairs:\n    select_extremes: { rewards: rewards }",
            &format!(
                "  sorted:\n    sql:\n      tables: [rewards]\n      query: select * from rewards order by {order}\n  \
                 pairs:\n    select_extremes: {{ rewards: sorted, candidates: candidates, prompts: prompts }}"
            ),
        );
        scene
            .prompts(12)
            .write("p.yaml", &pipeline)
            .succeeds(&["run", "p.yaml", "--set", "rounds=1", "--until", "pairs"]);
        rows::<Pair>(&scene, "pairs", Some(1))
    };
    let together = pairs_by("prompt_id, candidate");
    assert_eq!(together.len(), 12);
    assert_eq!(pairs_by("candidate desc, reward"), together);
}

#[test]
fn another_way_to_pair_is_shown_without_changing_the_run() {
    let scene = Scene::new();
    scene
        .prompts(12)
        .write("p.yaml", SCRIPTED)
        .succeeds(&["run", "p.yaml", "--set", "rounds=1"]);
    let before = scene.tables("runs/scripted");
    let show = |more: &[&str]| {
        scene.pipeline(&[&["pairs", "runs/scripted", "--format", "csv"], more].concat())
    };
    let now = show(&["--strategy", "best_worst"]);
    let line = now.out.lines().nth(1).unwrap().to_owned();
    assert!(
        line.starts_with("12,12,") && line.ends_with(",12"),
        "{}",
        now.out
    );
    let other = show(&[
        "--strategy",
        "all_pairs",
        "--set",
        "pairs_max=3",
        "--set",
        "margin_min=0.1",
    ]);
    assert!(
        other.out.lines().nth(1).unwrap().contains(",12,"),
        "{}",
        other.out
    );
    assert_eq!(scene.tables("runs/scripted"), before);
    for (arguments, words) in [
        (&["--strategy", "best"][..], "best_worst"),
        (
            &["--strategy", "best_worst", "--rewards", "reward"],
            "; found: ",
        ),
        (
            &["--strategy", "best_worst", "--set", "margin"],
            "SETTING=VALUE",
        ),
    ] {
        let failed = show(arguments);
        assert!(
            failed.code == Some(2) && failed.err.contains(words),
            "{}",
            failed.err
        );
    }
}

/// A pipeline with an exam: the judge scores human preferences first, and a judge that fails scores
/// nothing else.
const EXAM: &str = "
pipeline: scripted
seed: 3
models:
  policy: { scripted: {} }
  judge: { scripted: {} }
stages:
  labels:
    load_feedback: { from: labels.json }
  exam:
    compare: { pairs: labels, judge: judge }
  prompts:
    load_prompts: { from: prompts.json }
  candidates:
    sample: { prompts: prompts, model: policy }
  rewards:
    score: { candidates: candidates, judge: judge }
expect:
  a_judge_that_agrees: { table: exam, value: avg(case when agrees then 1.0 else 0.0 end), at_least: 0.62 }
  short_answers: { table: candidates, query: select text from candidates where length(text) > 30, otherwise: warn }
";

#[test]
fn a_judge_that_fails_its_exam_scores_nothing_until_it_passes() {
    let scene = Scene::new();
    let labels = |better: &str, worse: &str| {
        let label = |number: usize| {
            serde_json::json!({ "id": format!("l{number}"), "prompt": format!("Question {number}?"),
                "chosen": better, "rejected": worse })
        };
        serde_json::to_vec(&(0..10).map(label).collect::<Vec<_>>()).unwrap()
    };
    // The scripted judge prefers one of the two more often than not.
    let [one, other] = ["It is so.", "No, it is not."];
    scene
        .prompts(12)
        .write("p.yaml", EXAM)
        .write("labels.json", labels(one, other));
    let first = scene.pipeline(&["run", "p.yaml"]);
    scene.write("labels.json", labels(other, one));
    let second = scene.pipeline(&["run", "p.yaml"]);
    let (failed, passed) = if first.code == Some(0) {
        (second, first)
    } else {
        (first, second)
    };
    assert_eq!(
        (failed.code, passed.code),
        (Some(1), Some(0)),
        "{}{}",
        failed.err,
        passed.err
    );
    for words in [
        "expectation `a_judge_that_agrees` failed for `exam`: 0.",
        " is below 0.62",
    ] {
        assert!(failed.err.contains(words), "{}", failed.err);
    }
    assert!(!failed.err.contains("rewards (round 1)"), "{}", failed.err);
    let warning = "warning: expectation `short_answers` failed for `candidates`";
    assert!(
        passed.err.contains(warning) && passed.err.contains("| text"),
        "{}",
        passed.err
    );
}
