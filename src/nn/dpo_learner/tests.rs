//! The learner against what PyTorch's autograd says of the same pair, and its promises.

use std::fs;

use super::super::recorded::{self, Expected, assert_close};
use super::*;
use crate::models::{Dtype, Mask, Newlines, Optimization, Prompt, Schedule};
use crate::nn::training::STATE_FILE;
use crate::nn::weights::save_safetensors;

const BETA: f64 = 0.1;

fn settings() -> DpoSettings {
    DpoSettings {
        beta: BETA,
        mask: Mask::default(),
        newlines: Newlines::default(),
        optimization: Optimization {
            learning_rate: 1e-3,
            schedule: Schedule::Cosine,
            warmup_ratio: 0.0,
            steps: 6,
            weight_decay: 0.01,
            adam_betas: [0.9, 0.999],
            adam_epsilon: 1e-8,
            max_grad_norm: 0.0,
        },
    }
}

fn learner(settings: &DpoSettings) -> OnevisionDpo {
    OnevisionDpo::open(&recorded::spec(Dtype::Auto), settings).unwrap()
}

fn written(text: &str) -> Answer {
    Answer {
        text: text.to_owned(),
        token_ids: None,
    }
}

/// The recorded pair, about one of the recorded prompts.
fn example(prompt: &Prompt) -> Example<'_> {
    Example {
        id: "the pair",
        prompt,
        chosen: written("a cat"),
        rejected: written("two red dogs"),
        reference: Some([-30.0, -70.0]),
    }
}

/// All that [`Learner::save_state`] writes, as bytes.
fn state(learner: &mut OnevisionDpo) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("state");
    learner.save_state(&to).unwrap();
    fs::read(to.join(STATE_FILE)).unwrap()
}

#[test]
fn loss_and_gradients_of_a_pair_equal_those_of_pytorch() {
    let (mut learner, expected) = (learner(&settings()), Expected::open());
    let prompts = recorded::prompts();
    let logps = learner.reference_logps(&[example(&prompts[0])]).unwrap();
    let recorded_logps = expected.numbers("dpo.logps");
    for (found, expected) in logps[0].iter().zip(recorded_logps) {
        assert!(
            (found - f64::from(expected)).abs() < 1e-4,
            "{found} {expected}"
        );
    }

    let report = learner.step(&[example(&prompts[0])]).unwrap();
    let loss = expected.tensor("dpo.loss").double_value(&[]);
    assert!((report.loss - loss).abs() < 1e-5, "{} {loss}", report.loss);
    assert!((report.rewards_chosen - BETA * (logps[0][0] + 30.0)).abs() < 1e-6);
    assert!((report.rewards_rejected - BETA * (logps[0][1] + 70.0)).abs() < 1e-6);
    // The prompt, 5 and 12 letters, two stop tokens.
    assert_eq!(report.tokens, 112 + 5 + 12 + 2);

    // Behind the first update, AdamW's mean is a tenth of the gradient.
    let gradient = |name: &str| {
        let mut parameters = learner.training.parameters.iter();
        let index = parameters.position(|parameter| parameter.name == name);
        &learner.training.moments()[index.expect("a parameter")].exp_avg / 0.1
    };
    let mut squares = 0.0;
    for name in expected.names() {
        if let Some(norm) = name.strip_prefix("norm.") {
            let expected = expected.tensor(name).double_value(&[]);
            let found = gradient(&crate::prep::canonical(norm))
                .norm()
                .double_value(&[]);
            assert!(
                (found - expected).abs() <= 1e-4 * expected + 1e-7,
                "{name} {found} {expected}"
            );
            squares += expected * expected;
        } else if let Some(whole) = name.strip_prefix("gradient.") {
            let expected = expected.tensor(name);
            let scale = expected.abs().max();
            let found = gradient(&crate::prep::canonical(whole));
            assert_close(name, &(found / &scale), &(&expected / &scale), 1e-4);
        }
    }
    assert!((report.grad_norm - squares.sqrt()).abs() < 1e-4 * report.grad_norm);
}

/// TRL's mask adds the newline behind each answer; LLaVA-NeXT's adds to both answers the same tokens of
/// the prompt, so that the loss stays.
#[test]
fn what_other_programs_count_is_added_to_both_answers() {
    let prompts = recorded::prompts();
    let of = |mask: Mask, newlines: Newlines| {
        let mut learner = learner(&DpoSettings {
            mask,
            newlines,
            ..settings()
        });
        let [pair] = learner.reference_logps(&[example(&prompts[0])]).unwrap()[..] else {
            panic!("one pair")
        };
        (pair, learner.step(&[example(&prompts[0])]).unwrap())
    };
    let (answer, _) = of(Mask::Answer, Newlines::One);
    let (trl, trl_report) = of(Mask::Trl, Newlines::One);
    let (next, next_report) = of(Mask::LlavaNext, Newlines::One);
    for side in 0..2 {
        assert!(trl[side] < answer[side] - 0.1, "{trl:?} {answer:?}");
        assert!(next[side] < trl[side] - 1.0, "{next:?} {trl:?}");
    }
    assert!((next[0] - next[1] - (trl[0] - trl[1])).abs() < 1e-4);
    assert!((next_report.loss - trl_report.loss).abs() < 1e-5);
    let (two, two_report) = of(Mask::Answer, Newlines::Two);
    assert!((two[0] - answer[0]).abs() > 1e-6, "{two:?} {answer:?}");
    assert_eq!(two_report.tokens, 112 + 1 + 5 + 12 + 2);
}

#[test]
fn a_resumed_training_is_equal_to_the_bit() {
    let prompts = recorded::prompts();
    let batches: [&[Example<'_>]; 3] = [
        &[example(&prompts[0]), example(&prompts[2])],
        &[example(&prompts[3])],
        &[example(&prompts[1]), example(&prompts[0])],
    ];
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("after two steps");
    let mut undisturbed = learner(&settings());
    undisturbed.step(batches[0]).unwrap();
    undisturbed.step(batches[1]).unwrap();
    undisturbed.save_state(&saved).unwrap();
    undisturbed.step(batches[2]).unwrap();

    let mut resumed = learner(&settings());
    resumed.load_state(&saved).unwrap();
    resumed.step(batches[2]).unwrap();
    assert!(state(&mut resumed) == state(&mut undisturbed));
}

#[test]
fn training_makes_the_chosen_answer_likelier_than_the_rejected() {
    let prompts = recorded::prompts();
    let mut learner = learner(&settings());
    let mut example = example(&prompts[1]);
    let start = learner.reference_logps(std::slice::from_ref(&example));
    example.reference = Some(start.unwrap()[0]);
    let reports: Vec<DpoReport> = (0..6)
        .map(|_| learner.step(std::slice::from_ref(&example)).unwrap())
        .collect();
    assert!((reports[0].loss - std::f64::consts::LN_2).abs() < 1e-6);
    assert!(reports[5].loss < 0.6 && reports[5].accuracy > 0.5);
    assert!(reports[5].learning_rate < reports[0].learning_rate);
}

#[test]
fn pairs_without_pictures_leave_the_tower_alone() {
    let prompts = recorded::prompts();
    let mut learner = learner(&settings());
    let value = |learner: &OnevisionDpo, name: &str| {
        let mut parameters = learner.training.parameters.iter();
        let found = parameters.find(|parameter| parameter.name == name);
        found.unwrap().tensor.detach().copy()
    };
    let names = ["image_newline", "language_model.model.norm.weight"];
    let before = names.map(|name| value(&learner, name));
    learner.step(&[example(&prompts[3])]).unwrap();
    let after = names.map(|name| value(&learner, name));
    assert_eq!(before[0], after[0]);
    assert_ne!(before[1], after[1]);
}

#[test]
fn a_loss_that_is_not_finite_names_the_pair_and_changes_nothing() {
    let prompts = recorded::prompts();
    let mut learner = learner(&settings());
    learner.step(&[example(&prompts[1])]).unwrap();
    let before = state(&mut learner);
    let bad = Example {
        id: "bad",
        reference: Some([f64::NAN, 0.0]),
        ..example(&prompts[1])
    };
    let error = learner.step(&[example(&prompts[0]), bad]).unwrap_err();
    let words = "the loss of pair bad is not finite; the rows of this step: the pair, bad";
    assert_eq!(error.to_string(), words);
    assert!(state(&mut learner) == before);
}

#[test]
fn pairs_that_cannot_be_trained_on_are_refused_by_name() {
    let prompts = recorded::prompts();
    let mut learner = learner(&settings());
    let mut check = |example: Example<'_>, words: &str| {
        let error = learner.step(&[example]).unwrap_err().to_string();
        assert!(
            error.starts_with("row the pair: ") && error.contains(words),
            "{error}"
        );
    };
    let sampled = |ids: Vec<i32>| Answer {
        text: String::new(),
        token_ids: Some(ids),
    };
    let good = || example(&prompts[3]);
    check(
        Example {
            rejected: sampled(vec![]),
            ..good()
        },
        "the rejected answer has no tokens",
    );
    check(
        Example {
            chosen: sampled(vec![264]),
            ..good()
        },
        "the chosen answer holds token 264",
    );
    check(
        Example {
            chosen: sampled(vec![1; 190]),
            ..good()
        },
        "the model's context is 256",
    );
    check(
        Example {
            reference: None,
            ..good()
        },
        "reference",
    );
    let mut broken = prompts[0].clone();
    broken.pictures[0].bytes = b"no picture".to_vec().into();
    check(example(&broken), "large.png");
}

#[test]
fn a_saved_checkpoint_is_the_trained_model() {
    let prompts = recorded::prompts();
    let mut trained = learner(&settings());
    trained.step(&[example(&prompts[0])]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("checkpoint");
    trained.save(&to).unwrap();
    let mut spec = recorded::spec(Dtype::Auto);
    spec.weights = to;
    let mut opened = OnevisionDpo::open(&spec, &settings()).unwrap();
    let logps = |learner: &mut OnevisionDpo| learner.reference_logps(&[example(&prompts[0])]);
    assert_eq!(logps(&mut opened).unwrap(), logps(&mut trained).unwrap());
}

#[test]
fn a_state_of_another_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(STATE_FILE);
    let tensors = [("step".to_owned(), Tensor::from_slice(&[1i64]))];
    save_safetensors(&path, &tensors, &[]).unwrap();
    let error = learner(&settings())
        .load_state(folder.path())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("state.safetensors") && error.contains("parameter_steps"),
        "{error}"
    );
}
