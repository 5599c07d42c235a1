//! Tests of the DPO trainer against PyTorch's autograd on the same pair, and of its invariants.

use std::fs;

use tch::{Kind, Tensor};

use crate::common::{Expected, assert_close, first_gradients};
use crate::recorded::onevision;
use ovchat_models::checkpoint::canonical;
use ovchat_models::{
    ChatPrompt, Checkpointing, DpoReport, DpoSettings, DpoTrainer as _, Dtype, Example,
    LoraSettings, Loss, Mask, Newlines, Objective, Optimization, Optimizer, Part, Schedule,
    Trained, Trainer as _, TrainingAnswer,
};
use ovchat_torch::dpo_trainer::PolicyDpo;
use ovchat_torch::training::STATE_FILE;
use ovchat_torch::weights::save_safetensors;

const BETA: f64 = 0.1;

fn settings() -> DpoSettings {
    DpoSettings {
        objective: Objective::of(Loss::Sigmoid, BETA),
        mask: Mask::default(),
        newlines: Newlines::default(),
        trained: Trained::all(),
        checkpointing: Checkpointing::Never,
        optimization: Optimization {
            learning_rate: 1e-3,
            schedule: Schedule::Cosine,
            warmup_steps: 0,
            steps: 6,
            optimizer: Optimizer::Adamw,
            weight_decay: 0.01,
            adam_betas: [0.9, 0.999],
            adam_epsilon: 1e-8,
            max_grad_norm: 0.0,
        },
    }
}

fn trainer(settings: &DpoSettings) -> PolicyDpo {
    PolicyDpo::open(&onevision::spec(Dtype::Auto), settings).unwrap()
}

fn written(text: &str) -> TrainingAnswer {
    TrainingAnswer {
        text: text.to_owned(),
        token_ids: None,
    }
}

/// The recorded pair, as answers to one of the recorded prompts.
fn example(prompt: &ChatPrompt) -> Example<'_> {
    Example {
        id: "the pair",
        prompt,
        chosen: written("a cat"),
        rejected: written("two red dogs"),
        reference: Some([-30.0, -70.0]),
    }
}

/// The bytes that `save_state` writes.
fn state(trainer: &mut PolicyDpo) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("state");
    trainer.save_state(&to).unwrap();
    fs::read(to.join(STATE_FILE)).unwrap()
}

#[test]
fn loss_and_gradients_of_a_pair_equal_those_of_pytorch() {
    let (mut trainer, expected) = (trainer(&settings()), Expected::open());
    let prompts = onevision::prompts();
    let logps = trainer.reference_logps(&[example(&prompts[0])]).unwrap();
    let recorded_logps = expected.numbers("dpo.logps");
    for (found, expected) in logps[0].iter().zip(recorded_logps) {
        assert!(
            (found - f64::from(expected)).abs() < 1e-4,
            "{found} {expected}"
        );
    }

    let report = trainer.step(&[example(&prompts[0])]).unwrap();
    let loss = expected.tensor("dpo.loss").double_value(&[]);
    assert!((report.loss - loss).abs() < 1e-5, "{} {loss}", report.loss);
    assert!((report.rewards_chosen - BETA * (logps[0][0] + 30.0)).abs() < 1e-6);
    assert!((report.rewards_rejected - BETA * (logps[0][1] + 70.0)).abs() < 1e-6);
    // The prompt, 5 and 12 letters, two stop tokens.
    assert_eq!(report.tokens, 112 + 5 + 12 + 2);

    let gradients = first_gradients(trainer.training());
    let gradient = |name: &str| {
        let mut parameters = trainer.training().parameters.iter();
        let index = parameters.position(|parameter| parameter.name == name);
        &gradients[index.expect("a parameter")]
    };
    let mut squares = 0.0;
    for name in expected.names() {
        if let Some(norm) = name.strip_prefix("norm.") {
            let expected = expected.tensor(name).double_value(&[]);
            let found = gradient(&canonical(norm)).norm().double_value(&[]);
            assert!(
                (found - expected).abs() <= 1e-4 * expected + 1e-7,
                "{name} {found} {expected}"
            );
            squares += expected * expected;
        } else if let Some(whole) = name.strip_prefix("gradient.") {
            let expected = expected.tensor(name);
            let scale = expected.abs().max();
            let found = gradient(&canonical(whole));
            assert_close(name, &(found / &scale), &(&expected / &scale), 1e-4);
        }
    }
    assert!((report.grad_norm - squares.sqrt()).abs() < 1e-4 * report.grad_norm);
}

/// TRL's mask adds the newline after each answer; LLaVA-NeXT's adds the same prompt tokens to both
/// answers, so that the loss is unchanged.
#[test]
fn what_other_programs_count_is_added_to_both_answers() {
    let prompts = onevision::prompts();
    let of = |mask: Mask, newlines: Newlines| {
        let mut trainer = trainer(&DpoSettings {
            mask,
            newlines,
            ..settings()
        });
        let [pair] = trainer.reference_logps(&[example(&prompts[0])]).unwrap()[..] else {
            panic!("one pair")
        };
        (pair, trainer.step(&[example(&prompts[0])]).unwrap())
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
    let prompts = onevision::prompts();
    let batches: [&[Example<'_>]; 3] = [
        &[example(&prompts[0]), example(&prompts[2])],
        &[example(&prompts[3])],
        &[example(&prompts[1]), example(&prompts[0])],
    ];
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("after two steps");
    let mut undisturbed = trainer(&settings());
    undisturbed.step(batches[0]).unwrap();
    undisturbed.step(batches[1]).unwrap();
    undisturbed.save_state(&saved).unwrap();
    undisturbed.step(batches[2]).unwrap();

    let mut resumed = trainer(&settings());
    resumed.load_state(&saved).unwrap();
    resumed.step(batches[2]).unwrap();
    assert!(state(&mut resumed) == state(&mut undisturbed));
}

#[test]
fn training_makes_the_chosen_answer_likelier_than_the_rejected() {
    let prompts = onevision::prompts();
    let mut trainer = trainer(&settings());
    let mut example = example(&prompts[1]);
    let start = trainer.reference_logps(std::slice::from_ref(&example));
    example.reference = Some(start.unwrap()[0]);
    let reports: Vec<DpoReport> = (0..6)
        .map(|_| trainer.step(std::slice::from_ref(&example)).unwrap())
        .collect();
    assert!((reports[0].loss - std::f64::consts::LN_2).abs() < 1e-6);
    assert!(reports[5].loss < 0.6 && reports[5].accuracy > 0.5);
    assert!(reports[5].learning_rate < reports[0].learning_rate);
}

#[test]
fn pairs_without_images_leave_the_tower_alone() {
    let prompts = onevision::prompts();
    let mut trainer = trainer(&settings());
    let value = |trainer: &PolicyDpo, name: &str| {
        let mut parameters = trainer.training().parameters.iter();
        let found = parameters.find(|parameter| parameter.name == name);
        found.unwrap().tensor.detach().copy()
    };
    let names = ["image_newline", "language_model.model.norm.weight"];
    let before = names.map(|name| value(&trainer, name));
    trainer.step(&[example(&prompts[3])]).unwrap();
    let after = names.map(|name| value(&trainer, name));
    assert_eq!(before[0], after[0]);
    assert_ne!(before[1], after[1]);
}

#[test]
fn a_loss_that_is_not_finite_names_the_pair_and_changes_nothing() {
    let prompts = onevision::prompts();
    let mut trainer = trainer(&settings());
    trainer.step(&[example(&prompts[1])]).unwrap();
    let before = state(&mut trainer);
    let bad = Example {
        id: "bad",
        reference: Some([f64::NAN, 0.0]),
        ..example(&prompts[1])
    };
    let error = trainer.step(&[example(&prompts[0]), bad]).unwrap_err();
    let words = "the loss of pair bad is not finite; the rows of this step: the pair, bad";
    assert_eq!(error.to_string(), words);
    assert!(state(&mut trainer) == before);
}

#[test]
fn pairs_that_cannot_be_trained_on_are_refused_by_name() {
    let prompts = onevision::prompts();
    let mut trainer = trainer(&settings());
    let mut check = |example: Example<'_>, words: &str| {
        let error = trainer.step(&[example]).unwrap_err().to_string();
        assert!(
            error.starts_with("row the pair: ") && error.contains(words),
            "{error}"
        );
    };
    let sampled = |ids: Vec<i32>| TrainingAnswer {
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
        "the chosen answer contains token 264",
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
    broken.images[0].bytes = b"not an image".to_vec().into();
    check(example(&broken), "large.png");
}

#[test]
fn a_saved_checkpoint_is_the_trained_model() {
    let prompts = onevision::prompts();
    let mut trained = trainer(&settings());
    trained.step(&[example(&prompts[0])]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("checkpoint");
    trained.save(&to).unwrap();
    let mut spec = onevision::spec(Dtype::Auto);
    spec.weights = to;
    let mut opened = PolicyDpo::open(&spec, &settings()).unwrap();
    let logps = |trainer: &mut PolicyDpo| trainer.reference_logps(&[example(&prompts[0])]);
    assert_eq!(logps(&mut opened).unwrap(), logps(&mut trained).unwrap());
}

#[test]
fn a_state_of_another_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(STATE_FILE);
    let tensors = [("step".to_owned(), Tensor::from_slice(&[1i64]))];
    save_safetensors(&path, &tensors, &[]).unwrap();
    let error = trainer(&settings())
        .load_state(folder.path())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("state.safetensors") && error.contains("parameter_steps"),
        "{error}"
    );
}

/// All gradients of one step on two pairs.
fn gradients(trainer: &mut PolicyDpo) -> Vec<Tensor> {
    let prompts = onevision::prompts();
    trainer
        .step(&[example(&prompts[0]), example(&prompts[2])])
        .unwrap();
    first_gradients(trainer.training())
}

#[test]
fn gradients_do_not_depend_on_what_is_remembered_or_how_many_logits_there_are_at_once() {
    let expected = gradients(&mut trainer(&settings()));
    let mut again = trainer(&DpoSettings {
        checkpointing: Checkpointing::Always,
        ..settings()
    });
    assert_eq!(gradients(&mut again), expected);
    let mut in_pieces = trainer(&settings());
    in_pieces.logits_max = 3 * 264;
    for (found, expected) in gradients(&mut in_pieces).iter().zip(&expected) {
        // The bias of the keys does not affect the result, so its gradient is only rounding error.
        let scale = expected.abs().max().clamp_min(1e-3);
        assert_close("gradient", &(found / &scale), &(expected / &scale), 1e-5);
    }
}

#[test]
fn half_precision_leads_the_same_way_and_keeps_the_weights_whole() {
    let expected = gradients(&mut trainer(&settings()));
    let spec = onevision::spec(Dtype::Bfloat16);
    let mut narrow = PolicyDpo::open(&spec, &settings()).unwrap();
    let found = gradients(&mut narrow);
    let mut products = [0.0; 3];
    for (found, expected) in found.iter().zip(&expected) {
        let product = |a: &Tensor, b: &Tensor| (a * b).sum(Kind::Double).double_value(&[]);
        products[0] += product(found, expected);
        products[1] += product(found, found);
        products[2] += product(expected, expected);
    }
    let cosine = products[0] / (products[1] * products[2]).sqrt();
    assert!(cosine > 0.99, "{cosine}");
    let kinds = narrow
        .training()
        .parameters
        .iter()
        .map(|own| own.tensor.kind());
    assert!(kinds.clone().count() > 0 && kinds.clone().all(|kind| kind == Kind::Float));
}

#[test]
fn parts_that_are_not_trained_stay_and_others_have_their_own_rate() {
    let prompts = onevision::prompts();
    let trained = vec![(Part::Projector, Some(1e-2)), (Part::Newline, None)];
    let mut trainer = trainer(&DpoSettings {
        trained: Trained::Parts(trained),
        ..settings()
    });
    let values = |trainer: &PolicyDpo| -> Vec<(String, Tensor)> {
        let parameters = trainer.training().parameters.iter();
        parameters
            .map(|own| (own.name.clone(), own.tensor.detach().copy()))
            .collect()
    };
    let before = values(&trainer);
    trainer.step(&[example(&prompts[0])]).unwrap();
    for ((name, before), (_, after)) in before.iter().zip(values(&trainer)) {
        // The first update of AdamW moves every weight by about the learning rate.
        let moved = (after - before).abs().max().double_value(&[]);
        let rate = if name == "image_newline" { 1e-3 } else { 1e-2 };
        assert!((moved / rate - 1.0).abs() < 0.1, "{name} {moved}");
    }
    assert_eq!(before.len(), 5, "two layers with biases, and the newline");
}

#[test]
fn losses_that_join_a_batch_see_all_of_it() {
    let prompts = onevision::prompts();
    let report = |loss| {
        let mut trainer = trainer(&DpoSettings {
            objective: Objective::of(loss, BETA),
            ..settings()
        });
        let other = Example {
            reference: Some([-90.0, -20.0]),
            ..example(&prompts[1])
        };
        trainer.step(&[example(&prompts[0]), other]).unwrap()
    };
    let (apart, joined) = (report(Loss::Sigmoid), report(Loss::Aot));
    assert!((apart.rewards_chosen - joined.rewards_chosen).abs() < 1e-9);
    // Sorted margins are closer to each other than those of the pairs.
    assert!(
        joined.loss < apart.loss - 1e-3,
        "{} {}",
        joined.loss,
        apart.loss
    );
}

fn lora(dropout: f64) -> LoraSettings {
    LoraSettings {
        rank: 2,
        alpha: 4.0,
        dropout,
        targets: ["q_proj", "down_proj"].map(str::to_owned).to_vec(),
        seed: 7,
    }
}

#[test]
fn an_adapter_begins_as_the_model_and_is_read_back_as_it_was_trained() {
    let prompts = onevision::prompts();
    let of_adapter = |dropout| DpoSettings {
        trained: Trained::Lora(lora(dropout)),
        ..settings()
    };
    let mut trained = trainer(&of_adapter(0.0));
    let logps = |trainer: &mut PolicyDpo| trainer.reference_logps(&[example(&prompts[0])]).unwrap();
    let start = logps(&mut trainer(&settings()));
    assert_eq!(logps(&mut trained), start);
    let names: Vec<&str> = trained
        .training()
        .parameters
        .iter()
        .map(|own| own.name.as_str())
        .collect();
    let first = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight";
    assert!(
        names[0] == first && !names.iter().any(|name| name.contains("vision")),
        "{names:?}"
    );
    for _ in 0..2 {
        trained.step(&[example(&prompts[0])]).unwrap();
    }
    let after = logps(&mut trained);
    assert!((after[0][0] - start[0][0]).abs() > 1e-3);

    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("adapter");
    trained.save(&to).unwrap();
    let mut spec = onevision::spec(Dtype::Auto);
    spec.adapter = Some(to);
    let mut again = PolicyDpo::open(&spec, &of_adapter(0.0)).unwrap();
    assert_eq!(logps(&mut again), after);
    // Merged, it is the same up to rounding.
    let nothing = DpoSettings {
        trained: Trained::Parts(Vec::new()),
        ..settings()
    };
    let merged = logps(&mut PolicyDpo::open(&spec, &nothing).unwrap());
    assert!((merged[0][0] - after[0][0]).abs() < 1e-4);

    let other = DpoSettings {
        trained: Trained::Lora(LoraSettings {
            rank: 3,
            ..lora(0.0)
        }),
        ..settings()
    };
    for (settings, words) in [(&other, "has rank 2"), (&settings(), "is an adapter")] {
        let error = PolicyDpo::open(&spec, settings).err().unwrap().to_string();
        assert!(error.contains(words), "{error}");
    }
}

/// Returns the state after two steps, resumed from a save after the first; asserts that it equals
/// that of an uninterrupted training.
fn gone_on(settings: &DpoSettings) -> Vec<u8> {
    let prompts = onevision::prompts();
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("after a step");
    let mut undisturbed = trainer(settings);
    undisturbed.step(&[example(&prompts[0])]).unwrap();
    undisturbed.save_state(&saved).unwrap();
    undisturbed.step(&[example(&prompts[1])]).unwrap();
    let mut resumed = trainer(settings);
    resumed.load_state(&saved).unwrap();
    resumed.step(&[example(&prompts[1])]).unwrap();
    let found = state(&mut resumed);
    assert!(found == state(&mut undisturbed));
    found
}

#[test]
fn dropout_of_an_adapter_is_the_same_when_a_training_goes_on() {
    let with = |dropout| DpoSettings {
        trained: Trained::Lora(lora(dropout)),
        checkpointing: Checkpointing::Always,
        ..settings()
    };
    assert!(gone_on(&with(0.5)) != gone_on(&with(0.0)));
}

#[test]
fn a_training_with_moments_in_eight_bits_goes_on_to_the_bit() {
    let mut settings = settings();
    let whole = gone_on(&settings);
    settings.optimization.optimizer = Optimizer::Adamw8bit;
    assert!(gone_on(&settings) != whole);
}
