//! Whole pipelines with scripted models: tables, rounds, reuse, and a second run.

use ovchat_data::store::RunFolder;
use ovchat_data::tables::{
    Candidate, DpoStep, Pair, Prompt, Reference, Reject, RejectClass, Reward, Row,
};

use crate::scene::Scene;

pub const SCRIPTED: &str = "
pipeline: scripted
seed: 3
rounds: 2
models:
  policy: { scripted: {} }
  judge: { scripted: {} }
stages:
  prompts:
    load_prompts: { from: prompts.json }
  candidates:
    sample: { prompts: prompts, model: policy, part: 7 }
  rewards:
    score: { candidates: candidates, judge: judge, part: 5 }
  pairs:
    select_extremes: { rewards: rewards }
  steps:
    train_dpo: { pairs: pairs, model: policy, save_every: 2 }
evaluate:
  answers:
    sample: { prompts: prompts, model: policy, count: 1, temperature: 0 }
  grades:
    score: { candidates: answers, judge: judge }
";

/// Returns the rows of a table of a run.
pub fn rows<R: Row>(scene: &Scene, table: &str, round: Option<u32>) -> Vec<R> {
    let run = RunFolder::read(&scene.path("runs/scripted")).unwrap();
    run.reader(table, round)
        .flat_map(|batch| R::from_batch(&batch.unwrap()).unwrap())
        .collect()
}

#[test]
fn a_run_makes_every_table_of_every_round() {
    let scene = Scene::new();
    scene
        .prompts(40)
        .write("p.yaml", SCRIPTED)
        .succeeds(&["run", "p.yaml"]);
    let prompts: Vec<Prompt> = rows(&scene, "prompts", None);
    assert_eq!(prompts.len(), 40);
    assert_eq!(prompts[3].question, "Question 3?");
    for round in [1, 2] {
        let candidates: Vec<Candidate> = rows(&scene, "candidates", Some(round));
        let rewards: Vec<Reward> = rows(&scene, "rewards", Some(round));
        assert_eq!((candidates.len(), rewards.len()), (200, 200));
        for (place, candidate) in candidates.iter().enumerate() {
            assert_eq!(candidate.prompt_id, prompts[place / 5].prompt_id);
            assert_eq!(candidate.candidate as usize, place % 5);
            assert_eq!(rewards[place].prompt_id, candidate.prompt_id);
            assert_eq!(rewards[place].candidate, candidate.candidate);
        }
        let dropped = rows_of_rejects(&scene)
            .iter()
            .filter(|row| row.round == Some(round as i32))
            .count();
        let pairs: Vec<Pair> = rows(&scene, "pairs", Some(round));
        assert_eq!(pairs.len() + dropped, 40);
        for pair in &pairs {
            let of_prompt: Vec<&Reward> = rewards
                .iter()
                .filter(|row| row.prompt_id == pair.prompt_id)
                .collect();
            let highest = of_prompt
                .iter()
                .map(|row| row.reward)
                .fold(f32::MIN, f32::max);
            let lowest = of_prompt
                .iter()
                .map(|row| row.reward)
                .fold(f32::MAX, f32::min);
            assert_eq!(
                (pair.chosen_reward, pair.rejected_reward),
                (Some(highest), Some(lowest))
            );
            let chosen = candidates.iter().find(|row| {
                row.prompt_id == pair.prompt_id && Some(row.candidate) == pair.chosen_candidate
            });
            assert_eq!(chosen.map(|row| &row.text), Some(&pair.chosen));
            assert_eq!(chosen.map(|row| row.logp), pair.chosen_logp);
        }
        assert!(
            scene
                .path(&format!(
                    "runs/scripted/checkpoints/round-{round}/scripted.json"
                ))
                .is_file()
        );
    }
    for round in 0..=2 {
        assert_eq!(rows::<Reward>(&scene, "grades", Some(round)).len(), 40);
    }
}

pub fn rows_of_rejects(scene: &Scene) -> Vec<Reject> {
    let run = RunFolder::read(&scene.path("runs/scripted")).unwrap();
    let files = run
        .manifest()
        .made
        .iter()
        .flat_map(ovchat_data::store::TableVersion::rejects);
    files
        .flat_map(|file| ovchat_data::store::read_file(&run.root().join(&file.file)).unwrap())
        .collect()
}

#[test]
fn a_second_run_of_a_finished_run_does_nothing_and_says_so() {
    let scene = Scene::new();
    scene
        .prompts(5)
        .write("p.yaml", SCRIPTED)
        .succeeds(&["run", "p.yaml"]);
    let before = scene.tables("runs/scripted");
    let again = scene.succeeds(&["run", "p.yaml"]);
    assert!(again.err.contains("nothing to do"), "{}", again.err);
    assert!(
        scene.tables("runs/scripted") == before,
        "the tables are not those of before"
    );
}

#[test]
fn the_same_seed_gives_the_same_tables_and_another_seed_others() {
    let scene = Scene::new();
    scene.prompts(8).write("p.yaml", SCRIPTED);
    scene.succeeds(&["run", "p.yaml", "--run", "a"]);
    scene.succeeds(&["run", "p.yaml", "--run", "b"]);
    scene.succeeds(&["run", "p.yaml", "--run", "c", "--set", "seed=4"]);
    assert_eq!(scene.tables("a"), scene.tables("b"));
    assert_eq!(
        scene.checkpoints("a").values().collect::<Vec<_>>(),
        scene.checkpoints("b").values().collect::<Vec<_>>()
    );
    assert_ne!(
        scene.tables("a")["candidates Some(1)"],
        scene.tables("c")["candidates Some(1)"]
    );
}

#[test]
fn comments_and_order_rerun_nothing_and_a_setting_reruns_what_depends_on_it() {
    let scene = Scene::new();
    scene
        .prompts(5)
        .write("p.yaml", SCRIPTED)
        .succeeds(&["run", "p.yaml"]);
    let commented = format!(
        "# a comment\n{}",
        SCRIPTED.replace("seed: 3\nrounds: 2", "rounds:   2\nseed: 3")
    );
    scene.write("p.yaml", commented);
    assert!(
        scene
            .succeeds(&["run", "p.yaml"])
            .err
            .contains("nothing to do")
    );
    let said = scene.succeeds(&[
        "run",
        "p.yaml",
        "--set",
        "stages.pairs.select_extremes.margin_min=0.1",
    ]);
    assert!(
        said.err
            .contains("rebuilding pairs (round 1): `margin_min` 0.0 → 0.1"),
        "{}",
        said.err
    );
    assert!(
        said.err.contains("rewards (round 1): 25 rows, up to date"),
        "{}",
        said.err
    );
    let back = scene.succeeds(&["run", "p.yaml"]);
    assert!(
        back.err.contains("nothing to do"),
        "going back costs nothing: {}",
        back.err
    );
}

#[test]
fn three_new_prompts_cost_three_prompts() {
    let scene = Scene::new();
    scene
        .prompts(20)
        .write("p.yaml", SCRIPTED)
        .succeeds(&["run", "p.yaml", "--until", "rewards"]);
    let before: Vec<Candidate> = rows(&scene, "candidates", Some(1));
    // The old rows are reused, not recomputed: manual changes to them stay.
    scene
        .prompts(23)
        .succeeds(&["run", "p.yaml", "--until", "rewards"]);
    let after: Vec<Candidate> = rows(&scene, "candidates", Some(1));
    assert_eq!(after.len(), 115);
    assert_eq!(before[..], after[..100]);
    assert_eq!(rows::<Reward>(&scene, "rewards", Some(1)).len(), 115);
}

#[test]
fn a_table_that_grows_again_and_again_takes_each_row_over_once() {
    let scene = Scene::new();
    scene.prompts(9).write("p.yaml", SCRIPTED);
    for limit in 1..=4 {
        let set = format!("stages.prompts.load_prompts.limit={limit}");
        scene.succeeds(&["run", "p.yaml", "--until", "pairs", "--set", &set]);
        assert_eq!(
            rows::<Candidate>(&scene, "candidates", Some(1)).len(),
            5 * limit
        );
        assert_eq!(rows::<Reward>(&scene, "rewards", Some(1)).len(), 5 * limit);
        assert_eq!(rows::<Pair>(&scene, "pairs", Some(1)).len(), limit);
    }
}

#[test]
fn a_source_that_changes_without_changing_a_row_reruns_nothing_behind_it() {
    let scene = Scene::new();
    scene
        .prompts(6)
        .write("p.yaml", SCRIPTED)
        .succeeds(&["run", "p.yaml"]);
    let text = std::fs::read_to_string(scene.path("prompts.json")).unwrap();
    scene.write("prompts.json", format!("{text}\n"));
    let said = scene.succeeds(&["run", "p.yaml"]);
    assert!(
        said.err
            .contains("rebuilding prompts: the content of `from` changed"),
        "{}",
        said.err
    );
    assert!(said.err.contains("done: 1 built"), "{}", said.err);
}

#[test]
fn a_query_that_changes_a_question_but_not_its_id_is_answered_anew() {
    let query = "select row_key, prompt_id, id, image, image_ids, system, turns, question || '!' as question, captions, answer from prompts";
    let stage =
        format!("  asked: {{ sql: {{ query: \"{query}\", tables: [prompts] }} }}\n  candidates:\n");
    let pipeline = SCRIPTED.replace("  candidates:\n", &stage).replace(
        "sample: { prompts: prompts, model: policy, part: 7 }",
        "sample: { prompts: asked, model: policy, part: 7 }",
    );
    let scene = Scene::new();
    scene.prompts(4).write("p.yaml", &pipeline).succeeds(&[
        "run",
        "p.yaml",
        "--until",
        "candidates",
    ]);
    let before: Vec<Candidate> = rows(&scene, "candidates", Some(1));
    scene
        .write("p.yaml", pipeline.replace("'!'", "'?'"))
        .succeeds(&["run", "p.yaml", "--until", "candidates"]);
    let after: Vec<Candidate> = rows(&scene, "candidates", Some(1));
    assert!(
        before
            .iter()
            .zip(&after)
            .all(|(old, new)| old.row_key != new.row_key)
    );
}

#[test]
fn a_round_that_the_pipeline_no_longer_has_is_set_aside_and_comes_back() {
    let scene = Scene::new();
    scene
        .prompts(5)
        .write("p.yaml", SCRIPTED)
        .succeeds(&["run", "p.yaml"]);
    let whole = scene.tables("runs/scripted");
    scene.succeeds(&["run", "p.yaml", "--set", "rounds=1"]);
    assert!(
        RunFolder::read(&scene.path("runs/scripted"))
            .unwrap()
            .manifest()
            .find("rewards", Some(2))
            .is_none()
    );
    assert!(
        scene
            .succeeds(&["run", "p.yaml"])
            .err
            .contains("nothing to do"),
        "going back costs nothing"
    );
    assert!(
        scene.tables("runs/scripted") == whole,
        "the tables are not those of before"
    );
}

#[test]
fn ties_go_to_the_lowest_number_and_what_makes_no_pair_is_set_aside_with_the_reason() {
    let rule = "case c.candidate when 1 then 2.0 when 3 then 2.0 when 0 then 1.0 when 4 then 1.0 else 1.5 end";
    let query = format!(
        "select c.row_key, c.prompt_id, c.candidate, 'rule' as judge, cast(null as varchar) as reply, \
         cast(case p.question when 'Question 0?' then 1.0 \
         when 'Question 1?' then (case c.candidate when 2 then 'nan'::double else 1.0 end) \
         else {rule} end as float) as reward \
         from candidates c join prompts p on p.prompt_id = c.prompt_id"
    );
    let stage =
        format!("  rewards: {{ sql: {{ query: \"{query}\", tables: [candidates, prompts] }} }}\n");
    let scored = "  rewards:\n    score: { candidates: candidates, judge: judge, part: 5 }\n";
    assert!(SCRIPTED.contains(scored));
    let scene = Scene::new();
    scene
        .prompts(4)
        .write("p.yaml", SCRIPTED.replace(scored, &stage));
    scene.succeeds(&[
        "run",
        "p.yaml",
        "--until",
        "pairs",
        "--set",
        "reject_share_max=0.5",
    ]);
    let pairs: Vec<Pair> = rows(&scene, "pairs", Some(1));
    assert_eq!(
        pairs
            .iter()
            .map(|pair| pair.prompt.as_str())
            .collect::<Vec<_>>(),
        ["Question 2?", "Question 3?"]
    );
    for pair in pairs {
        assert_eq!(
            (pair.chosen_candidate, pair.rejected_candidate),
            (Some(1), Some(0))
        );
        assert_eq!(
            (pair.chosen_reward, pair.rejected_reward, pair.margin),
            (Some(2.0), Some(1.0), Some(1.0))
        );
    }
    let mut reasons: Vec<_> = rows_of_rejects(&scene)
        .into_iter()
        .map(|row| (row.class, row.reason))
        .collect();
    reasons.sort_by_key(|(_, reason)| reason.clone());
    assert_eq!(
        reasons,
        [
            (
                RejectClass::Fault,
                "a reward is not a finite number".to_owned()
            ),
            (
                RejectClass::Dropped,
                "the best and the worst answer score the same".to_owned()
            ),
        ]
    );
    let said = scene.succeeds(&[
        "run",
        "p.yaml",
        "--until",
        "pairs",
        "--set",
        "reject_share_max=0.5",
        "--set",
        "stages.pairs.select_extremes.margin_min=1.5",
    ]);
    assert!(said.err.contains("pairs (round 1): 0 rows"), "{}", said.err);
}

#[test]
fn until_stops_after_the_table_and_an_unknown_table_is_refused() {
    let scene = Scene::new();
    scene.prompts(3).write("p.yaml", SCRIPTED).succeeds(&[
        "run",
        "p.yaml",
        "--until",
        "candidates",
    ]);
    let run = RunFolder::read(&scene.path("runs/scripted")).unwrap();
    assert!(run.manifest().find("candidates", Some(1)).is_some());
    assert!(run.manifest().find("rewards", Some(1)).is_none());
    let said = scene.pipeline(&["run", "p.yaml", "--until", "candidate"]);
    assert_eq!(said.code, Some(2));
    assert!(
        said.err.contains("available tables: prompts, candidates"),
        "{}",
        said.err
    );
}

#[test]
fn a_query_is_a_stage_and_its_rows_feed_the_next() {
    let scene = Scene::new();
    let pipeline = SCRIPTED.replace(
        "  rewards:\n",
        "  short:\n    sql:\n      query: select * from candidates where length(text) < 40\n      tables: [candidates]\n  rewards:\n",
    );
    let pipeline = pipeline.replace(
        "score: { candidates: candidates, ",
        "score: { candidates: short, ",
    );
    let pipeline = pipeline.replace(
        "select_extremes: { rewards: rewards }",
        "select_extremes: { rewards: rewards, candidates: short }",
    );
    scene
        .prompts(10)
        .write("p.yaml", pipeline)
        .succeeds(&["run", "p.yaml", "--until", "pairs"]);
    let short: Vec<Candidate> = rows(&scene, "short", Some(1));
    assert!(!short.is_empty() && short.len() < 50);
    assert!(short.iter().all(|row| row.text.len() < 40));
    assert_eq!(
        rows::<Reward>(&scene, "rewards", Some(1)).len(),
        short.len()
    );
}

#[test]
fn feedback_of_people_is_trained_on_with_a_reference_that_is_computed_and_stored() {
    let scene = Scene::new();
    let pairs: Vec<_> = (0..6)
        .map(|number| serde_json::json!({"id": number, "prompt": format!("Why {number}?"), "chosen": "a b", "rejected": "c"}))
        .collect();
    scene.write("feedback.json", serde_json::to_vec(&pairs).unwrap());
    scene.write(
        "p.yaml",
        "pipeline: scripted\nmodels: { policy: { scripted: {} } }\nstages:\n  pairs: { load_feedback: { from: feedback.json } }\n  \
         steps: { train_dpo: { pairs: pairs, model: policy, batch_pairs: 4, epochs: 2 } }\n",
    );
    scene.succeeds(&["run", "p.yaml"]);
    let references: Vec<Reference> = rows(&scene, "steps_reference", Some(1));
    assert_eq!(references.len(), 6);
    let steps: Vec<ovchat_data::tables::DpoStep> = rows(&scene, "steps", Some(1));
    assert_eq!(
        steps
            .iter()
            .map(|step| (step.step, step.epoch))
            .collect::<Vec<_>>(),
        [(1, 1), (2, 1), (3, 2), (4, 2)]
    );
}

#[test]
fn a_scheduler_can_read_what_a_run_does() {
    let scene = Scene::new();
    scene.prompts(8).write("p.yaml", SCRIPTED);
    let events = |said: &str| -> Vec<serde_json::Value> {
        let lines = said.lines();
        lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    let said = scene.succeeds(&["run", "p.yaml", "--log", "json"]).err;
    let told = events(&said);
    let of = |name: &str| told.iter().filter(|event| event["event"] == name).count();
    assert_eq!((of("begin"), of("finished"), of("done")), (1, 15, 1));
    assert_eq!(told.last().unwrap()["made"], 15);
    let time = told[0]["time"].as_str().unwrap();
    assert!(
        time.starts_with("20") && time.ends_with('Z') && time.len() == 20,
        "{time}"
    );
    let again = events(&scene.succeeds(&["run", "p.yaml", "--log", "json"]).err);
    assert_eq!(
        again
            .iter()
            .filter(|event| event["event"] == "reused")
            .count(),
        15
    );

    // An expectation that fails: its query finds rows.
    let stops =
        format!("{SCRIPTED}expect: {{ none: {{ table: pairs, query: select * from pairs }} }}\n");
    scene.write("p.yaml", stops);
    let failed = scene.pipeline(&["run", "p.yaml", "--log", "json"]);
    let last = events(&failed.err).pop().unwrap();
    assert_eq!(
        (failed.code, &last["event"], &last["code"]),
        (Some(1), &"failed".into(), &1.into())
    );
    assert_eq!(
        (&last["table"], &last["place"]),
        (&"pairs".into(), &"p.yaml:15".into())
    );
    scene.write("p.yaml", "pipeline: p\n");
    let refused = scene.pipeline(&["run", "p.yaml", "--log", "json"]);
    let last = events(&refused.err).pop().unwrap();
    assert_eq!((refused.code, &last["event"]), (Some(2), &"refused".into()));
}

#[test]
fn a_json_log_is_json_whatever_happens() {
    let scene = Scene::new();
    scene.prompts(8).write("p.yaml", SCRIPTED);
    scene
        .write("broken.yaml", "pipeline: [\n")
        .write("bytes.yaml", b"pipeline: \xff\n")
        .write("taken", "a file where the run's folder should be");
    let report = "report: { none: { query: select round from pairs where false } }\n";
    scene.write("report.yaml", format!("{SCRIPTED}{report}"));
    for (arguments, code, event, words) in [
        (
            &["p.yaml", "--no-such-flag"][..],
            2,
            "refused",
            "--no-such-flag",
        ),
        (&[], 2, "refused", "<FILE>"),
        (&["p.yaml", "--set"], 2, "refused", "--set"),
        (&["none.yaml"], 2, "refused", "cannot read"),
        (&["bytes.yaml"], 2, "refused", "not valid UTF-8"),
        (&["broken.yaml"], 2, "refused", "complaints"),
        (&["p.yaml", "--set", "nothing"], 2, "refused", "complaints"),
        (
            &["p.yaml", "--until", "nothing"],
            2,
            "refused",
            "no table `nothing`",
        ),
        (&["p.yaml", "--run", "taken"], 1, "failed", "taken"),
        (&["report.yaml"], 0, "done", "made"),
    ] {
        for log in [&["--log", "json"][..], &["--log=json"]] {
            let said = scene.pipeline(&[&["run"], log, arguments].concat());
            assert_eq!(said.code, Some(code), "{arguments:?}: {}", said.err);
            let events: Vec<serde_json::Value> = said
                .err
                .lines()
                .map(|line| {
                    serde_json::from_str(line).unwrap_or_else(|_| panic!("{arguments:?}: {line}"))
                })
                .collect();
            let last = events.last().unwrap();
            assert_eq!(
                (&last["event"], &last["code"]),
                (&event.into(), &code.into())
            );
            assert!(last.to_string().contains(words), "{last}");
        }
    }
    // `--help` is not an error.
    let help = scene.succeeds(&["run", "--log", "json", "--help"]);
    assert!(help.out.contains("Usage: pipeline run") && help.err.is_empty());
}

#[test]
fn a_json_log_says_what_a_table_has_come_to() {
    let scene = Scene::new();
    scene.prompts(8).write("p.yaml", SCRIPTED);
    let said = scene.succeeds(&["run", "p.yaml", "--log", "json"]).err;
    let events = said.lines().map(|line| serde_json::from_str(line).unwrap());
    let events: Vec<serde_json::Value> = events.collect();
    let finished = |table: &str| {
        let mut all = events.iter().rev();
        let found = all.find(|event| event["event"] == "finished" && event["table"] == table);
        found.unwrap().clone()
    };
    let steps: Vec<DpoStep> = rows(&scene, "steps", Some(2));
    let last = steps.last().unwrap();
    let of_steps = finished("steps");
    assert_eq!(of_steps["loss"], last.loss);
    assert_eq!(of_steps["accuracy"], last.accuracy);
    let rate = |name: &str| of_steps[name].as_f64().unwrap();
    let pairs: Vec<Pair> = rows(&scene, "pairs", Some(2));
    let pairs_a_step = rate("rows_per_second") / rate("per_second");
    assert!(
        (pairs_a_step - pairs.len() as f64 / steps.len() as f64).abs() < 1e-6,
        "{of_steps}"
    );

    let rewards: Vec<Reward> = rows(&scene, "rewards", Some(2));
    let mean = rewards.iter().map(|row| f64::from(row.reward)).sum::<f64>() / rewards.len() as f64;
    let of_rewards = finished("rewards");
    assert!(
        (of_rewards["mean_reward"].as_f64().unwrap() - mean).abs() < 1e-9,
        "{of_rewards}"
    );
    assert_eq!(of_rewards["loss"], serde_json::Value::Null);
    assert!(of_rewards["rows_per_second"].as_f64().unwrap() > 0.0);
}

#[test]
fn one_flag_asks_every_command_for_json() {
    let scene = Scene::new();
    scene
        .prompts(8)
        .write("p.yaml", SCRIPTED)
        .succeeds(&["run", "p.yaml"]);
    scene.succeeds(&["run", "p.yaml", "--set", "stages.candidates.sample.count=3"]);
    for command in [
        &["check", "p.yaml"][..],
        &["plan", "p.yaml"],
        &["status", "scripted"],
        &["diff", "scripted", "scripted"],
    ] {
        let new = scene.succeeds(&[command, &["--format", "json"]].concat());
        serde_json::from_str::<serde_json::Value>(&new.out).unwrap();
        let old = scene.succeeds(&[command, &["--json"]].concat());
        assert_eq!(new.out, old.out, "{command:?}");
        let both = scene.pipeline(&[command, &["--json", "--format", "json"]].concat());
        assert_eq!(both.code, Some(2));
    }
    let unreadable = scene.pipeline(&["check", "none.yaml", "--format", "json"]);
    let said: serde_json::Value = serde_json::from_str(&unreadable.out).unwrap();
    assert_eq!((unreadable.code, &said["ok"]), (Some(2), &false.into()));

    let gc = |more: &[&str]| -> serde_json::Value {
        let arguments = [&["gc", "scripted", "--format", "json"], more].concat();
        serde_json::from_str(&scene.succeeds(&arguments).out).unwrap()
    };
    let tables = gc(&[])["set_aside"].as_array().unwrap().len();
    assert!(tables > 0);
    assert_eq!(gc(&["--yes"])["removed"], tables);
    assert_eq!(gc(&[])["set_aside"], serde_json::json!([]));

    let pairs = [
        "pairs",
        "scripted",
        "--strategy",
        "best_worst",
        "--format",
        "json",
    ];
    let pairs: serde_json::Value = serde_json::from_str(&scene.succeeds(&pairs).out).unwrap();
    assert!(
        pairs["pairs"]["pairs"].is_u64() && pairs["without_pairs"].is_array(),
        "{pairs}"
    );
}
