//! Parity of prompts whose images stand anywhere in the text: token ids, logits, sampled answers, and
//! DPO on batches of prompts with no, one and several images.

use std::collections::HashMap;
use std::path::Path;

use tch::Kind;

use super::networks::{Apart, BOUND, outputs, sampled};
use super::training::{BATCH, Pair, Trained, examples, in_memory, optimization, references};
use super::{
    Architecture, LLAVA, LLAVA_ONEVISION, Recorded, Report, compare, image_file, json,
    open_network, spec,
};
use ovchat_models::preprocess::PromptIds;
use ovchat_models::{
    self as models, ChatPrompt, Checkpointing, DpoSettings, DpoTrainer as _, Loss, Mask, Newlines,
    Objective, Optimization, Visual,
};
use ovchat_torch::checkpoint::Purpose;
use ovchat_torch::dpo_trainer::PolicyDpo;

#[derive(serde::Deserialize)]
struct Cases {
    /// Logits are recorded at the last position and at every n-th position before it.
    logits_every: i64,
    cases: Vec<Case>,
}

/// A prompt, in the form in which tables have it.
#[derive(serde::Deserialize)]
struct Case {
    images: Vec<String>,
    turns: Vec<[String; 2]>,
    question: String,
}

/// Two answers to a case.
#[derive(serde::Deserialize)]
struct Answered {
    case: usize,
    chosen: String,
    rejected: String,
}

#[test]
fn images_anywhere_in_the_text_are_read_as_by_the_reference() {
    compare("images in place", "interleaved", |folder, report| {
        for architecture in [&LLAVA_ONEVISION, &LLAVA] {
            block(folder, architecture, report);
        }
    });
}

fn block(folder: &Path, architecture: &Architecture, report: &mut Report) {
    let checkpoint = folder
        .join("..")
        .join(architecture.checkpoints)
        .join("interleaved");
    let folder = folder.join(architecture.checkpoints);
    let title = |what: &str| format!("{}{what}", architecture.title);
    let recorded: Cases = json(&folder.join("cases.json"));
    let mut images: HashMap<&String, Visual> = HashMap::new();
    for name in recorded.cases.iter().flat_map(|case| &case.images) {
        let path = folder.join(format!("{name}.png"));
        images.entry(name).or_insert_with(|| image_file(&path));
    }
    let prompt = |case: &Case| {
        let images = case.images.iter().map(|name| images[name].clone());
        super::prompt(&case.question, &case.turns, images.collect()).with_places()
    };
    let prompts: Vec<ChatPrompt> = recorded.cases.iter().map(prompt).collect();

    let case = title("images in place");
    forward(
        &checkpoint,
        &folder,
        &prompts,
        recorded.logits_every,
        &case,
        report,
    );
    sampled(&checkpoint, &folder, &prompts, &case, report);
    updates(&checkpoint, &folder, &prompts, &case, report);
}

/// Compares the token ids and the logits of prompts.
pub(super) fn forward(
    checkpoint: &Path,
    folder: &Path,
    prompts: &[ChatPrompt],
    logits_every: i64,
    title: &str,
    report: &mut Report,
) {
    let expected = Recorded::open(&folder.join("expected.safetensors"));
    let (processor, network, _) = open_network(checkpoint, Kind::Float, Purpose::Inference);
    let mut other_ids = 0;
    let mut apart = Apart::default();
    for (index, prompt) in prompts.iter().enumerate() {
        let prepared = processor.prepare(prompt).unwrap();
        let ids = expected.integers(&format!("ids.{index}"));
        other_ids += usize::from(!are_same(&prepared.text, &ids));
        let _no_grad = tch::no_grad_guard();
        let (_, logits) = outputs(&*network, &prepared, logits_every);
        apart.add(&logits, &expected.tensor(&format!("logits.{index}")));
    }
    report.equal(format!("{title}: token ids"), other_ids, prompts.len());
    let holds = apart.0[0] <= BOUND;
    report.line(format!("{title}: logits"), apart.0, "1e-4", holds);
}

/// True if the ids equal the expected ones, apart from those of images and videos.
fn are_same(found: &PromptIds, expected: &[i64]) -> bool {
    let is_image = |place: &usize| found.images.iter().any(|image| image.contains(place));
    let places = (0..found.ids.len()).filter(|place| !is_image(place));
    found.ids.len() == expected.len()
        && places
            .into_iter()
            .all(|place| found.ids[place] == expected[place])
}

/// Compares updates of DPO on mixed batches.
pub(super) fn updates(
    checkpoint: &Path,
    folder: &Path,
    prompts: &[ChatPrompt],
    title: &str,
    report: &mut Report,
) {
    let expected = Recorded::open(&folder.join("dpo.safetensors"));
    let answered: Vec<Answered> = json(&folder.join("pairs.json"));
    let prompts: Vec<ChatPrompt> = answered
        .iter()
        .map(|pair| prompts[pair.case].clone())
        .collect();
    let pair = |pair: Answered| Pair {
        images: Vec::new(),
        question: String::new(),
        chosen: pair.chosen,
        rejected: pair.rejected,
    };
    let pairs: Vec<Pair> = answered.into_iter().map(pair).collect();
    let settings = DpoSettings {
        objective: Objective::of(Loss::Sigmoid, 0.1),
        mask: Mask::Answer,
        newlines: Newlines::One,
        trained: models::Trained::all(),
        checkpointing: Checkpointing::Always,
        optimization: Optimization {
            steps: pairs.len() / BATCH,
            warmup_steps: 1,
            ..optimization()
        },
    };
    let mut trainer = PolicyDpo::open(&spec(checkpoint.to_owned()), &settings).unwrap();
    let wanted = references(&expected);
    let found = trainer.reference_logps(&examples(&pairs, &prompts, &[]));
    let apart = found
        .unwrap()
        .iter()
        .flatten()
        .zip(wanted.iter().flatten())
        .map(|(found, wanted)| (found - wanted).abs())
        .fold(0.0, f64::max);
    let case = format!("{title}: log-probabilities of answers");
    report.line(case, [apart; 2], "1e-4", apart <= BOUND);
    let title = format!("{title}: DPO on mixed batches");
    let mut trained = Trained::new(title, trainer.training(), &expected, in_memory);
    for (step, batch) in examples(&pairs, &prompts, &wanted)
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
