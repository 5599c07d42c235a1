//! Parity of training: losses, gradients and weights, and LLaVA-NeXT's mask.
//!
//! Weights are compared by their change during training: the norm of the difference of both changes
//! divided by the norm of the reference's change, for each tensor.

use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};

use super::{
    Architecture, LLAVA, LLAVA_ONEVISION, Recorded, Report, compare, greatest, image_file, json,
};
use crate::common::first_gradients;
use ovchat_models::preprocess::Processor;
use ovchat_models::{
    self as models, ChatPrompt, Checkpointing, DpoSettings, DpoTrainer as _, Example, Loss, Mask,
    Newlines, Objective, Optimization, Optimizer, Schedule, SftExample, SftSettings,
    SftTrainer as _, Tower, TrainOn, TrainingAnswer, VisionLanguageSpec,
};
use ovchat_torch::dpo_trainer::PolicyDpo;
use ovchat_torch::sft_trainer::{PolicySft, Sft};
use ovchat_torch::training::TrainingState;

/// The number of rows per update.
pub(super) const BATCH: usize = 4;
const STEPS: usize = 20;
const BETA: f64 = 0.1;

/// The maximum deviation of a tensor's change, relative to the reference's.
const CHANGE: f64 = 1e-2;
/// The maximum deviation of losses and other logged values.
const LOGGED: f64 = 1e-5;
/// The maximum deviation of gradients, relative to the largest of a parameter.
const GRADIENT: f64 = 1e-4;

/// The settings that `training.py` trains with.
pub(super) fn optimization() -> Optimization {
    Optimization {
        learning_rate: 1e-4,
        schedule: Schedule::Cosine,
        warmup_steps: (0.12 * STEPS as f64).ceil() as usize,
        optimizer: Optimizer::Adamw,
        steps: STEPS,
        weight_decay: 0.0,
        adam_betas: [0.9, 0.999],
        adam_epsilon: 1e-8,
        max_grad_norm: 1.0,
    }
}

#[derive(serde::Deserialize)]
pub(super) struct Pair {
    #[serde(rename = "pictures")]
    pub(super) images: Vec<String>,
    pub(super) question: String,
    pub(super) chosen: String,
    pub(super) rejected: String,
}

#[derive(serde::Deserialize)]
struct Conversation {
    #[serde(rename = "pictures")]
    images: Vec<String>,
    turns: Vec<[String; 2]>,
    question: String,
    answer: String,
}

#[derive(serde::Deserialize)]
struct Masked {
    question: String,
    answer: String,
    #[serde(rename = "pictures")]
    images: Vec<usize>,
    ids: Vec<i64>,
    labels: Vec<u8>,
}

#[test]
fn trainings_do_what_the_reference_does() {
    compare("training", LLAVA_ONEVISION.trainings, |folder, report| {
        let root = folder.join("..");
        let onevision = Trainings::open(&root, &LLAVA_ONEVISION);
        onevision.all(report);
        onevision.losses(report);
        onevision.masks(report);
        Trainings::open(&root, &LLAVA).all(report);
    });
}

/// The recorded trainings of an architecture.
struct Trainings<'a> {
    architecture: &'a Architecture,
    folder: PathBuf,
    checkpoints: PathBuf,
    pairs: Vec<Pair>,
}

/// A training that is compared with the recorded one.
pub(super) struct Trained<'a> {
    case: String,
    expected: &'a Recorded,
    /// The initial weights.
    before: Vec<Tensor>,
    /// Maps names of parameters to recorded ones.
    canonical: fn(&str) -> String,
    loss_apart: f64,
    gradient_apart: [f64; 2],
}

impl<'a> Trained<'a> {
    pub(super) fn new(
        case: impl Into<String>,
        training: &TrainingState,
        expected: &'a Recorded,
        canonical: fn(&str) -> String,
    ) -> Self {
        Self {
            case: case.into(),
            expected,
            before: weights(training),
            canonical,
            loss_apart: 0.0,
            gradient_apart: [0.0; 2],
        }
    }

    pub(super) fn loss(&mut self, step: usize, found: f64) {
        let expected = self.expected.numbers("losses")[step];
        self.loss_apart = self.loss_apart.max((found - expected).abs());
    }

    /// Compares the gradients of the first update, before clipping.
    pub(super) fn gradients(&mut self, training: &TrainingState) {
        let expected = |name: &str| self.expected.tensor(&format!("gradient.{name}"));
        let names = training.parameters.iter().map(|own| own.name.as_str());
        // AdamW's mean contains the clipped gradient; the recorded one is not clipped.
        let squares = |name: &str| {
            let norm = expected(&(self.canonical)(name)).norm().double_value(&[]);
            norm * norm
        };
        let norm = names.clone().map(squares).sum::<f64>().sqrt();
        let clipped = (1.0 / norm).min(1.0);
        for (name, found) in names.zip(first_gradients(training)) {
            let expected = expected(&(self.canonical)(name)) * clipped;
            let absolute = greatest(&(found - &expected));
            let relative = absolute / greatest(&expected).max(f64::MIN_POSITIVE);
            if !is_zero_in_truth(name) {
                let [a, r] = self.gradient_apart;
                self.gradient_apart = [a.max(absolute), r.max(relative)];
            }
        }
    }

    /// Compares the final weights, and reports everything.
    pub(super) fn weights(self, training: &TrainingState, report: &mut Report) {
        let case = &self.case;
        report.line(
            format!("{case}: losses"),
            [self.loss_apart; 2],
            "1e-5",
            self.loss_apart <= LOGGED,
        );
        let [absolute, relative] = self.gradient_apart;
        let holds = relative <= GRADIENT;
        let bound = "1e-4, relative";
        report.line(
            format!("{case}: first gradients"),
            [absolute, relative],
            bound,
            holds,
        );
        changes(
            case,
            &self.before,
            training,
            self.expected,
            self.canonical,
            report,
        );
    }
}

/// The exact gradient of a tower's `k_proj.bias` is zero, and the computed one is rounding error:
/// softmax is invariant to a constant added to all scores of a query.
fn is_zero_in_truth(name: &str) -> bool {
    name.ends_with("self_attn.k_proj.bias")
}

/// Copies of all weights, in float64.
fn weights(training: &TrainingState) -> Vec<Tensor> {
    let parameters = training.parameters.iter();
    let copy = |tensor: &Tensor| tensor.detach().to_dtype(Kind::Double, false, true);
    parameters
        .map(|parameter| copy(&parameter.tensor))
        .collect()
}

/// Compares the changes of the weights since `before` with those of the reference.
fn changes(
    case: &str,
    before: &[Tensor],
    training: &TrainingState,
    expected: &Recorded,
    recorded_name: fn(&str) -> String,
    report: &mut Report,
) {
    let mut worst = ([0.0_f64; 2], String::new());
    for ((parameter, before), after) in training
        .parameters
        .iter()
        .zip(before)
        .zip(weights(training))
    {
        if is_zero_in_truth(&parameter.name) && parameter.name.starts_with("vision_tower.") {
            continue;
        }
        let name = recorded_name(&parameter.name);
        let theirs = expected
            .tensor(&format!("after.{name}"))
            .to_kind(Kind::Double)
            - before;
        let ours = after - before;
        let apart = (&ours - &theirs).norm().double_value(&[]);
        let relative = apart / theirs.norm().double_value(&[]).max(f64::MIN_POSITIVE);
        if relative > worst.0[1] || relative.is_nan() {
            worst = ([apart, relative], name);
        }
    }
    let (apart, name) = worst;
    let case = format!("{case}: changes of the weights (worst: `{name}`)");
    report.line(case, apart, "1e-2, relative", apart[1] <= CHANGE);
}

pub(super) fn examples<'a>(
    pairs: &[Pair],
    prompts: &'a [ChatPrompt],
    references: &[[f64; 2]],
) -> Vec<Example<'a>> {
    let written = |text: &String| TrainingAnswer {
        text: text.clone(),
        token_ids: None,
    };
    let rows = pairs.iter().zip(prompts).enumerate();
    rows.map(|(index, (pair, prompt))| Example {
        id: "pair",
        prompt,
        chosen: written(&pair.chosen),
        rejected: written(&pair.rejected),
        reference: references.get(index).copied(),
    })
    .collect()
}

/// The parameters' names in the recording: those of transformers in memory, without prefixes.
pub(super) fn in_memory(name: &str) -> String {
    name.replace("language_model.model.", "language_model.")
        .replace("language_model.lm_head.", "lm_head.")
        .replace("vision_tower.vision_model.", "vision_tower.")
}

/// The reference's log-probabilities of pairs.
pub(super) fn references(expected: &Recorded) -> Vec<[f64; 2]> {
    let numbers = expected.tensor("reference").to_kind(Kind::Double);
    let pairs = Vec::<Vec<f64>>::try_from(numbers).unwrap();
    pairs.iter().map(|pair| [pair[0], pair[1]]).collect()
}

impl<'a> Trainings<'a> {
    fn open(root: &Path, architecture: &'a Architecture) -> Self {
        let folder = root.join(architecture.trainings);
        Self {
            architecture,
            checkpoints: root.join(architecture.checkpoints),
            pairs: json(&folder.join("pairs.json")),
            folder,
        }
    }

    /// Compares what is recorded of every architecture.
    fn all(&self, report: &mut Report) {
        for title in self.architecture.batches {
            self.dpo(title, report);
        }
        self.trl(report);
        self.adapter(report);
        self.sft(report);
    }

    /// Returns the title of a case.
    fn title(&self, case: &str) -> String {
        format!("{}{case}", self.architecture.title)
    }

    fn spec(&self, name: &str) -> VisionLanguageSpec {
        super::spec(self.checkpoints.join(name))
    }

    fn prompt(&self, images: &[String], question: &str, turns: &[[String; 2]]) -> ChatPrompt {
        let file = |name: &String| image_file(&self.folder.join(format!("{name}.png")));
        super::prompt(question, turns, images.iter().map(file).collect())
    }

    /// Returns the prompts of pairs.
    fn prompts(&self, pairs: &[Pair]) -> Vec<ChatPrompt> {
        let prompt = |pair: &Pair| self.prompt(&pair.images, &pair.question, &[]);
        pairs.iter().map(prompt).collect()
    }

    /// Compares a batch: log-probabilities, logged values, the loss, and the gradient of every
    /// parameter.
    fn dpo(&self, title: &str, report: &mut Report) {
        let expected = Recorded::open(&self.folder.join(format!("dpo-{title}.safetensors")));
        let settings = DpoSettings {
            objective: Objective::of(Loss::Sigmoid, BETA),
            mask: Mask::Answer,
            newlines: Newlines::One,
            trained: models::Trained::all(),
            checkpointing: Checkpointing::Never,
            optimization: Optimization {
                max_grad_norm: 0.0,
                ..optimization()
            },
        };
        let spec = self.spec(&format!("training-{title}"));
        let mut trainer = PolicyDpo::open(&spec, &settings).unwrap();
        let pairs = &self.pairs[..BATCH];
        let prompts = self.prompts(pairs);
        let references = references(&expected);
        let examples = examples(pairs, &prompts, &references);
        let logps = trainer.reference_logps(&examples).unwrap();
        let flat = |rows: &[[f64; 2]]| Tensor::from_slice(rows.as_flattened());
        let wanted = expected.tensor("logps").flatten(0, -1);
        let case = |what: &str| self.title(&format!("DPO, {title}: {what}"));
        report.tensor(
            case("log-probabilities of answers"),
            &flat(&logps),
            &wanted,
            1e-4,
        );

        let found = trainer.step(&examples).unwrap();
        let rewards = expected.tensor("rewards").to_kind(Kind::Double);
        let mean = |side: i64| rewards.select(1, side).mean(Kind::Double).double_value(&[]);
        let logged = [found.loss, found.rewards_chosen, found.rewards_rejected];
        let wanted = [expected.number("loss"), mean(0), mean(1)];
        report.tensor(
            case("loss and rewards"),
            &Tensor::from_slice(&logged),
            &Tensor::from_slice(&wanted),
            LOGGED,
        );
        let parameters = &trainer.training().parameters;
        let mut apart = [0.0_f64; 2];
        for (parameter, found) in parameters.iter().zip(first_gradients(trainer.training())) {
            let name = &parameter.name;
            let expected = expected.tensor(&format!("gradient.{}", in_memory(name)));
            let absolute = greatest(&(found - &expected));
            let relative = absolute / greatest(&expected).max(f64::MIN_POSITIVE);
            if !is_zero_in_truth(name) {
                apart = [apart[0].max(absolute), apart[1].max(relative)];
            }
        }
        let case = case(&format!("gradients of {} parameters", parameters.len()));
        report.line(case, apart, "1e-4, relative", apart[1] <= GRADIENT);
    }

    /// Compares twenty updates with TRL's.
    fn trl(&self, report: &mut Report) {
        let expected = Recorded::open(&self.folder.join("trl.safetensors"));
        let pairs = &self.pairs;
        let settings = DpoSettings {
            objective: Objective::of(Loss::Sigmoid, BETA),
            mask: self.architecture.trl,
            newlines: Newlines::One,
            trained: models::Trained::all(),
            checkpointing: Checkpointing::Never,
            optimization: optimization(),
        };
        let mut trainer = PolicyDpo::open(&self.spec("training-trl"), &settings).unwrap();
        let prompts = self.prompts(pairs);
        let references = trainer
            .reference_logps(&examples(pairs, &prompts, &[]))
            .unwrap();
        let examples = examples(pairs, &prompts, &references);
        let before = weights(trainer.training());
        let mut logged: [Vec<f64>; 7] = Default::default();
        for batch in examples.chunks(BATCH) {
            let found = trainer.step(batch).unwrap();
            let numbers = [
                found.loss,
                found.rewards_chosen,
                found.rewards_rejected,
                found.logps_chosen,
                found.logps_rejected,
                found.grad_norm,
                found.learning_rate,
            ];
            for (log, number) in logged.iter_mut().zip(numbers) {
                log.push(number);
            }
        }
        let names = [
            ("loss", LOGGED),
            ("rewards_chosen", LOGGED),
            ("rewards_rejected", LOGGED),
            ("logps_chosen", 1e-4),
            ("logps_rejected", 1e-4),
            ("grad_norm", 1e-4),
            ("learning_rate", 1e-12),
        ];
        for ((name, bound), found) in names.into_iter().zip(&logged) {
            let expected = expected.tensor(&format!("log.{name}"));
            let case = self.title(&format!("TRL's 20 updates: {name}"));
            report.tensor(case, &Tensor::from_slice(found), &expected, bound);
        }
        changes(
            &self.title("TRL's 20 updates"),
            &before,
            trainer.training(),
            &expected,
            in_memory,
            report,
        );
    }

    /// Compares the loss of a batch and the norm of its gradient, for each loss of TRL's.
    fn losses(&self, report: &mut Report) {
        let expected = Recorded::open(&self.folder.join("losses.safetensors"));
        let references = references(&expected);
        let pairs = &self.pairs[..BATCH];
        let prompts = self.prompts(pairs);
        let with_terms =
            |name: &str, terms: Vec<(Loss, f64)>, label_smoothing: f64, report: &mut Report| {
                let settings = DpoSettings {
                    objective: Objective {
                        terms,
                        label_smoothing,
                        ..Objective::of(Loss::Sigmoid, BETA)
                    },
                    mask: Mask::Trl,
                    newlines: Newlines::One,
                    trained: models::Trained::all(),
                    checkpointing: Checkpointing::Always,
                    optimization: optimization(),
                };
                let mut trainer = PolicyDpo::open(&self.spec("training-trl"), &settings).unwrap();
                let found = trainer
                    .step(&examples(pairs, &prompts, &references))
                    .unwrap();
                let found = Tensor::from_slice(&[found.loss, found.grad_norm]);
                let expected = expected.tensor(name);
                let apart = ((found - &expected) / &expected)
                    .abs()
                    .max()
                    .double_value(&[]);
                let case = format!("TRL's loss {name}: value and gradient");
                report.line(case, [apart; 2], "1e-4, relative", apart <= 1e-4);
            };
        for loss in Loss::ALL.into_iter().filter(|loss| *loss != Loss::Simpo) {
            let name = serde_json::to_value(loss).unwrap();
            // TRL does not support label smoothing in its sigmoid loss.
            let smoothing = match loss {
                Loss::ExoPair | Loss::Robust | Loss::Aot => 0.1,
                _ => 0.0,
            };
            with_terms(name.as_str().unwrap(), vec![(loss, 1.0)], smoothing, report);
        }
        let both = vec![(Loss::Sigmoid, 1.0), (Loss::Sft, 0.3)];
        with_terms("sigmoid and sft", both, 0.0, report);
    }

    /// Compares twenty updates of an adapter that peft wrote.
    fn adapter(&self, report: &mut Report) {
        let expected = Recorded::open(&self.folder.join("adapter.safetensors"));
        let pairs = &self.pairs;
        let lora = models::LoraSettings {
            rank: 4,
            alpha: 8.0,
            dropout: 0.0,
            targets: ["q_proj", "down_proj"].map(str::to_owned).to_vec(),
            seed: 0,
        };
        let settings = DpoSettings {
            objective: Objective::of(Loss::Sigmoid, BETA),
            mask: Mask::Answer,
            newlines: Newlines::One,
            trained: models::Trained::Lora(lora),
            checkpointing: Checkpointing::Always,
            optimization: optimization(),
        };
        let spec = VisionLanguageSpec {
            adapter: Some(self.folder.join("adapter")),
            ..self.spec("training-trl")
        };
        let mut trainer = PolicyDpo::open(&spec, &settings).unwrap();
        let prompts = self.prompts(pairs);
        let references = references(&expected);
        let mut trained = Trained::new(
            self.title("a policy's adapter, 20 updates"),
            trainer.training(),
            &expected,
            ToOwned::to_owned,
        );
        for (step, batch) in examples(pairs, &prompts, &references)
            .chunks(BATCH)
            .enumerate()
        {
            let found = trainer.step(batch).unwrap();
            trained.loss(step, found.loss);
            if step == 0 {
                trained.gradients(trainer.training());
            }
        }
        trained.weights(trainer.training(), report);
    }

    fn sft(&self, report: &mut Report) {
        let sft_examples: Vec<Conversation> = json(&self.folder.join("lessons.json"));
        let expected = Recorded::open(&self.folder.join("sft.safetensors"));
        let settings = SftSettings {
            tower: Tower::Train,
            optimization: optimization(),
        };
        let spec = self.spec("training-sft");
        let mut trainer = Sft::<PolicySft>::open(&spec, &settings).unwrap();
        let prompts: Vec<ChatPrompt> = sft_examples
            .iter()
            .map(|example| self.prompt(&example.images, &example.question, &example.turns))
            .collect();
        let rows: Vec<SftExample<'_>> = sft_examples
            .iter()
            .zip(&prompts)
            .map(|(example, prompt)| SftExample {
                id: "example",
                prompt,
                answer: &example.answer,
                learned: TrainOn::All,
            })
            .collect();
        let mut trained = Trained::new(
            self.title("20 updates of fine-tuning"),
            trainer.training(),
            &expected,
            in_memory,
        );
        for (step, batch) in rows.chunks(BATCH).enumerate() {
            let found = trainer.step(batch).unwrap();
            trained.loss(step, found.loss);
            if step == 0 {
                trained.gradients(trainer.training());
            }
        }
        trained.weights(trainer.training(), report);
    }

    /// Compares the ids and the counted tokens with those of LLaVA-NeXT's DPO script.
    fn masks(&self, report: &mut Report) {
        let cases: Vec<Masked> = json(&self.folder.join("masks.json"));
        let processor = Processor::open(&self.spec("training-mask").weights).unwrap();
        let differs = |case: &&Masked| {
            let prompt = self.prompt(&[], &case.question, &[]);
            let written =
                processor
                    .chat()
                    .prompt_of_llava_next(&prompt, &case.images, Newlines::Two);
            let (text, mut counted) = written.unwrap();
            let mut ids = text.ids;
            let start = ids.len();
            ids.extend(processor.chat().answer(&case.answer).unwrap());
            ids.extend(processor.chat().newline().unwrap());
            counted.extend(start..ids.len());
            let labels: Vec<u8> = (0..ids.len())
                .map(|at| u8::from(counted.contains(&at)))
                .collect();
            ids != case.ids || labels != case.labels
        };
        let different = cases.iter().filter(differs).count();
        report.equal("LLaVA-NeXT's mask and two newlines", different, cases.len());
    }
}
