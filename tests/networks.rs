//! The whole loop with networks: the tiny checkpoints of `data-samples`, through the engine.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use ovchat_data::store::RunFolder;
use ovchat_data::tables::{Candidate, DpoStep, Finish, Pair, Reference, Reward, Row};

use crate::scene::{ROOT, Scene};

/// A policy and a reward model of a pipeline, by their folders.
pub fn models(policy: &str, reward: &str) -> String {
    format!(
        "models:
  policy: {{ llava_onevision: {{ weights: {policy}, device: cpu }} }}
  judge:
    llava_rlhf:
      base: {reward}/base
      vision: {reward}/vision
      adapter: {reward}/adapter
      prompt: {reward}/prompt.txt
      device: cpu"
    )
}

/// Two short rounds on the small world.
fn scene() -> Scene {
    let scene = Scene::new();
    let samples = format!("{ROOT}/data-samples");
    let models = models(&format!("{samples}/policy"), &format!("{samples}/reward"));
    scene.write(
        "p.yaml",
        format!(
            "
pipeline: networks
seed: 5
rounds: 2
{models}
stages:
  prompts:
    load_prompts: {{ from: {samples}/prompts.json, images: {samples}/images, limit: 8 }}
  candidates:
    sample: {{ prompts: prompts, model: policy, count: 3, temperature: 1.5, top_p: 1.0, max_new_tokens: 6, part: 2 }}
  rewards:
    score: {{ candidates: candidates, judge: judge, part: 2 }}
  pairs:
    select_extremes: {{ rewards: rewards }}
  steps:
    train_dpo: {{ pairs: pairs, model: policy, learning_rate: 1.0e-4, batch_pairs: 2, save_every: 1, reference_audit: {{ share: 1 }} }}
"
        ),
    );
    scene
}

fn rows<R: Row>(scene: &Scene, table: &str, round: u32) -> Vec<R> {
    let run = RunFolder::read(&scene.path("runs/networks")).unwrap();
    run.reader(table, Some(round))
        .flat_map(|batch| R::from_batch(&batch.unwrap()).unwrap())
        .collect()
}

pub fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Each image passes through a vision tower once per part, and each prompt through a decoder once,
/// regardless of the number of answers; `telemetry` shows it.
#[test]
fn telemetry_shows_what_was_shared() {
    let scene = scene();
    let said = scene.succeeds(&["run", "p.yaml", "--until", "rewards"]);
    let words = "policy: batches of up to 64 answers";
    assert_eq!(said.err.matches(words).count(), 1, "{}", said.err);
    let sql = |query: &str| {
        scene
            .succeeds(&["sql", "runs/networks", query, "--format", "csv"])
            .out
    };
    let shared = sql(
        "select stage, count(*) as parts, sum(prompts) as prompts, bool_and(tower_passes = pictures) as once,
           sum(answer_tokens) > 0 as answers, bool_and(halvings = 0) as planned
         from telemetry group by stage order by stage",
    );
    assert_eq!(
        shared,
        "stage,parts,prompts,once,answers,planned\n\
         candidates,4,8,true,true,true\nrewards,4,8,true,true,true\n"
    );
    let sampled = sql(
        "select (select sum(answer_tokens) from telemetry where stage = 'candidates')
              = (select sum(array_length(token_ids)) from candidates) as tokens,
           (select min(occupancy) from telemetry where stage = 'candidates') > 0.5 as occupied",
    );
    assert_eq!(sampled, "tokens,occupied\ntrue,true\n");
    // Two answers instead of three read the same number of prompt tokens.
    let prompt_tokens =
        || sql("select sum(prompt_tokens) as tokens from telemetry where stage = 'candidates'");
    let three = prompt_tokens();
    // `plan` predicts the token counts.
    let plan = scene.succeeds(&["plan", "p.yaml", "--json"]).out;
    let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
    let counted = &plan["tokens"][0];
    assert_eq!(format!("tokens\n{}\n", counted["sum"]), three, "{counted}");
    let context = ["--set", "stages.candidates.sample.max_new_tokens=2025"];
    let long = scene.pipeline(&[&["plan", "p.yaml"], &context[..]].concat());
    let told = "8 leave no room for 2025 new tokens";
    assert!(long.out.contains(told), "{}", long.out);
    let title = "no prompt of `candidates` fits into the context";
    assert!(
        long.code == Some(2) && long.err.contains(title),
        "{}",
        long.err
    );
    // `plan` predicts the memory, and a stage that does not fit is an error before it runs.
    let memory = plan["memory"].as_array().unwrap();
    let sampling = &memory[0];
    assert_eq!(sampling["device"], "cpu");
    let longest = counted["longest_id"].as_str().unwrap();
    assert!(sampling["worst"].as_str().unwrap().contains(longest));
    let bytes = |name: &str| sampling[name].as_u64().unwrap();
    assert!(bytes("peak") < bytes("host") && bytes("peak") < bytes("room"));
    let peak: u64 =
        sql("select max(peak_memory) as peak from telemetry where stage = 'candidates'")
            .lines()
            .nth(1)
            .and_then(|line| line.parse().ok())
            .unwrap();
    assert!(
        (bytes("host") / 3..bytes("host") * 3).contains(&peak),
        "{peak} beside {sampling}"
    );
    let small = "models.policy.llava_onevision.memory_gb=0.005";
    let refused = scene.pipeline(&["plan", "p.yaml", "--set", small]);
    assert_eq!(refused.code, Some(2), "{}", refused.err);
    let title = "not enough memory for `steps`";
    assert!(refused.err.contains(title), "{}", refused.err);
    assert!(refused.err.contains("adamw_8bit"), "{}", refused.err);
    scene.succeeds(&[
        "run",
        "p.yaml",
        "--until",
        "candidates",
        "--set",
        "stages.candidates.sample.count=2",
    ]);
    assert_eq!(prompt_tokens(), three);
}

/// `run` fails with the same errors as `plan`, before it builds anything.
#[test]
fn a_run_refuses_what_its_plan_refuses() {
    let scene = scene();
    let flat = |said: &str| {
        let words = said.split(|one: char| one.is_whitespace() || "│|".contains(one));
        words
            .filter(|word| !word.is_empty())
            .collect::<Vec<_>>()
            .join(" ")
    };
    let small = "models.policy.llava_onevision.memory_gb=0.001";
    let planned = scene.pipeline(&["plan", "p.yaml", "--set", small]);
    let refused = scene.pipeline(&["run", "p.yaml", "--set", small]);
    assert_eq!(
        (planned.code, refused.code),
        (Some(2), Some(2)),
        "{}",
        refused.err
    );
    assert_eq!(planned.err, refused.err);
    let told = flat(&refused.err);
    for words in [
        "not enough memory for `candidates`: the weights of `policy` alone take 2.9 MB, but only 1.0 MB is available",
        "raise `memory_gb` of `policy` (now 0.001)",
    ] {
        assert!(told.contains(words), "{told}");
    }
    assert!(!scene.path("runs").exists(), "nothing was run");
    let json = scene.pipeline(&["run", "p.yaml", "--log", "json", "--set", small]);
    let line: serde_json::Value = serde_json::from_str(json.err.lines().last().unwrap()).unwrap();
    assert_eq!(
        (&line["event"], &line["code"]),
        (&"refused".into(), &2.into()),
        "{line}"
    );
    // Stages that are not reached may be too large.
    scene.succeeds(&["run", "p.yaml", "--set", small, "--until", "prompts"]);
    let long = "stages.candidates.sample.max_new_tokens=2025";
    let refused = scene.pipeline(&["run", "p.yaml", "--set", long]);
    assert_eq!(refused.code, Some(2), "{}", refused.err);
    let told = flat(&refused.err);
    assert!(
        told.contains("no prompt of `candidates` fits into the context")
            && told.contains("lower `max_new_tokens`"),
        "{told}"
    );
    // Tables that are up to date need no memory.
    scene.succeeds(&["run", "p.yaml", "--until", "candidates"]);
    scene.succeeds(&["run", "p.yaml", "--until", "candidates", "--set", small]);
}

/// With a LoRA adapter, the checkpoint of each round is the adapter, and the next round samples
/// with it and continues its training.
#[test]
fn an_adapter_is_trained_round_after_round() {
    let scene = scene();
    let lora = "stages.steps.train_dpo.lora={ rank: 4, alpha: 8 }";
    scene.succeeds(&["run", "p.yaml", "--set", lora]);
    let mut before = f64::NAN;
    for round in [1, 2] {
        let checkpoint = scene.path(&format!("runs/networks/checkpoints/round-{round}"));
        assert_eq!(
            names(&checkpoint),
            ["adapter_config.json", "adapter_model.safetensors"]
        );
        let audited: Vec<Reference> = rows(&scene, "steps_reference", round);
        assert!(!audited.is_empty());
        assert!(
            audited
                .iter()
                .all(|row| row.drift.is_some_and(|drift| drift < 1e-4))
        );
        let steps: Vec<DpoStep> = rows(&scene, "steps", round);
        assert!((steps[0].loss - std::f64::consts::LN_2).abs() < 1e-4);
        assert!(steps[0].grad_norm > 0.0);
        assert_ne!(steps[0].logps_chosen.to_bits(), f64::to_bits(before));
        before = steps[0].logps_chosen;
    }
    let export = |more: &[&str]| {
        let what = ["export", "runs/networks", "checkpoint", "--to", "out"];
        scene.pipeline(&[&what, more].concat())
    };
    let nowhere = export(&["--merge", "--base", "nowhere"]);
    assert!(nowhere.err.contains("--base"), "{}", nowhere.err);
    assert_eq!(export(&["--merge"]).code, Some(0));
    let samples = Path::new(ROOT).join("data-samples/policy");
    assert_eq!(names(&scene.path("out")), names(&samples));
    let weights = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap();
    assert!(weights(&scene.path("out")) != weights(&samples));
}

/// A mistake in the prompt file of the judge, which no file check detects: the judge still gives
/// numbers, but different ones.
#[test]
fn an_exam_finds_a_judge_that_is_asked_wrongly() {
    let scene = scene();
    let samples = format!("{ROOT}/data-samples");
    let exam = |golden: &str| {
        format!(
            "models.judge.llava_rlhf.exam={{ from: {samples}/heldout_feedback.json, images: {samples}/images, \
             accuracy_min: 0.6{golden} }}"
        )
    };
    let until = ["--until", "rewards", "--set"];
    scene.succeeds(&[&["run", "p.yaml"], &until[..], &[&exam("")]].concat());
    let query = "select id, chosen_reward from judge_exam order by id limit 1";
    let found = scene
        .succeeds(&["sql", "runs/networks", query, "--format", "csv"])
        .out;
    let (id, reward) = found.lines().nth(1).unwrap().split_once(',').unwrap();
    let golden = format!(", golden: {{ id: {id}, chosen_reward: {reward} }}");
    scene.succeeds(&[&["run", "p.yaml"], &until[..], &[&exam(&golden)]].concat());

    let asked = fs::read_to_string(format!("{samples}/reward/prompt.txt")).unwrap();
    let slip = asked.replace("USER: ", "");
    assert_ne!(slip, asked);
    scene.write("prompt.txt", slip);
    let set = [
        exam(&golden),
        "models.judge.llava_rlhf.prompt=prompt.txt".to_owned(),
    ];
    let wrong = [
        "run",
        "p.yaml",
        "--run",
        "runs/wrong",
        "--set",
        &set[0],
        "--set",
        &set[1],
    ];
    let said = scene.pipeline(&wrong);
    assert_eq!(said.code, Some(1), "{}", said.err);
    assert!(said.err.contains("judge_exam"), "{}", said.err);
    let run = RunFolder::read(&scene.path("runs/wrong")).unwrap();
    assert!(
        run.manifest()
            .made
            .iter()
            .all(|made| made.table != "rewards")
    );
}

/// A policy that is converted to the layout of LLaVA-NeXT and back samples and trains as before;
/// only its tensor names and other files differ.
#[test]
fn a_policy_is_laid_out_for_another_program_and_back() {
    let scene = scene();
    let run = |name: &str, weights: &str| {
        let weights = format!("models.policy.llava_onevision.weights={weights}");
        let name = format!("runs/{name}");
        let set = ["--set", "rounds=1", "--set", &weights];
        scene.succeeds(&[&["run", "p.yaml", "--run", &name], &set[..]].concat());
    };
    let export = |name: &str, layout: Option<&str>, to: &str| {
        let name = format!("runs/{name}");
        let layout: Vec<&str> = layout.map_or(vec![], |layout| vec!["--layout", layout]);
        let what = ["export", &name, "checkpoint", "--to", to];
        scene.succeeds(&[&what, &layout[..]].concat());
    };
    let answers = |name: &str| -> Vec<(Vec<i32>, Vec<u32>)> {
        let run = RunFolder::read(&scene.path(&format!("runs/{name}"))).unwrap();
        let batches = run.reader("candidates", Some(1));
        let rows = batches.flat_map(|batch| Candidate::from_batch(&batch.unwrap()).unwrap());
        let bits = |logps: Vec<f32>| logps.into_iter().map(f32::to_bits).collect();
        rows.map(|row| (row.token_ids, bits(row.token_logps)))
            .collect()
    };
    run("first", &format!("{ROOT}/data-samples/policy"));
    export("first", None, "plain");
    export("first", Some("transformers"), "same");
    assert_eq!(
        names(&scene.path("same")),
        names(&scene.path("plain")),
        "it was laid out so before"
    );
    export("first", Some("llava-next"), "next");
    assert!(!scene.path("next/processor_config.json").exists());

    run("of-plain", "plain");
    run("of-next", "next");
    assert_eq!(answers("of-next"), answers("of-plain"));

    export("of-plain", None, "plain-2");
    export("of-next", None, "next-2");
    assert_eq!(names(&scene.path("next-2")), names(&scene.path("next")));
    export("of-next", Some("transformers"), "back");
    run("of-plain-2", "plain-2");
    run("of-back", "back");
    assert_eq!(answers("of-back"), answers("of-plain-2"));

    let again = scene.pipeline(&[
        "export",
        "runs/of-next",
        "checkpoint",
        "--to",
        "back",
        "--layout",
        "transformers",
    ]);
    assert!(again.err.contains("back already exists"), "{}", again.err);
}

#[test]
fn networks_answer_score_and_learn_and_a_killed_run_ends_with_the_same_weights() {
    let undisturbed = scene();
    undisturbed.succeeds(&["run", "p.yaml"]);
    for round in [1, 2] {
        check_answers(&undisturbed, round);
        check_training(&undisturbed, round);
        let checkpoint = undisturbed.path(&format!("runs/networks/checkpoints/round-{round}"));
        let samples = Path::new(ROOT).join("data-samples/policy");
        assert_eq!(names(&checkpoint), names(&samples));
    }
    let weights = weights_of(&undisturbed);
    let before = fs::read(format!("{ROOT}/data-samples/policy/model.safetensors")).unwrap();
    assert!(
        weights.iter().all(|file| *file != before),
        "the weights did not change"
    );

    let killed = scene();
    let moments = [
        ("candidates", 1, 1),
        ("rewards", 1, 1),
        ("steps", 1, 2),
        ("candidates", 2, 2),
        ("steps", 2, 1),
    ];
    let kill = |(table, round, parts)| usize::from(kill_at(&killed, table, round, parts));
    let kills: usize = moments.into_iter().map(kill).sum();
    println!("{kills} kills of a run with networks");
    killed.succeeds(&["run", "p.yaml"]);
    assert_eq!(
        killed.tables("runs/networks"),
        undisturbed.tables("runs/networks")
    );
    assert_eq!(weights_of(&killed), weights);
}

/// Checks the sampled answers of a round and their rewards.
fn check_answers(scene: &Scene, round: u32) {
    let candidates: Vec<Candidate> = rows(scene, "candidates", round);
    assert_eq!(candidates.len(), 24);
    for candidate in &candidates {
        assert_eq!(candidate.token_ids.len(), candidate.token_logps.len());
        assert!(candidate.token_ids.len() <= 6);
        assert!(candidate.finish == Finish::Stop || candidate.token_ids.len() == 6);
        assert!(candidate.token_logps.iter().all(|logp| *logp <= 0.0));
    }
    let rewards: Vec<Reward> = rows(scene, "rewards", round);
    assert!(rewards.len() == 24 && rewards.iter().all(|row| row.reward.is_finite()));
}

/// Checks the pairs of a round and the training on them.
fn check_training(scene: &Scene, round: u32) {
    let pairs: Vec<Pair> = rows(scene, "pairs", round);
    assert!(pairs.iter().all(|pair| pair.margin.unwrap() > 0.0));
    let steps: Vec<DpoStep> = rows(scene, "steps", round);
    assert_eq!(steps.len(), pairs.len().div_ceil(2));
    // The round starts at its reference, whose log-probabilities come from sampling: the
    // recomputed ones are equal, and the loss is log 2 within float32.
    let audited: Vec<Reference> = rows(scene, "steps_reference", round);
    assert_eq!(audited.len(), pairs.len());
    assert!(
        audited
            .iter()
            .all(|row| row.drift.is_some_and(|drift| drift < 1e-4))
    );
    assert!(
        (steps[0].loss - std::f64::consts::LN_2).abs() < 1e-5,
        "{}",
        steps[0].loss
    );
    assert!(steps[0].grad_norm > 0.0);
}

/// Runs the pipeline, and kills it once `parts` parts of a table are committed. Returns false if it
/// ended before that.
fn kill_at(scene: &Scene, table: &str, round: u32, parts: usize) -> bool {
    let mut command = scene.command(&["run", "p.yaml"]);
    let mut child = command.stderr(std::process::Stdio::null()).spawn().unwrap();
    let begun = Instant::now();
    loop {
        assert!(
            begun.elapsed() < Duration::from_mins(5),
            "`{table}` was not begun"
        );
        let run = RunFolder::read(&scene.path("runs/networks")).ok();
        let made = run
            .as_ref()
            .and_then(|run| run.manifest().find(table, Some(round)));
        if made.is_some_and(|made| made.complete || made.parts.len() >= parts) {
            break;
        }
        let status = child.try_wait().unwrap();
        assert!(status.is_none_or(|status| status.success()));
        std::thread::yield_now();
    }
    let _ = child.kill();
    child.wait().unwrap().signal() == Some(9)
}

/// A training stage that saves its state after every step.
fn saving_every_step() -> String {
    let samples = Path::new(ROOT).join("data-samples");
    let samples = samples.display();
    format!(
        "
pipeline: networks
seed: 5
models:
  policy: {{ llava_onevision: {{ weights: {samples}/policy, device: cpu }} }}
stages:
  pairs:
    load_feedback: {{ from: {samples}/heldout_feedback.json, images: {samples}/images, limit: 12 }}
  steps:
    train_dpo: {{ pairs: pairs, model: policy, learning_rate: 1.0e-4, batch_pairs: 2, save_every: 1 }}
"
    )
}

/// Returns the checkpoint files of a run.
fn weights_of(scene: &Scene) -> Vec<Vec<u8>> {
    scene.checkpoints("runs/networks").into_values().collect()
}

/// Limits files to 4 MB, less than a saved state: the error is the same as with a full disk.
#[test]
fn a_state_that_finds_no_room_stops_the_training_and_costs_nothing() {
    let pipeline = saving_every_step();
    let undisturbed = Scene::new();
    undisturbed
        .write("p.yaml", &pipeline)
        .succeeds(&["run", "p.yaml"]);
    let scene = Scene::new();
    scene.write("p.yaml", &pipeline);
    let narrow = Command::new("bash")
        .args(["-c", "trap '' XFSZ; ulimit -f 4000; exec \"$0\" run p.yaml"])
        .arg(env!("CARGO_BIN_EXE_pipeline"))
        .current_dir(scene.path(""))
        .output()
        .unwrap();
    let failed = crate::scene::said(narrow);
    assert_eq!(failed.code, Some(1), "{}", failed.err);
    assert!(
        failed.err.contains("state") && failed.err.contains("os error 27"),
        "{}",
        failed.err
    );
    scene.succeeds(&["run", "p.yaml"]);
    assert!(weights_of(&scene) == weights_of(&undisturbed));
    assert_eq!(
        scene.tables("runs/networks"),
        undisturbed.tables("runs/networks")
    );
}

/// The newest state is corrupt with its size unchanged, or truncated: training resumes from the
/// previous one, with the same result.
#[test]
fn a_corrupt_state_costs_the_steps_since_the_one_before() {
    let pipeline = saving_every_step().replace("save_every: 1", "save_every: 1, keep_last: 3");
    let undisturbed = Scene::new();
    undisturbed
        .write("p.yaml", &pipeline)
        .succeeds(&["run", "p.yaml"]);
    for cut in [false, true] {
        let scene = Scene::new();
        scene.write("p.yaml", &pipeline);
        let mut command = scene.command(&["run", "p.yaml"]);
        let mut child = command.stderr(std::process::Stdio::null()).spawn().unwrap();
        let states = || {
            let run = RunFolder::read(&scene.path("runs/networks")).ok()?;
            let made = run.manifest().find("steps", Some(1))?;
            (made.states.len() == 3).then(|| made.states.clone())
        };
        while states().is_none() && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        let _ = child.kill();
        assert!(!child.wait().unwrap().success(), "it was killed on its way");
        let kept = states().expect("three states");
        let newest = &kept[2];
        let file = scene.path(&format!(
            "runs/networks/{}/state.safetensors",
            newest.folder
        ));
        let mut bytes = fs::read(&file).unwrap();
        if cut {
            bytes.truncate(1000);
        } else {
            bytes[..8].fill(255);
        }
        fs::write(&file, bytes).unwrap();
        let again = scene.succeeds(&["run", "p.yaml"]);
        let words = if cut {
            "missing or corrupt"
        } else {
            "resuming from the previous state"
        };
        assert!(again.err.contains(words), "{}", again.err);
        assert!(weights_of(&scene) == weights_of(&undisturbed));
        assert_eq!(
            scene.tables("runs/networks"),
            undisturbed.tables("runs/networks")
        );
    }
}

/// States are saved after every step, so that kills hit steps, saved states and checkpoints.
#[test]
fn a_training_killed_at_twenty_moments_ends_with_the_same_weights() {
    const KILLS: u32 = 20;
    let pipeline = saving_every_step();
    let begun = Instant::now();
    let undisturbed = Scene::new();
    undisturbed
        .write("p.yaml", &pipeline)
        .succeeds(&["run", "p.yaml"]);
    let mut whole = begun.elapsed();
    let expected = weights_of(&undisturbed);

    let mut scene = Scene::new();
    scene.write("p.yaml", &pipeline);
    let mut kills = 0;
    for attempt in 0.. {
        let mut command = scene.command(&["run", "p.yaml"]);
        let mut child = command.stderr(std::process::Stdio::null()).spawn().unwrap();
        // A golden-ratio sequence covers the run evenly.
        std::thread::sleep(whole.mul_f64((f64::from(attempt) * 0.618_034).fract()));
        let _ = child.kill();
        if child.wait().unwrap().success() {
            assert!(weights_of(&scene) == expected);
            // The machine is faster now.
            whole = whole.mul_f64(0.8);
            scene = Scene::new();
            scene.write("p.yaml", &pipeline);
        } else {
            kills += 1;
        }
        if kills == KILLS {
            break;
        }
    }
    scene.succeeds(&["run", "p.yaml"]);
    assert!(weights_of(&scene) == expected);
    assert_eq!(
        scene.tables("runs/networks"),
        undisturbed.tables("runs/networks")
    );
    println!("{kills} kills of a training with networks");
}

#[test]
fn doctor_says_which_libtorch_it_found() {
    let said = Scene::new().succeeds(&["doctor"]);
    assert!(said.out.contains("libtorch 2.11"), "{}", said.out);
}
