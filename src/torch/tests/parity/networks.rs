//! Parity of tower, projector, decoder and logits for every architecture and checkpoint layout, and
//! of greedy and sampled answers.

use std::ops::ControlFlow;
use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::{
    LLAVA, LLAVA_ONEVISION, Recorded, Report, compare, differences, greatest, image_file, json,
    open_network, spec,
};
use ovchat_models::checkpoint::LlavaOnevisionConfig;
use ovchat_models::preprocess::{Prepared, PromptIds, Tiles};
use ovchat_models::{ChatPrompt, Generation, Policy as _, Sampling, Tower};
use ovchat_torch::checkpoint::{Checkpoint, HEAD, Purpose, Reader};
use ovchat_torch::generate::NetworkPolicy;
use ovchat_torch::llava_onevision::LlavaOnevision;
use ovchat_torch::vlm::VisionLanguageModel;
use ovchat_torch::weights::Weights;

#[derive(serde::Deserialize)]
struct Cases {
    /// Logits are recorded at the last position and at every n-th position before it.
    logits_every: i64,
    cases: Vec<Case>,
}

#[derive(serde::Deserialize)]
struct Case {
    title: String,
    folder: String,
    /// The deviation of the reference's bfloat16 logits from its float32 ones: root mean square,
    /// and maximum.
    bfloat16: Option<[f64; 2]>,
}

#[derive(serde::Deserialize)]
struct Asked {
    #[serde(rename = "pictures")]
    images: Vec<String>,
    question: String,
}

#[derive(serde::Deserialize)]
struct Sampled {
    temperature: f64,
    top_p: f64,
    max_new_tokens: usize,
    count: usize,
    seeds: Vec<u64>,
}

pub(super) const BOUND: f64 = 1e-4;

#[test]
fn networks_compute_what_the_reference_computes() {
    compare("networks", LLAVA_ONEVISION.checkpoints, |folder, report| {
        let llava = folder.join("..").join(LLAVA.checkpoints);
        let parts: [(&Path, ImagesApart); 2] =
            [(folder, tower_and_projector), (&llava, image_features)];
        for (folder, images) in parts {
            if folder.join("cases.json").exists() {
                block(folder, images, report);
            }
        }
    });
}

fn block(folder: &Path, images: ImagesApart, report: &mut Report) {
    let Cases {
        logits_every,
        cases,
    } = json(&folder.join("cases.json"));
    let prompts = prompts(folder, &folder.join("prompts.json"));
    for case in &cases {
        let place = folder.join(&case.folder);
        forward(&place, &prompts, images, case, logits_every, report);
        written(folder, &place, case, report);
        if case.bfloat16.is_some() {
            greedy(folder, &place, &case.title, report);
            sampled(&place, &place, &prompts, &case.title, report);
        }
    }
}

fn prompts(folder: &Path, list: &Path) -> Vec<ChatPrompt> {
    let asked: Vec<Asked> = json(list);
    let file = |name: &String| image_file(&folder.join(format!("{name}.png")));
    let prompt = |asked: Asked| {
        super::prompt(
            &asked.question,
            &[],
            asked.images.iter().map(file).collect(),
        )
    };
    asked.into_iter().map(prompt).collect()
}

/// The largest differences over all prompts, `[absolute, relative]`.
#[derive(Default)]
pub(super) struct Apart(pub(super) [f64; 2]);

impl Apart {
    pub(super) fn add(&mut self, found: &Tensor, expected: &Tensor) {
        let [absolute, relative] = differences(found, expected);
        self.0 = [self.0[0].max(absolute), self.0[1].max(relative)];
    }
}

/// Compares what a checkpoint computes of the images of prompts; returns the names of the outputs
/// with their differences.
type ImagesApart = fn(&Path, &[Prepared], &Recorded) -> Vec<(&'static str, Apart)>;

/// Compares the tower and the projector of a LLaVA-OneVision checkpoint, tile by tile: the tiles'
/// features are packed afterwards.
fn tower_and_projector(
    place: &Path,
    prompts: &[Prepared],
    expected: &Recorded,
) -> Vec<(&'static str, Apart)> {
    let config = LlavaOnevisionConfig::open(place).unwrap();
    let checkpoint = Checkpoint::open(place).unwrap();
    let reader = Reader::new(&checkpoint, Device::Cpu, Kind::Float, Purpose::Inference);
    let is_tied = config.tie_word_embeddings || !checkpoint.has(HEAD);
    let network = LlavaOnevision::new(&reader, &config, is_tied, Kind::Float).unwrap();
    let [mut tower_apart, mut projector_apart]: [Apart; 2] = Default::default();
    for (index, prompt) in with_images(prompts) {
        let see = |tiles: &Tiles| {
            let side = tiles.side as i64;
            let pixels = Tensor::from_slice(&tiles.pixels).view([-1, 3, side, side]);
            network.vision_tower.forward(&pixels)
        };
        let towers: Vec<Tensor> = prompt.images.iter().map(see).collect();
        let tower = Tensor::cat(&towers, 0);
        tower_apart.add(&tower, &expected.tensor(&format!("tower.{index}")));
        let projected = network.multi_modal_projector.forward(&tower);
        projector_apart.add(&projected, &expected.tensor(&format!("projector.{index}")));
    }
    vec![("tower", tower_apart), ("projector", projector_apart)]
}

/// Compares the features of images, each of which is one tile: the output of the projector.
fn image_features(
    place: &Path,
    prompts: &[Prepared],
    expected: &Recorded,
) -> Vec<(&'static str, Apart)> {
    let (_, network, _) = open_network(place, Kind::Float, Purpose::Inference);
    let mut apart = Apart::default();
    for (index, prompt) in with_images(prompts) {
        let images: Vec<&Tiles> = prompt.images.iter().collect();
        let found = Tensor::stack(&network.image_features(&images), 0);
        apart.add(&found, &expected.tensor(&format!("projector.{index}")));
    }
    vec![("image features", apart)]
}

/// The prompts that have images, with their positions.
fn with_images(prompts: &[Prepared]) -> impl Iterator<Item = (usize, &Prepared)> {
    let prompts = prompts.iter().enumerate();
    prompts.filter(|(_, prompt)| !prompt.images.is_empty())
}

/// True if the ids equal the expected ones. A tokenizer without `<image>` has another id for it, so
/// images are compared by position.
fn are_same(found: &PromptIds, image: i64, expected: &[i64]) -> bool {
    let words = |ids: &[i64], image: i64| -> Vec<Option<i64>> {
        ids.iter().map(|&id| (id != image).then_some(id)).collect()
    };
    let theirs = found.images.first();
    let theirs = theirs.and_then(|range| expected.get(range.start).copied());
    words(&found.ids, image) == words(expected, theirs.unwrap_or(-1))
}

/// The hidden states of a prompt, and the logits that are recorded.
pub(super) fn outputs(
    network: &dyn VisionLanguageModel,
    prompt: &Prepared,
    logits_every: i64,
) -> (Tensor, Tensor) {
    let images: Vec<&Tiles> = prompt.images.iter().collect();
    let features = network.image_features(&images);
    let embeds = network.embed_prompt(&prompt.text, &features);
    let hidden = network.decoder().hidden(&embeds);
    let logits = network.lm_head().forward(&hidden);
    let kept = logits.flip([0]).slice(0, None, None, logits_every);
    (hidden, kept)
}

fn forward(
    place: &Path,
    prompts: &[ChatPrompt],
    images: ImagesApart,
    case: &Case,
    logits_every: i64,
    report: &mut Report,
) {
    let _no_grad = tch::no_grad_guard();
    let expected = Recorded::open(&place.join("expected.safetensors"));
    let (processor, network, _) = open_network(place, Kind::Float, Purpose::Inference);
    let bfloat16 = case
        .bfloat16
        .map(|_| open_network(place, Kind::BFloat16, Purpose::Inference).1);
    let prompts = prompts.iter().map(|prompt| processor.prepare(prompt));
    let prompts: Vec<Prepared> = prompts.map(Result::unwrap).collect();
    let image = processor.chat().image_token();
    let mut other_ids = 0;
    let [mut hidden_apart, mut logits_apart]: [Apart; 2] = Default::default();
    let mut narrow_apart = Vec::new();
    for (index, prompt) in prompts.iter().enumerate() {
        let ids = expected.integers(&format!("ids.{index}"));
        other_ids += usize::from(!are_same(&prompt.text, image, &ids));
        let (hidden, found) = outputs(&*network, prompt, logits_every);
        hidden_apart.add(&hidden, &expected.tensor(&format!("hidden.{index}")));
        let wanted = expected.tensor(&format!("logits.{index}"));
        logits_apart.add(&found, &wanted);
        if let Some(network) = &bfloat16 {
            let found = outputs(&**network, prompt, logits_every).1;
            if found.size() == wanted.size() {
                narrow_apart.push((found - wanted).flatten(0, 1));
            }
        }
    }
    report.equal(
        format!("{}: token ids", case.title),
        other_ids,
        prompts.len(),
    );
    let mut lines = images(place, &prompts, &expected);
    lines.push(("decoder's hidden states", hidden_apart));
    lines.push(("logits", logits_apart));
    for (name, Apart(apart)) in lines {
        let holds = apart[0] <= BOUND;
        report.line(format!("{}: {name}", case.title), apart, "1e-4", holds);
    }
    half_precision(case, &narrow_apart, report);
}

/// Compares logits in bfloat16 with the reference's in float32, from which they are `apart`, prompt
/// by prompt.
fn half_precision(case: &Case, apart: &[Tensor], report: &mut Report) {
    let Some([spread, most]) = case.bfloat16.filter(|_| !apart.is_empty()) else {
        return;
    };
    let apart = Tensor::cat(apart, 0);
    let found = apart.square().mean(Kind::Double).sqrt().double_value(&[]);
    let bound = format!("the reference's own spread, {spread:.2e} (root of the mean square)");
    // Two independent roundings of equal size deviate from the exact value equally, up to
    // chance; the committed recording comes from another machine, whose products may round
    // differently.
    let chance = if std::env::var_os("OVCHAT_PARITY").is_some() {
        1.1
    } else {
        1.25
    };
    let holds = found <= chance * spread && greatest(&apart) <= 1.5 * most;
    let title = format!("{}: logits in bfloat16", case.title);
    report.line(title, [found, found / spread], bound, holds);
}

/// A checkpoint that is loaded for training and saved again has the same tensors under the same
/// names. With a new recording, the copy is kept for transformers to read.
fn written(folder: &Path, place: &Path, case: &Case, report: &mut Report) {
    let scratch = tempfile::tempdir().unwrap();
    let to = if std::env::var_os("OVCHAT_PARITY").is_some() {
        let kept = folder.join("../written");
        std::fs::create_dir_all(&kept).unwrap();
        kept.join(&case.folder)
    } else {
        scratch.path().join("written")
    };
    let _ = std::fs::remove_dir_all(&to);
    let checkpoint = Checkpoint::open(place).unwrap();
    let purpose = Purpose::TrainingState(Tower::Train.into());
    let (_, _, parameters) = open_network(place, Kind::Float, purpose);
    checkpoint.save(&to, &parameters).unwrap();

    let [before, after] = [place, &to].map(|folder| Weights::open(folder).unwrap());
    assert!(before.names().eq(after.names()), "{}", case.title);
    let differs = |name: &&str| {
        let [before, after] = [&before, &after].map(|from| from.read(name, Device::Cpu).unwrap());
        before.kind() != after.kind() || !before.equal(&after)
    };
    let different = before.names().filter(differs).count();
    let all = before.names().count();
    report.equal(
        format!("{}: tensors read and written", case.title),
        different,
        all,
    );
}

fn answers(place: &Path, prompts: &[ChatPrompt], how: &Sampling) -> Vec<Vec<Generation>> {
    let mut policy = NetworkPolicy::open(&spec(place.to_owned())).unwrap();
    let mut answers = vec![Vec::new(); prompts.len()];
    policy
        .sample(prompts, how, &mut |index, made| {
            answers[index] = made.unwrap_or_else(|fault| panic!("{fault}"));
            ControlFlow::Continue(())
        })
        .unwrap();
    answers
}

/// Greedy answers are equal up to the first position at which two tokens have equal logits.
fn greedy(folder: &Path, place: &Path, title: &str, report: &mut Report) {
    let prompts = prompts(folder, &place.join("greedy.json"));
    let expected = Recorded::open(&place.join("greedy.safetensors"));
    let how = Sampling {
        count: 1,
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        stop_strings: Vec::new(),
        stop_token_ids: Vec::new(),
        repetition_penalty: 1.0,
        max_new_tokens: 64,
    };
    let answers = answers(place, &prompts, &how);
    let mut different = 0;
    for (index, answers) in answers.iter().enumerate() {
        let ids = expected.integers(&format!("ids.{index}"));
        let gaps = expected.numbers(&format!("gaps.{index}"));
        let (same, ends) = agreement(&answers[0], &ids);
        different += usize::from(!ends && gaps.get(same).is_none_or(|gap| *gap > BOUND));
    }
    report.equal(
        format!("{title}: greedy answers of 64 tokens"),
        different,
        prompts.len(),
    );
}

/// Sampled answers equal those drawn with the same random numbers from the reference's logits, and
/// so do their log-probabilities.
pub(super) fn sampled(
    checkpoint: &Path,
    folder: &Path,
    prompts: &[ChatPrompt],
    title: &str,
    report: &mut Report,
) {
    let sampled: Sampled = json(&folder.join("sampled.json"));
    let expected = Recorded::open(&folder.join("sampled.safetensors"));
    let how = Sampling {
        count: sampled.count,
        temperature: sampled.temperature,
        top_p: sampled.top_p,
        top_k: 0,
        min_p: 0.0,
        stop_strings: Vec::new(),
        stop_token_ids: Vec::new(),
        repetition_penalty: 1.0,
        max_new_tokens: sampled.max_new_tokens,
    };
    let mut prompts = prompts.to_vec();
    for (prompt, &seed) in prompts.iter_mut().zip(&sampled.seeds) {
        prompt.seed = seed;
    }
    let answers = answers(checkpoint, &prompts, &how);
    let (mut different, mut all) = (0, 0);
    let mut apart = Apart::default();
    for (index, answers) in answers.iter().enumerate() {
        for (number, answer) in answers.iter().enumerate() {
            let ids = expected.integers(&format!("ids.{index}.{number}"));
            let margins = expected.numbers(&format!("margins.{index}.{number}"));
            let (same, ends) = agreement(answer, &ids);
            different +=
                usize::from(!ends && margins.get(same).is_none_or(|margin| *margin > 1e-5));
            all += 1;
            let logps = expected.tensor(&format!("logps.{index}.{number}"));
            let found = Tensor::from_slice(&answer.token_logps[..same]);
            apart.add(&found, &logps.narrow(0, 0, same as i64));
        }
    }
    report.equal(format!("{title}: sampled answers"), different, all);
    let holds = apart.0[0] <= BOUND;
    report.line(format!("{title}: token_logps"), apart.0, "1e-4", holds);
}

/// The length of the common prefix of an answer and the expected ids, and true if they are equal.
fn agreement(answer: &Generation, expected: &[i64]) -> (usize, bool) {
    let found = &answer.token_ids;
    let pairs = found.iter().zip(expected);
    let same = pairs
        .take_while(|(one, two)| i64::from(**one) == **two)
        .count();
    (same, same == expected.len() && same == found.len())
}
