//! Tests of reward training against the recorded judge and against arithmetic by hand.

use std::path::PathBuf;

use super::super::reward::RewardJudge;
use super::*;
use ovchat_models::{
    ChatPrompt, DeviceSpec, Dtype, EncodedImage, Judge, Optimization, Optimizer, Schedule,
    TrainingAnswer,
};

fn recording() -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("tests/parity/reward")
}

fn spec(adapter: Option<PathBuf>) -> LlavaRlhfSpec {
    LlavaRlhfSpec {
        caption_orders: std::num::NonZeroU32::MIN,
        base: recording().join("base"),
        vision: recording().join("vision"),
        adapter,
        prompt: recording().join("prompt.txt"),
        device: DeviceSpec::Cpu,
        dtype: Dtype::Auto,
        memory_gb: None,
        exam: None,
    }
}

fn settings() -> RewardSettings {
    RewardSettings {
        rank: 4,
        alpha: 8.0,
        centering: 1e-3,
        seed: 5,
        optimization: Optimization {
            learning_rate: 2e-2,
            schedule: Schedule::Constant,
            warmup_steps: 0,
            optimizer: Optimizer::Adamw,
            steps: 8,
            weight_decay: 0.0,
            adam_betas: [0.9, 0.999],
            adam_epsilon: 1e-8,
            max_grad_norm: 0.3,
        },
    }
}

fn prompt() -> ChatPrompt {
    let bytes = fs::read(recording().join("images/wide.png")).unwrap();
    ChatPrompt {
        id: "p".to_owned(),
        images: vec![EncodedImage {
            id: "wide".to_owned(),
            bytes: bytes.into(),
        }],
        system: None,
        turns: Vec::new(),
        question: "What is it?".to_owned(),
        captions: None,
        answer: None,
        seed: 0,
    }
}

const ANSWERS: [&str; 2] = ["It is a cat.", "It is a dog, I think."];

fn pair(prompt: &ChatPrompt) -> Example<'_> {
    let [chosen, rejected] = ANSWERS.map(|text| TrainingAnswer {
        text: text.to_owned(),
        token_ids: None,
    });
    Example {
        id: "the pair",
        prompt,
        chosen,
        rejected,
        reference: None,
    }
}

/// A judge's rewards of both answers.
fn judged(spec: &LlavaRlhfSpec) -> Vec<f32> {
    let prompt = prompt();
    let group = AnswerGroup {
        prompt: &prompt,
        answers: ANSWERS.to_vec(),
        numbers: Vec::new(),
    };
    let mut rewards = Vec::new();
    RewardJudge::open(spec)
        .unwrap()
        .score(&[group], &mut |_, scores| {
            rewards = scores.unwrap().iter().map(|score| score.reward).collect();
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
    rewards
}

/// Rewards 1 and 0, then 0.5 and 1.5: margins 1 and -1, sums 1 and 2, so the mean of the sums is
/// 1.5.
#[test]
fn the_loss_and_its_slopes_are_those_of_the_reference_by_hand() {
    let rewards = [[1.0, 0.0], [0.5, 1.5]];
    let (loss, slopes) = loss_and_slopes(&rewards, 1e-3);
    let by_hand = f64::midpoint((-1.0f64).exp().ln_1p(), 1.0f64.exp().ln_1p()) + 1e-3 * 1.5;
    assert!((loss - by_hand).abs() < 1e-12);
    for row in 0..2 {
        for side in 0..2 {
            let step = 1e-6;
            let mut moved = rewards;
            moved[row][side] += step;
            let slope = (loss_and_slopes(&moved, 1e-3).0 - loss) / step;
            assert!((slope - slopes[row][side]).abs() < 1e-6, "{slope}");
        }
    }
    let (huge, _) = loss_and_slopes(&[[-4000.0, 4000.0]], 0.0);
    assert!((huge - 8000.0).abs() < 1e-9);
}

#[test]
fn an_adapter_that_there_is_starts_where_its_judge_is() {
    let spec = spec(Some(recording().join("adapter")));
    let prompt = prompt();
    let mut trainer = LlavaRewardTrainer::open(&spec, &settings()).unwrap();
    let report = trainer.step(&[pair(&prompt)]).unwrap();
    let rewards = judged(&spec);
    assert!((report.reward_chosen - f64::from(rewards[0])).abs() < 1e-5);
    assert!((report.reward_rejected - f64::from(rewards[1])).abs() < 1e-5);
    let margin = f64::from(rewards[0] - rewards[1]);
    let center = f64::from(rewards[0] + rewards[1]).abs();
    let loss = (-margin).exp().ln_1p() + 1e-3 * center;
    assert!((report.loss - loss).abs() < 1e-5, "{} {loss}", report.loss);
}

#[test]
fn a_fresh_adapter_learns_the_pair_and_its_judge_scores_as_it_did() {
    let prompt = prompt();
    let mut trainer = LlavaRewardTrainer::open(&spec(None), &settings()).unwrap();
    let first = trainer.step(&[pair(&prompt)]).unwrap();
    for _ in 0..6 {
        trainer.step(&[pair(&prompt)]).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("checkpoint");
    fs::create_dir(&to).unwrap();
    trainer.save(&to).unwrap();
    let last = trainer.step(&[pair(&prompt)]).unwrap();
    assert!(last.loss < first.loss - 0.05 && last.accuracy > 0.5);
    let rewards = judged(&spec(Some(to.join("adapter"))));
    assert!((last.reward_chosen - f64::from(rewards[0])).abs() < 1e-4);
    assert!((last.reward_rejected - f64::from(rewards[1])).abs() < 1e-4);
    // The names of the target modules in peft's config, and its other required settings.
    let config = fs::read_to_string(to.join("adapter/adapter_config.json")).unwrap();
    assert!(
        config.contains("\"r\": 4") && config.contains("down_proj"),
        "{config}"
    );
}

#[test]
fn only_adapter_and_head_are_trained_and_a_resumed_training_is_equal_to_the_bit() {
    let prompt = prompt();
    let folder = tempfile::tempdir().unwrap();
    let bytes = |trainer: &mut LlavaRewardTrainer, name: &str| {
        let to = folder.path().join(name);
        trainer.save_state(&to).unwrap();
        fs::read(to.join(super::super::training::STATE_FILE)).unwrap()
    };
    let open = || LlavaRewardTrainer::open(&spec(None), &settings()).unwrap();
    let mut undisturbed = open();
    let layers = 2;
    assert_eq!(undisturbed.training.parameters.len(), layers * 7 * 2 + 2);
    undisturbed.step(&[pair(&prompt)]).unwrap();
    bytes(&mut undisturbed, "after one");
    undisturbed.step(&[pair(&prompt)]).unwrap();
    let mut resumed = open();
    resumed
        .load_state(&folder.path().join("after one"))
        .unwrap();
    resumed.step(&[pair(&prompt)]).unwrap();
    assert!(bytes(&mut resumed, "resumed") == bytes(&mut undisturbed, "undisturbed"));
}
