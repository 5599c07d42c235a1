//! Tests of reward training against the recorded judge and against arithmetic by hand.

use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;

use crate::recorded::reward;
use ovchat_models::{
    AnswerGroup, ChatPrompt, Example, Judge as _, LlavaRlhfSpec, Optimization, Optimizer,
    RewardSettings, RewardTrainer as _, Schedule, Trainer as _, TrainingAnswer,
};
use ovchat_torch::reward::RewardJudge;
use ovchat_torch::reward_trainer::LlavaRewardTrainer;
use ovchat_torch::training::STATE_FILE;

fn spec(adapter: Option<PathBuf>) -> LlavaRlhfSpec {
    LlavaRlhfSpec {
        adapter,
        ..reward::spec(&reward::folder())
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
    let row = &reward::rows()[0];
    ChatPrompt {
        question: "What is it?".to_owned(),
        captions: None,
        ..reward::prompt(row)
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
    let group = AnswerGroup::new(&prompt, ANSWERS.to_vec());
    let mut rewards = Vec::new();
    RewardJudge::open(spec)
        .unwrap()
        .score(&[group], &mut |_, scores| {
            rewards = scores.unwrap().iter().map(|score| score.reward).collect();
            ControlFlow::Continue(())
        })
        .unwrap();
    rewards
}

#[test]
fn an_adapter_that_there_is_starts_where_its_judge_is() {
    let spec = spec(Some(reward::folder().join("adapter")));
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
        fs::read(to.join(STATE_FILE)).unwrap()
    };
    let open = || LlavaRewardTrainer::open(&spec(None), &settings()).unwrap();
    let mut undisturbed = open();
    let layers = 2;
    let parameters = &undisturbed.training().parameters;
    assert_eq!(parameters.len(), layers * 7 * 2 + 2);
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
