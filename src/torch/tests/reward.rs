//! Tests of the judge against transformers' modules on the same tiny model
//! (`tests/parity/record_reward.py`), and with invalid files.

use std::io::Write as _;
use std::ops::ControlFlow;
use std::path::Path;

use tch::{Device, Tensor};
use tempfile::TempDir;

use crate::recorded::reward::{
    assert_near, encoded, folder, groups, measured, prompt, rows, spec, threefold,
};
use ovchat_models::preprocess::{JudgeIds, LlavaRlhfProcessor};
use ovchat_models::{
    AnswerGroup, ChatPrompt, ChatRole, ChatTurn, Dtype, Judge as _, LlavaRlhfSpec, RowFault, Visual,
};
use ovchat_torch::reward::RewardJudge;
use ovchat_torch::weights::{Weights, save_safetensors};

/// A copy of the recorded model that a test may modify.
fn copy() -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for part in ["base", "vision", "adapter"] {
        std::fs::create_dir(copy.path().join(part)).unwrap();
        for entry in std::fs::read_dir(folder().join(part)).unwrap() {
            let from = entry.unwrap().path();
            let to = copy.path().join(part).join(from.file_name().unwrap());
            std::fs::copy(from, to).unwrap();
        }
    }
    let name = "prompt.txt";
    std::fs::copy(folder().join(name), copy.path().join(name)).unwrap();
    copy
}

/// Converts a file of weights to safetensors, renaming the tensors with `rename`.
fn rewrite(from: &Path, to: &Path, rename: impl Fn(&str) -> String) {
    let weights = Weights::open_file(from).unwrap();
    let tensors: Vec<(String, Tensor)> = weights
        .names()
        .map(|name| (rename(name), weights.read(name, Device::Cpu).unwrap()))
        .collect();
    std::fs::remove_file(from).unwrap();
    save_safetensors(to, &tensors, &[("format", "pt")]).unwrap();
}

fn score(judge: &mut RewardJudge, groups: &[AnswerGroup<'_>]) -> Vec<Result<Vec<f32>, RowFault>> {
    measured(judge, groups).0
}

/// The rewards of all recorded rows.
fn rewards(spec: &LlavaRlhfSpec) -> Vec<f32> {
    let rows = rows();
    let prompts: Vec<ChatPrompt> = rows.iter().map(prompt).collect();
    let mut judge = RewardJudge::open(spec).unwrap();
    let scored = score(&mut judge, &groups(&rows, &prompts));
    scored.into_iter().flat_map(Result::unwrap).collect()
}

fn diagnostic(root: &Path) -> String {
    RewardJudge::open(&spec(root)).unwrap_err().to_string()
}

#[test]
fn rewards_are_those_of_the_reference() {
    let expected: Vec<f32> = rows().iter().map(|row| row.reward).collect();
    assert_near(&rewards(&spec(&folder())), &expected, 1e-5);
}

#[test]
fn an_answer_scores_the_same_alone_and_among_others() {
    let rows = rows();
    let expected = rewards(&spec(&folder()));
    let mut judge = RewardJudge::open(&spec(&folder())).unwrap();
    for (row, expected) in rows.iter().zip(expected) {
        let prompt = prompt(row);
        let answers = vec![row.answer.as_str(), row.answer.as_str()];
        let prompt = &prompt;
        let groups = [AnswerGroup::new(prompt, answers)];
        let [Ok(alone)] = &score(&mut judge, &groups)[..] else {
            panic!("a single group was given")
        };
        assert_near(alone, &[expected, expected], 1e-5);
    }
}

#[test]
fn bfloat16_stays_near_float32() {
    let expected: Vec<f32> = rows().iter().map(|row| row.reward).collect();
    let dtype = Dtype::Bfloat16;
    let found = rewards(&LlavaRlhfSpec {
        dtype,
        ..spec(&folder())
    });
    assert_near(&found, &expected, 0.1);
    assert_ne!(found, expected);
}

#[test]
fn every_published_layout_gives_the_same_bits() {
    let expected = rewards(&spec(&folder()));
    let copy = copy();
    let at = |name: &str| copy.path().join(name);
    let same = |name: &str| name.to_owned();
    rewrite(
        &at("base/pytorch_model.bin"),
        &at("base/model.safetensors"),
        same,
    );
    // transformers up to 4.x prefixes the names of CLIP's tower.
    let (old, new) = (at("vision/model.safetensors"), at("vision/other"));
    rewrite(&old, &new, |name| format!("vision_model.{name}"));
    std::fs::rename(&new, &old).unwrap();
    // A training checkpoint: the adapter two folders deeper, with the adapter's name in the tensor
    // names.
    let deep = at("adapter/adapter_model/lora_default");
    std::fs::create_dir_all(&deep).unwrap();
    let config = "adapter_config.json";
    std::fs::rename(at("adapter").join(config), deep.join(config)).unwrap();
    rewrite(
        &at("adapter/adapter_model.bin"),
        &deep.join("adapter_model.safetensors"),
        |name| name.replace(".weight", ".lora_default.weight"),
    );
    assert_eq!(rewards(&spec(copy.path())), expected);
}

#[test]
fn faulty_rows_are_named_and_the_others_go_on() {
    let rows = rows();
    let good = prompt(&rows[0]);
    let broken = ChatPrompt {
        images: vec![Visual::new(
            "broken".to_owned(),
            encoded("wide.png").bytes[..300].into(),
        )],
        ..good.clone()
    };
    let talk = ChatPrompt {
        images: Vec::new(),
        turns: vec![
            ChatTurn {
                role: ChatRole::User,
                text: "Hello.".to_owned(),
            },
            ChatTurn {
                role: ChatRole::Assistant,
                text: "Hello.".to_owned(),
            },
        ],
        ..good.clone()
    };
    let long = "in ".repeat(2000);
    let group = |prompt, answer| AnswerGroup::new(prompt, vec![answer]);
    let groups = [
        group(&broken, "A"),
        group(&good, long.as_str()),
        group(&broken, "A"),
        group(&talk, "A"),
        group(&good, rows[0].answer.as_str()),
    ];
    let mut judge = RewardJudge::open(&spec(&folder())).unwrap();
    let scored = score(&mut judge, &groups);
    let fault = |index: usize| scored[index].as_ref().unwrap_err().to_string();
    assert!(fault(0).contains("broken"), "{}", fault(0));
    assert_eq!(fault(0), fault(2));
    assert!(fault(1).contains("1024"), "{}", fault(1));
    assert!(scored[3].as_ref().unwrap()[0].is_finite());
    assert_near(scored[4].as_ref().unwrap(), &[rows[0].reward], 1e-5);
}

#[test]
fn equal_answers_are_read_once_and_score_the_same_bits() {
    let rows = rows();
    let prompt = prompt(&rows[0]);
    let [one, two] = [&*rows[0].answer, "Something else."];
    let mut judge = RewardJudge::open(&spec(&folder())).unwrap();
    let score = |judge: &mut RewardJudge, answers: Vec<&str>| {
        let prompt = &prompt;
        let (mut scored, telemetry) = measured(judge, &[AnswerGroup::new(prompt, answers)]);
        (scored.remove(0).unwrap(), telemetry.answer_tokens)
    };
    let (twice, read) = score(&mut judge, vec![one, two, one, two, one]);
    let (once, read_once) = score(&mut judge, vec![one, two]);
    assert_eq!(twice, [once[0], once[1], once[0], once[1], once[0]]);
    assert_eq!(read, read_once);
}

/// The number of tokens that all answers begin with.
fn common_prefix(answers: &[JudgeIds]) -> usize {
    let first = &answers[0].ids;
    let is_common = |at: &usize| {
        let mut answers = answers.iter();
        answers.all(|answer| answer.ids.get(*at) == Some(&first[*at]))
    };
    (0..first.len()).take_while(is_common).count()
}

#[test]
fn images_and_prompts_are_read_once_whatever_the_budget_and_the_rewards_are_the_same() {
    let rows = rows();
    let prompts: Vec<ChatPrompt> = rows.iter().map(prompt).collect();
    let groups = threefold(&groups(&rows, &prompts));
    let mut judge = RewardJudge::open(&spec(&folder())).unwrap();
    let expected: Vec<f32> = (0..3)
        .flat_map(|_| rows.iter().map(|row| row.reward))
        .collect();
    let images = groups.iter().flat_map(|group| &group.prompt.images);
    let seen: std::collections::BTreeSet<&str> =
        images.map(|encoded| encoded.id.as_str()).collect();
    let prep = LlavaRlhfProcessor::open(&spec(&folder())).unwrap();
    let mut shared = 0;
    let mut own = 0;
    for group in &groups {
        let ids = prep.ids(group).unwrap();
        let prefix = common_prefix(&ids);
        shared += prefix;
        own += ids.iter().map(|one| one.ids.len() - prefix).sum::<usize>();
    }
    for read_tokens in [usize::MAX, 400, 1] {
        judge.budget.read_tokens = read_tokens;
        let (found, telemetry) = measured(&mut judge, &groups);
        let found: Vec<f32> = found.into_iter().flat_map(Result::unwrap).collect();
        assert_near(&found, &expected, 1e-5);
        let counts = [telemetry.prompts, telemetry.images, telemetry.tower_passes];
        assert_eq!(counts, [6, seen.len() as u64, seen.len() as u64]);
        let tokens = [telemetry.prompt_tokens, telemetry.answer_tokens];
        assert_eq!(tokens, [shared as u64, own as u64], "not once per answer");
    }
}

#[test]
fn judging_stops_when_the_caller_says_so() {
    let rows = rows();
    let prompt = prompt(&rows[0]);
    let group = || AnswerGroup::new(&prompt, vec!["A"]);
    let mut judge = RewardJudge::open(&spec(&folder())).unwrap();
    let mut seen = 0;
    judge
        .score(&[group(), group(), group()], &mut |_, _| {
            seen += 1;
            ControlFlow::Break(())
        })
        .unwrap();
    assert_eq!(seen, 1);
}

#[test]
fn a_missing_head_is_named_with_its_folder() {
    let copy = copy();
    std::fs::remove_file(copy.path().join("adapter/reward_head")).unwrap();
    let text = diagnostic(copy.path());
    assert!(
        text.contains("adapter: the file `reward_head` is missing"),
        "{text}"
    );
}

#[test]
fn a_head_that_would_run_a_program_is_refused() {
    let copy = copy();
    let path = copy.path().join("adapter/reward_head");
    let exploit = b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.";
    let mut archive = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
    let stored = zip::write::SimpleFileOptions::default();
    archive.start_file("head/data.pkl", stored).unwrap();
    archive.write_all(exploit).unwrap();
    archive.finish().unwrap();
    let text = diagnostic(copy.path());
    assert!(
        text.contains("reward_head: contains `posix.system`"),
        "{text}"
    );
}

#[test]
fn a_base_of_another_size_and_an_adapter_of_another_base_are_refused() {
    let copy = copy();
    let config = copy.path().join("base/config.json");
    let original = std::fs::read_to_string(&config).unwrap();
    let change = |from: &str, to: &str| {
        assert!(original.contains(from));
        std::fs::write(&config, original.replace(from, to)).unwrap();
        diagnostic(copy.path())
    };
    let text = change("\"intermediate_size\": 24", "\"intermediate_size\": 20");
    for part in [
        "pytorch_model.bin",
        "gate_proj.weight`",
        "[24, 16]",
        "[20, 16]",
    ] {
        assert!(text.contains(part), "{text}");
    }
    let text = change("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
    assert!(
        text.contains("layers.2.input_layernorm.weight` is missing"),
        "{text}"
    );
    let text = change("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1");
    assert!(text.contains("adapts `model.layers.1."), "{text}");
}

#[test]
fn an_incomplete_adapter_is_refused() {
    let copy = copy();
    let at = |name: &str| copy.path().join(name);
    let lacking = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight";
    let weights = Weights::open(&at("adapter")).unwrap();
    let tensors = |keep: &dyn Fn(&str) -> bool| -> Vec<(String, Tensor)> {
        let kept = weights.names().filter(|name| keep(name));
        kept.map(|name| (name.to_owned(), weights.read(name, Device::Cpu).unwrap()))
            .collect()
    };
    let check = |tensors: &[(String, Tensor)], expected: &str| {
        let path = at("adapter/adapter_model.safetensors");
        save_safetensors(&path, tensors, &[]).unwrap();
        let text = diagnostic(copy.path());
        std::fs::remove_file(path).unwrap();
        assert!(text.contains(expected), "{text}");
    };
    check(
        &tensors(&|name| name != lacking),
        "`model.layers.1.mlp.up_proj` has no `lora_A`",
    );
    check(
        &tensors(&|name| !name.contains("layers.0.self_attn.v_proj")),
        "`model.layers.0.self_attn.v_proj` has no `lora_A` and `lora_B`",
    );
    let mut foreign = tensors(&|_| true);
    foreign.push(("score.weight".to_owned(), Tensor::from_slice(&[1.0_f32])));
    check(&foreign, "`score.weight` is neither");
}
