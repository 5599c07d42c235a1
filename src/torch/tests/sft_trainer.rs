//! Tests of the next-token loss against the log-probabilities of the DPO trainer's tests.

use std::fs;

use tch::Tensor;

use crate::common::first_gradients;
use crate::recorded::onevision;
use ovchat_models::{
    ChatPrompt, ChatRole, ChatTurn, Checkpointing, DpoSettings, DpoTrainer as _, Dtype, Example,
    Loss, Mask, Newlines, Objective, Optimization, Optimizer, Schedule, SftExample, SftSettings,
    SftTrainer as _, Tower, TrainOn, Trained, Trainer as _, TrainingAnswer,
};
use ovchat_torch::checkpoint::TOWER;
use ovchat_torch::dpo_trainer::PolicyDpo;
use ovchat_torch::sft_trainer::{PolicySft, Sft};
use ovchat_torch::training::STATE_FILE;

fn optimization() -> Optimization {
    Optimization {
        learning_rate: 1e-3,
        schedule: Schedule::Cosine,
        warmup_steps: 0,
        optimizer: Optimizer::Adamw,
        steps: 8,
        weight_decay: 0.0,
        adam_betas: [0.9, 0.999],
        adam_epsilon: 1e-8,
        max_grad_norm: 1.0,
    }
}

fn model(tower: Tower) -> Sft<PolicySft> {
    let settings = SftSettings {
        tower,
        optimization: optimization(),
    };
    Sft::<PolicySft>::open(&onevision::spec(Dtype::Auto), &settings).unwrap()
}

fn sft_example<'a>(prompt: &'a ChatPrompt, answer: &'a str, learned: TrainOn) -> SftExample<'a> {
    SftExample {
        id: "the example",
        prompt,
        answer,
        learned,
    }
}

/// The log-probability of an answer, including its stop token.
fn logp(prompt: &ChatPrompt, answer: &str) -> f64 {
    let settings = DpoSettings {
        objective: Objective::of(Loss::Sigmoid, 0.1),
        mask: Mask::default(),
        newlines: Newlines::default(),
        trained: Trained::all(),
        checkpointing: Checkpointing::Never,
        optimization: optimization(),
    };
    let mut trainer = PolicyDpo::open(&onevision::spec(Dtype::Auto), &settings).unwrap();
    let written = || TrainingAnswer {
        text: answer.to_owned(),
        token_ids: None,
    };
    let example = Example {
        id: "the answer",
        prompt,
        chosen: written(),
        rejected: written(),
        reference: None,
    };
    trainer.reference_logps(&[example]).unwrap()[0][0]
}

/// A conversation in which "a cat" was answered before the question.
fn conversation() -> (ChatPrompt, ChatPrompt) {
    let first = onevision::prompts()[0].clone();
    let turn = |role, text: &str| ChatTurn {
        role,
        text: text.to_owned(),
    };
    let second = ChatPrompt {
        turns: vec![
            turn(ChatRole::User, &first.question),
            turn(ChatRole::Assistant, "a cat"),
        ],
        question: "Which color?".to_owned(),
        ..first.clone()
    };
    (first, second)
}

#[test]
fn the_loss_is_the_mean_of_the_learned_tokens() {
    let (first, second) = conversation();
    let [one, two] = [logp(&first, "a cat"), logp(&second, "gray")];
    // One token per letter, and one for the end.
    for (learned, logp, tokens) in [(TrainOn::Last, two, 5), (TrainOn::All, one + two, 11)] {
        let report = model(Tower::Train)
            .step(&[sft_example(&second, "gray", learned)])
            .unwrap();
        assert_eq!(report.learned_tokens, tokens);
        let expected = -logp / tokens as f64;
        assert!(
            (report.loss - expected).abs() < 1e-5,
            "{} {expected}",
            report.loss
        );
    }
    let both = [
        sft_example(&first, "a cat", TrainOn::All),
        sft_example(&second, "gray", TrainOn::Last),
    ];
    let report = model(Tower::Train).step(&both).unwrap();
    let expected = -(one + two) / 11.0;
    assert!((report.loss - expected).abs() < 1e-5, "{}", report.loss);
}

/// Batches of prompts with no, one and several images, in front and between words.
#[test]
fn a_mixed_batch_has_the_loss_and_the_gradients_of_its_examples() {
    let mut prompts = onevision::prompts();
    prompts[2].question = "Is <image> wider than <image>?".to_owned();
    let large = prompts[0].images[0].clone();
    let mut three = prompts[2].clone();
    three.images.push(large);
    three.question = "<image><image>\nOr <image>?".to_owned();
    prompts.push(three);
    let prompts: Vec<ChatPrompt> = prompts.into_iter().map(ChatPrompt::with_places).collect();
    let answers = ["a cat", "so", "gray", "No.", "yes"];
    let examples: Vec<SftExample<'_>> = prompts
        .iter()
        .zip(answers)
        .map(|(prompt, answer)| sft_example(prompt, answer, TrainOn::All))
        .collect();
    let settings = SftSettings {
        tower: Tower::Train,
        optimization: Optimization {
            max_grad_norm: 0.0,
            ..optimization()
        },
    };
    let gradients = |batch: &[SftExample<'_>]| {
        let opened = Sft::<PolicySft>::open(&onevision::spec(Dtype::Auto), &settings);
        let mut model = opened.unwrap();
        let report = model.step(batch).unwrap();
        (report, first_gradients(model.training()))
    };
    let (mixed, together) = gradients(&examples);
    let (mut loss, mut tokens) = (0.0, 0.0);
    let mut sums: Vec<Tensor> = together.iter().map(Tensor::zeros_like).collect();
    for example in &examples {
        let (report, gradients) = gradients(std::slice::from_ref(example));
        let learned = report.learned_tokens as f64;
        loss += report.loss * learned;
        tokens += learned;
        for (sum, gradient) in sums.iter_mut().zip(gradients) {
            *sum += gradient * learned;
        }
    }
    assert!((mixed.loss - loss / tokens).abs() < 1e-5, "{}", mixed.loss);
    for (sum, gradient) in sums.iter().zip(&together) {
        let apart = (sum / tokens - gradient).abs().max().double_value(&[]);
        let greatest = gradient.abs().max().double_value(&[]);
        assert!(apart <= 1e-4 * greatest.max(1e-3), "{apart} {greatest}");
    }
}

#[test]
fn training_makes_the_answer_likelier_and_what_was_saved_answers_so() {
    let (first, _) = conversation();
    let mut model = model(Tower::Train);
    let before = logp(&first, "a cat");
    for _ in 0..4 {
        model
            .step(&[sft_example(&first, "a cat", TrainOn::All)])
            .unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("checkpoint");
    model.save(&to).unwrap();
    let mut spec = onevision::spec(Dtype::Auto);
    spec.weights = to;
    let settings = SftSettings {
        tower: Tower::Train,
        optimization: optimization(),
    };
    let mut saved = Sft::<PolicySft>::open(&spec, &settings).unwrap();
    let again = saved
        .step(&[sft_example(&first, "a cat", TrainOn::All)])
        .unwrap();
    assert!(-again.loss * 6.0 > before + 1.0, "{} {before}", again.loss);
}

#[test]
fn a_frozen_tower_stays_and_the_rest_learns() {
    let (first, _) = conversation();
    let mut model = model(Tower::Freeze);
    let names: Vec<String> = model
        .training()
        .parameters
        .iter()
        .map(|parameter| parameter.name.clone())
        .collect();
    assert!(!names.iter().any(|name| name.starts_with(TOWER)));
    assert!(names.iter().any(|name| name.contains("projector")));
    model
        .step(&[sft_example(&first, "a cat", TrainOn::All)])
        .unwrap();
}

#[test]
fn a_resumed_training_is_equal_to_the_bit() {
    let (first, second) = conversation();
    let steps = [
        sft_example(&first, "a cat", TrainOn::All),
        sft_example(&second, "gray", TrainOn::All),
    ];
    let folder = tempfile::tempdir().unwrap();
    let bytes = |model: &mut Sft<PolicySft>, name: &str| {
        let to = folder.path().join(name);
        model.save_state(&to).unwrap();
        fs::read(to.join(STATE_FILE)).unwrap()
    };
    let mut undisturbed = model(Tower::Train);
    undisturbed.step(&steps[..1]).unwrap();
    bytes(&mut undisturbed, "after one");
    undisturbed.step(&steps[1..]).unwrap();
    let mut resumed = model(Tower::Train);
    resumed
        .load_state(&folder.path().join("after one"))
        .unwrap();
    resumed.step(&steps[1..]).unwrap();
    assert!(bytes(&mut resumed, "resumed") == bytes(&mut undisturbed, "undisturbed"));
}

#[test]
fn conversations_beyond_the_context_are_refused_by_name() {
    let (first, _) = conversation();
    let long = "x".repeat(200);
    let error = model(Tower::Train)
        .step(&[sft_example(&first, &long, TrainOn::All)])
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("row the example: the conversation takes 313 tokens"),
        "{error}"
    );
}

#[test]
fn an_adapter_is_merged_before_the_network_is_trained() {
    let mut spec = onevision::spec(Dtype::Auto);
    spec.adapter = Some("lora".into());
    let settings = SftSettings {
        tower: Tower::Train,
        optimization: optimization(),
    };
    let error = Sft::<PolicySft>::open(&spec, &settings)
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("export --merge"), "{error}");
}
