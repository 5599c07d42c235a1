//! Bad input: one clear error with file, line or row and a fix; finished tables stay.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use ovchat_data::tables::{Prompt, Reject};
use serde_json::{Value, json};

use crate::run::{SCRIPTED, rows};
use crate::scene::{Quiet, ROOT, Scene};

/// Returns the id and the reason of each rejected row.
pub fn rejects(scene: &Scene) -> Vec<(String, String)> {
    let said = scene.succeeds(&[
        "sql",
        "scripted",
        "select id, reason from rejects order by id",
        "--format",
        "json",
    ]);
    let list: Vec<serde_json::Value> = serde_json::from_str(&said.out).unwrap();
    let text = |row: &serde_json::Value, name: &str| row[name].as_str().unwrap().to_owned();
    list.iter()
        .map(|row| (text(row, "id"), text(row, "reason")))
        .collect()
}

/// Returns a scene with one good image, and prompts about it and about the images `names`.
pub fn with_images(names: &[&str]) -> Scene {
    let scene = Scene::new();
    let bytes = fs::read(format!("{ROOT}/data-samples/images/train/0001.png")).unwrap();
    scene.write("images/good.png", &bytes);
    scene.write("images/cut.png", &bytes[..bytes.len() / 2]);
    scene.write("images/words.png", "these are words");
    let list: Vec<_> = names
        .iter()
        .map(|name| serde_json::json!({"image": name, "prompt": "What is it?"}))
        .collect();
    scene.write("prompts.json", serde_json::to_vec(&list).unwrap());
    let pipeline = SCRIPTED.replace("from: prompts.json", "from: prompts.json, images: images");
    scene.write("p.yaml", pipeline);
    scene
}

#[test]
fn a_bad_image_costs_its_row_and_the_reason_names_the_file() {
    let scene = with_images(&["good.png", "gone.png", "cut.png", "words.png"]);
    scene.succeeds(&["run", "p.yaml", "--set", "reject_share_max=0.9"]);
    assert_eq!(rows::<Prompt>(&scene, "prompts", None).len(), 1);
    let rejects = rejects(&scene);
    assert_eq!(
        rejects
            .iter()
            .map(|(id, _)| id.as_str())
            .collect::<Vec<_>>(),
        ["record 2", "record 3", "record 4"]
    );
    assert!(
        rejects[0].1.contains("image not found") && rejects[0].1.contains("gone.png"),
        "{rejects:?}"
    );
    assert!(rejects[1].1.contains("cut.png"), "{rejects:?}");
    assert!(rejects[2].1.contains("words.png"), "{rejects:?}");
}

#[test]
fn a_image_larger_than_the_bound_is_set_aside_before_it_is_decoded() {
    let scene = with_images(&["large.ppm"]);
    // A header that claims 20,000 x 20,000 pixels, without data.
    scene.write("images/large.ppm", "P6 20000 20000 255\n");
    scene.pipeline(&[
        "run",
        "p.yaml",
        "--set",
        "reject_share_max=1.0",
        "--until",
        "prompts",
    ]);
    let rejects = rejects(&scene);
    assert!(rejects[0].1.contains("20000"), "{rejects:?}");
}

#[test]
fn too_many_bad_rows_stop_the_stage_and_mending_them_goes_on() {
    let scene = with_images(&["good.png", "gone.png"]);
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert_eq!(said.code, Some(1));
    assert!(said.err.contains("1 of 2 rows are faulty"), "{}", said.err);
    assert!(said.err.contains("record 2"), "{}", said.err);
    fs::copy(scene.path("images/good.png"), scene.path("images/gone.png")).unwrap();
    scene.succeeds(&["run", "p.yaml"]);
    assert_eq!(rows::<Prompt>(&scene, "prompts", None).len(), 2);
    assert!(
        rejects(&scene)
            .iter()
            .all(|(_, reason)| !reason.contains("gone.png"))
    );
}

/// LLaVA-NeXT's `train_dpo.py` reads one image and one question per pair.
#[test]
fn pairs_that_the_training_script_would_misread_are_not_exported() {
    let scene = with_images(&["good.png"]);
    let pipeline = "pipeline: scripted\nstages:\n  pairs:\n    load_feedback: { from: pairs.json, images: images }\n";
    scene.write("p.yaml", pipeline);
    let pair = |more: Value| {
        let mut pair = json!({"id": "a", "image": "good.png", "prompt": "What is it?",
            "chosen": "A cat.", "rejected": "A dog."});
        pair.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        pair
    };
    let export = |records: &[Value]| {
        scene.write("pairs.json", json!(records).to_string());
        scene.succeeds(&["run", "p.yaml"]);
        scene.pipeline(&["export", "scripted", "pairs", "--to", "out/pairs.json"])
    };
    for (more, words) in [
        (json!({"image": ["good.png", "good.png"]}), "has 2 images"),
        (json!({"image": null}), "has no image"),
        (json!({"system": "Be brief."}), "has a system prompt"),
        (
            json!({"chosen": "The tag <image>."}),
            "has the text `<image>`",
        ),
        (
            json!({"turns": [{"role": "user", "text": "Hello."}, {"role": "assistant", "text": "Hi."}]}),
            "has 2 earlier turns",
        ),
    ] {
        let said = export(&[pair(json!({})), pair(more)]);
        assert_eq!(said.code, Some(1), "{}", said.err);
        let told = said.err.replace("\n  │ ", " ").replace("\n  | ", " ");
        assert!(
            told.contains("cannot export 1 of 2 pairs of `pairs`"),
            "{told}"
        );
        assert!(told.contains(words), "{told}");
        assert!(!scene.path("out").exists(), "nothing was written");
    }
    let said = export(&[pair(json!({}))]);
    assert_eq!(said.code, Some(0), "{}", said.err);
    let written = fs::read(scene.path("out/pairs.json")).unwrap();
    let written: Value = serde_json::from_slice(&written).unwrap();
    let image = written[0]["image"].as_str().expect("the name of one file");
    assert!(scene.path("out/images").join(image).is_file());
}

#[test]
fn a_prompt_longer_than_the_context_is_set_aside_before_the_model_opens() {
    let scene = Scene::new();
    let policy = scene.path("policy");
    ovchat_data::store::copy_folder(format!("{ROOT}/data-samples/policy").as_ref(), &policy)
        .unwrap();
    let config = fs::read_to_string(policy.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["text_config"]["max_position_embeddings"] = 40.into();
    fs::write(policy.join("config.json"), config.to_string()).unwrap();
    // A model without weights cannot be loaded; this run succeeds without loading it.
    let pipeline = SCRIPTED
        .replace(
            "policy: { scripted: {} }",
            "policy: { llava_onevision: { weights: policy } }",
        )
        .replace("model: policy,", "model: policy, max_new_tokens: 16,")
        .replace(
            "pairs, model: policy, max_new_tokens: 16,",
            "pairs, model: policy,",
        );
    let plan = scene.prompts(1).write("p.yaml", pipeline).path("p.yaml");
    let plan =
        ovchat_pipeline::config::load(&plan, &["reject_share_max=1.0".to_owned()], false).unwrap();
    let options = ovchat_pipeline::run::Options {
        folder: scene.path("runs/scripted"),
        until: Some("answers".to_owned().try_into().unwrap()),
        rates: None,
        workers: None,
        take_over: false,
        forecasts: Vec::new(),
        command: "pipeline run p.yaml".to_owned(),
        sets: Vec::new(),
    };
    let interrupt = ovchat_pipeline::run::Interrupt::default();
    ovchat_pipeline::run::run(&plan, &options, None, &mut Quiet, &interrupt).unwrap();
    let rejects: Vec<Reject> = rejects_of(&scene);
    assert!(
        rejects[0].reason.contains("context of 40"),
        "{}",
        rejects[0].reason
    );
}

fn rejects_of(scene: &Scene) -> Vec<Reject> {
    let run = ovchat_data::store::RunFolder::read(&scene.path("runs/scripted")).unwrap();
    let files: Vec<_> = run
        .manifest()
        .made
        .iter()
        .flat_map(ovchat_data::store::TableVersion::rejects)
        .cloned()
        .collect();
    files
        .iter()
        .flat_map(|file| ovchat_data::store::read_file(&run.root().join(&file.file)).unwrap())
        .collect()
}

#[test]
fn a_full_disk_loses_nothing_and_the_next_run_goes_on() {
    let scene = Scene::new();
    scene.prompts(10).write("p.yaml", SCRIPTED).succeeds(&[
        "run",
        "p.yaml",
        "--until",
        "candidates",
    ]);
    let before = rows::<ovchat_data::tables::Candidate>(&scene, "candidates", Some(1));
    let full = scene.path("runs/scripted/rewards/round-1/part-00000.parquet.new");
    fs::create_dir_all(full.parent().unwrap()).unwrap();
    symlink("/dev/full", &full).unwrap();
    let said = scene.pipeline(&["run", "p.yaml"]);
    assert_eq!(said.code, Some(1));
    assert!(said.err.contains("the disk is full"), "{}", said.err);
    fs::remove_file(&full).unwrap();
    scene.succeeds(&["run", "p.yaml"]);
    assert_eq!(
        rows::<ovchat_data::tables::Candidate>(&scene, "candidates", Some(1)),
        before
    );
}

#[test]
fn a_folder_that_is_no_folder_of_this_run_is_refused() {
    let scene = Scene::new();
    scene
        .prompts(2)
        .write("p.yaml", SCRIPTED)
        .succeeds(&["run", "p.yaml"]);
    scene.write(
        "other.yaml",
        SCRIPTED.replace("pipeline: scripted", "pipeline: other"),
    );
    let said = scene.pipeline(&["run", "other.yaml", "--run", "runs/scripted"]);
    assert!(
        said.err
            .contains("contains a run of pipeline `scripted`, expected `other`"),
        "{}",
        said.err
    );
    let said = scene
        .write("work/notes.txt", "mine")
        .pipeline(&["run", "p.yaml", "--run", "work"]);
    assert!(said.err.contains("is not a run folder"), "{}", said.err);
    assert_eq!(
        fs::read_to_string(scene.path("work/notes.txt")).unwrap(),
        "mine"
    );
    let said = scene.pipeline(&["run", "p.yaml", "--run", "/dev/null/run"]);
    assert_eq!(said.code, Some(1));
    assert!(
        said.err.contains("cannot create /dev/null/run"),
        "{}",
        said.err
    );
}

/// Returns a finished run and the file of a table in its first round.
fn finished(table: &str) -> (Scene, PathBuf) {
    let scene = Scene::new();
    scene
        .prompts(10)
        .write("p.yaml", SCRIPTED)
        .succeeds(&["run", "p.yaml"]);
    let run = ovchat_data::store::RunFolder::read(&scene.path("runs/scripted")).unwrap();
    let file = run.files(table, Some(1)).remove(0);
    (scene, file)
}

#[test]
fn a_lost_file_is_noticed_and_made_again() {
    let (scene, file) = finished("rewards");
    let before = scene.tables("runs/scripted");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 10]).unwrap();
    let said = scene.succeeds(&["run", "p.yaml"]);
    assert!(
        said.err
            .contains("files of `rewards` are missing or corrupt"),
        "{}",
        said.err
    );
    assert_eq!(scene.tables("runs/scripted"), before);
}

/// Flips one bit of a file and keeps its size.
fn flip(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(file, &bytes).unwrap();
}

/// Every reader of a file with a flipped bit detects it, and the run rebuilds the table.
#[test]
fn a_flipped_bit_is_noticed_before_anything_is_made_from_it_and_mended() {
    let (scene, file) = finished("candidates");
    let before = scene.tables("runs/scripted");
    flip(&file);
    let margin = "stages.pairs.select_extremes.margin_min=0.01";
    let said = scene.succeeds(&["run", "p.yaml", "--set", margin]);
    assert!(
        said.err.contains("all.parquet: checksum mismatch"),
        "{}",
        said.err
    );
    let aside = "runs/scripted/spoiled/candidates/round-1/all.parquet.spoiled";
    assert!(
        scene.path(aside).is_file() && file.is_file(),
        "{}",
        said.err
    );
    scene.succeeds(&["run", "p.yaml"]);
    assert_eq!(scene.tables("runs/scripted"), before);
}

/// A fork does not rebuild the tables that it shares: the result would differ.
#[test]
fn a_flipped_bit_in_what_a_fork_took_over_is_an_error() {
    let (scene, _) = finished("candidates");
    let set = "stages.candidates.sample.count=4";
    let fork = [
        "fork",
        "scripted",
        "--at",
        "2",
        "--to",
        "runs/fork",
        "--set",
        set,
    ];
    scene.succeeds(&fork);
    let weights = "runs/fork/checkpoints/round-1/scripted.json";
    flip(&scene.path(weights));
    let said = scene.pipeline(&["run", "p.yaml", "--run", "runs/fork", "--set", set]);
    assert_eq!(said.code, Some(1), "{}", said.err);
    let told = said.err.replace("\n  │ ", " ").replace("\n  | ", " ");
    assert!(told.contains("to a round before the fork"), "{told}");
    assert!(scene.path(weights).is_file());
}

/// Rows of an archived table are reused only if they are intact.
#[test]
fn a_flipped_bit_in_what_was_set_aside_is_not_taken_over() {
    let (scene, _) = finished("candidates");
    let before = scene.tables("runs/scripted");
    let count = ["run", "p.yaml", "--set", "stages.candidates.sample.count=4"];
    scene.succeeds(&count);
    let mut folders = vec![scene.path("runs/scripted/.cache")];
    let mut flipped = 0;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.to_string_lossy().contains("/rewards/round-1/") {
                flip(&path);
                flipped += 1;
            }
        }
    }
    assert!(flipped > 0);
    // Another number of answers: some rewards could be reused.
    let said = scene.succeeds(&["run", "p.yaml", "--set", "stages.candidates.sample.count=3"]);
    assert!(said.err.contains("checksum mismatch"), "{}", said.err);
    scene.succeeds(&["run", "p.yaml"]);
    assert_eq!(scene.tables("runs/scripted"), before);
}

/// Only a file that is proved corrupt moves aside.
#[test]
fn what_is_as_it_was_written_or_cannot_be_read_stays() {
    let (scene, file) = finished("candidates");
    let (mut run, lost) =
        ovchat_data::store::RunFolder::open(&scene.path("runs/scripted"), "scripted").unwrap();
    assert!(lost.lost.is_empty());
    assert_eq!(run.put_aside(&file).unwrap(), None);
    assert_eq!(run.put_aside(&scene.path("p.yaml")).unwrap(), None);
    // A folder in place of the file cannot be read.
    let kept = scene.path("kept");
    fs::rename(&file, &kept).unwrap();
    fs::create_dir(&file).unwrap();
    let failed = run.put_aside(&file).unwrap_err().to_string();
    assert!(failed.starts_with("cannot read"), "{failed}");
    assert!(file.is_dir() && !scene.path("runs/scripted/spoiled").exists());
}

/// Round 2 samples from the checkpoint of round 1.
#[test]
fn a_flipped_bit_of_a_checkpoint_is_mended() {
    let (scene, _) = finished("steps");
    let tables = scene.tables("runs/scripted");
    let checkpoints = scene.checkpoints("runs/scripted");
    let corrupt = "runs/scripted/checkpoints/round-1/scripted.json";
    flip(&scene.path(corrupt));
    fs::remove_file(scene.path("runs/scripted/candidates/round-2/all.parquet")).unwrap();
    let said = scene.succeeds(&["run", "p.yaml"]);
    let told = format!("{corrupt}: checksum mismatch");
    assert!(said.err.contains(&told), "{}", said.err);
    assert_eq!(scene.checkpoints("runs/scripted"), checkpoints);
    assert_eq!(scene.tables("runs/scripted"), tables);
}

/// The run stores images by content; the loading stages restore them.
#[test]
fn a_flipped_bit_of_a_image_is_mended() {
    let scene = with_images(&["good.png"]);
    scene.succeeds(&["run", "p.yaml"]);
    let before = scene.tables("runs/scripted");
    let file = scene.path("runs/scripted/images/part-00000.parquet");
    let mut bytes = fs::read(&file).unwrap();
    let encoded = bytes.windows(4).position(|word| word == b"IDAT").unwrap();
    bytes[encoded + 20] ^= 1;
    fs::write(&file, bytes).unwrap();
    fs::remove_file(scene.path("runs/scripted/candidates/round-1/part-00000.parquet")).unwrap();
    let said = scene.succeeds(&["run", "p.yaml"]);
    let told = "images/part-00000.parquet: checksum mismatch";
    assert!(said.err.contains(told), "{}", said.err);
    assert_eq!(scene.tables("runs/scripted"), before);
}

#[test]
fn a_corrupt_checkpoint_is_noticed_and_made_again() {
    let scene = Scene::new();
    scene
        .prompts(6)
        .write("p.yaml", SCRIPTED)
        .succeeds(&["run", "p.yaml"]);
    let before = scene.checkpoints("runs/scripted");
    scene.write("runs/scripted/checkpoints/round-1/scripted.json", "{");
    let said = scene.succeeds(&["run", "p.yaml"]);
    assert!(
        said.err.contains("files of `steps` are missing or corrupt"),
        "{}",
        said.err
    );
    assert_eq!(scene.checkpoints("runs/scripted"), before);
}

#[test]
fn files_of_the_user_in_a_run_stay() {
    let scene = Scene::new();
    scene
        .prompts(2)
        .write("p.yaml", SCRIPTED)
        .succeeds(&["run", "p.yaml"]);
    scene
        .write("runs/scripted/mine.parquet", "x")
        .write("runs/scripted/analysis/part-1.parquet", "x");
    scene.write(
        "runs/scripted/prompts/part-99999.parquet",
        "left by a killed run",
    );
    scene.succeeds(&["run", "p.yaml"]);
    assert!(scene.path("runs/scripted/mine.parquet").exists());
    assert!(scene.path("runs/scripted/analysis/part-1.parquet").exists());
    assert!(
        !scene
            .path("runs/scripted/prompts/part-99999.parquet")
            .exists()
    );
}

/// Opening a FIFO blocks until something is written to it, and `/dev/zero` never ends.
#[test]
fn files_that_are_not_regular_are_refused_without_hanging() {
    let policy = format!("{ROOT}/data-samples/policy");
    let fifo = |scene: &Scene, name: &str| {
        let path = scene.path(name);
        drop(fs::remove_file(&path));
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
    };
    let refused = |name: &str, change: &dyn Fn(&str) -> String, code: &str| {
        let scene = Scene::new();
        scene.prompts(3).write("p.yaml", change(SCRIPTED));
        ovchat_data::store::copy_folder(policy.as_ref(), &scene.path("policy")).unwrap();
        fifo(&scene, name);
        let said = within_seconds(&scene, &["check", "p.yaml"]);
        assert_eq!(said.code, Some(2), "{name}: {}", said.err);
        let told = said.err.replace("\n  | ", " ").replace("\n  │ ", " ");
        assert!(told.contains("is a FIFO, not a regular file"), "{told}");
        assert!(told.contains(code), "{told}");
    };
    let as_it_is = |text: &str| text.to_owned();
    refused("p.yaml", &as_it_is, "p.yaml");
    refused("prompts.json", &as_it_is, "config::wrong_file");
    let extends = |text: &str| format!("extends: base.yaml\n{text}");
    refused("base.yaml", &extends, "cannot read `base.yaml`");
    let own = |more: &str| format!("judge: {{ self: {{ model: policy, ask: {{ {more} }} }} }}");
    let template = |text: &str| {
        text.replace("judge: { scripted: {} }", &own("template: ask.txt"))
            .replace("count: 1, temperature: 0", "count: 2")
    };
    refused("ask.txt", &template, "config::wrong_file");
    let query = |text: &str| {
        let stage = "  few: { sql: { file: few.sql, tables: [candidates] } }\nevaluate:";
        text.replace("evaluate:", stage)
    };
    refused("few.sql", &query, "config::wrong_file");
    let weights = |text: &str| {
        let policy = "policy: { llava_onevision: { weights: policy } }";
        text.replace("policy: { scripted: {} }", policy)
    };
    for file in ["config.json", "tokenizer.json", "preprocessor_config.json"] {
        refused(&format!("policy/{file}"), &weights, "config::model_files");
    }

    // An unreadable image rejects its row only; a device is treated the same.
    let scene = with_images(&["good.png", "fifo.png", "zero.png"]);
    fifo(&scene, "images/fifo.png");
    symlink("/dev/zero", scene.path("images/zero.png")).unwrap();
    let anywhere = "stages.prompts.load_prompts.images_anywhere=true";
    let run = [
        "run",
        "p.yaml",
        "--set",
        "reject_share_max=0.9",
        "--set",
        anywhere,
    ];
    let said = within_seconds(&scene, &run);
    assert_eq!(said.code, Some(0), "{}", said.err);
    let reasons = rejects(&scene);
    assert!(
        reasons[0]
            .1
            .ends_with("fifo.png: it is a FIFO, not a regular file")
            && reasons[1]
                .1
                .ends_with("zero.png: it is a device, not a regular file"),
        "{reasons:?}"
    );
}

/// Runs the program, which must end soon, and returns its output.
#[track_caller]
pub fn within_seconds(scene: &Scene, arguments: &[&str]) -> crate::scene::CommandOutput {
    let mut command = scene.command(arguments);
    command.stdout(std::process::Stdio::piped());
    command.stderr(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    for _ in 0..3000 {
        if child.try_wait().unwrap().is_some() {
            return crate::scene::said(child.wait_with_output().unwrap());
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    child.kill().unwrap();
    panic!("{arguments:?} hangs");
}

/// All files of a reward model are checked before anything runs.
#[test]
fn a_reward_model_without_one_of_its_files_is_refused() {
    let scene = Scene::new();
    let reward = scene.path("reward");
    let samples = format!("{ROOT}/data-samples/reward");
    let judge = "judge: { llava_rlhf: { base: reward/base, vision: reward/vision, adapter: reward/adapter, prompt: reward/prompt.txt } }";
    scene
        .prompts(3)
        .write("p.yaml", SCRIPTED.replace("judge: { scripted: {} }", judge));
    ovchat_data::store::copy_folder(samples.as_ref(), &reward).unwrap();
    scene.succeeds(&["check", "p.yaml"]);
    for (file, problem) in [
        ("adapter/reward_head", "the file `reward_head` is missing"),
        ("adapter/adapter_model.safetensors", "no weights"),
        ("adapter/adapter_config.json", "cannot be read"),
        ("base/model.safetensors", "no weights"),
        ("base/tokenizer.json", "file not found"),
        ("vision/model.safetensors", "no weights"),
        (
            "vision/preprocessor_config.json",
            "preprocessor_config.json",
        ),
        ("prompt.txt", "does not exist"),
    ] {
        let aside = scene.path("aside");
        fs::rename(reward.join(file), &aside).unwrap();
        let said = scene.pipeline(&["check", "p.yaml"]);
        assert_eq!(said.code, Some(2), "{file}: {}", said.err);
        let told = said.err.replace("\n  | ", " ").replace("\n  │ ", " ");
        assert!(told.contains(problem), "{file}: {told}");
        fs::rename(&aside, reward.join(file)).unwrap();
    }
}
