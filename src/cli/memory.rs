//! What the stages of a pipeline take of a device's memory, computed from the models' configs.

use std::fmt::Write as _;

use crate::config::{Plan, PlannedStage};
use crate::models::{DeviceSpec, Dtype, LlavaOnevision, ModelSpec};
use crate::prep::{Anyres, OnevisionCard, Processor, RewardCard, Sizes, elements, judge_elements};
use crate::stages::{Sample, StageSpec, TrainDpo};

/// Bytes of a number, and the precision's name.
type Precision = (u64, &'static str);

/// Answers to a prompt that are trained on, and how long they are where the pipeline does not say.
const ANSWERS: usize = 2;
const ANSWER_TOKENS: usize = 512;

/// What a stage takes: a title, and items with their bytes and remarks.
struct Taken {
    precision: &'static str,
    items: Vec<(&'static str, u64, String)>,
}

/// The items of each stage that opens a network; nothing for a model whose config can't be read, which
/// is what the check complains about.
pub fn render(plan: &Plan) -> String {
    let mut text = String::new();
    for stage in plan.all() {
        let Some(Taken { precision, items }) = of_stage(plan, stage) else {
            continue;
        };
        if text.is_empty() {
            text.push_str("\nmemory of the device, computed (one model is open at a time)\n");
        }
        writeln!(text, "  {} = {}, in {precision}", stage.name, stage.verb()).expect(ANY_TEXT);
        for (item, bytes, remark) in items {
            let line = format!("      {item:<18} {:>9}   {remark}", size(bytes));
            writeln!(text, "{}", line.trim_end()).expect(ANY_TEXT);
        }
    }
    text
}

const ANY_TEXT: &str = "a string takes any text";

fn of_stage(plan: &Plan, stage: &PlannedStage) -> Option<Taken> {
    match &stage.spec {
        StageSpec::Sample(sample) => match &plan.models[&sample.model] {
            ModelSpec::LlavaOnevision(spec) => of_sampling(sample, spec),
            _ => None,
        },
        StageSpec::Score(score) => of_judge(&plan.models[&score.judge]),
        StageSpec::Compare(compare) => of_judge(&plan.models[&compare.judge]),
        StageSpec::TrainDpo(train) => match &plan.models[&train.model] {
            ModelSpec::LlavaOnevision(spec) => of_training(plan, train, spec),
            _ => None,
        },
        _ => None,
    }
}

fn of_sampling(stage: &Sample, spec: &LlavaOnevision) -> Option<Taken> {
    let card = OnevisionCard::open(&spec.weights).ok()?;
    let (element, precision) = precision(spec.device, spec.dtype);
    let sizes = Sizes::new(elements(&card), &card.text_config, element);
    let answers = stage.count.get() as usize;
    let picture = largest(&card, spec).map_or(0, |[tokens, _]| tokens);
    let tokens = picture + answers * stage.max_new_tokens.get() as usize;
    let of_tokens = format!(
        "{} a token; the largest picture ({picture} tokens) and its {answers} answers",
        size(sizes.token)
    );
    Some(Taken {
        precision,
        items: vec![
            ("weights", sizes.weights, String::new()),
            ("keys and values", sizes.token * tokens as u64, of_tokens),
            ("logits", sizes.row, "an answer that grows".to_owned()),
        ],
    })
}

fn of_judge(spec: &ModelSpec) -> Option<Taken> {
    let ModelSpec::LlavaRlhf(judge) = spec else {
        return None;
    };
    let card = RewardCard::open(judge).ok()?;
    let (element, precision) = precision(judge.device, judge.dtype);
    let sizes = Sizes::new(judge_elements(&card), &card.text_config, element);
    Some(Taken {
        precision,
        items: vec![
            ("weights", sizes.weights, String::new()),
            ("keys and values", sizes.token, "a token".to_owned()),
            ("activations", sizes.read, "a token that is read".to_owned()),
        ],
    })
}

fn of_training(plan: &Plan, stage: &TrainDpo, spec: &LlavaOnevision) -> Option<Taken> {
    let card = OnevisionCard::open(&spec.weights).ok()?;
    let (element, precision) = precision(spec.device, spec.dtype);
    let sizes = stage.sizes(&card, element);
    let mut items = vec![
        (
            "weights",
            sizes.weights,
            "those that are trained in float32".to_owned(),
        ),
        ("gradients", sizes.gradients, String::new()),
        ("moments", sizes.moments, "of AdamW".to_owned()),
    ];
    if let Some([picture, tiles]) = largest(&card, spec) {
        let sampled = plan.all().find_map(|stage| match &stage.spec {
            StageSpec::Sample(sample) => Some(sample.max_new_tokens.get() as usize),
            _ => None,
        });
        let tokens = picture + ANSWERS * sampled.unwrap_or(ANSWER_TOKENS);
        let remark = format!(
            "the largest picture and two answers, {tokens} tokens and {tiles} tiles; {} where layers \
             are computed again",
            size(sizes.computed_again(tokens, tiles))
        );
        items.push(("activations", sizes.remembered(tokens, tiles), remark));
    }
    Some(Taken { precision, items })
}

/// What a model computes in: `auto` is bfloat16 on a GPU, which may be there or not.
fn precision(device: DeviceSpec, dtype: Dtype) -> Precision {
    match (device, dtype) {
        (_, Dtype::Float32) | (DeviceSpec::Cpu, Dtype::Auto) => (4, "float32"),
        (_, Dtype::Bfloat16) => (2, "bfloat16"),
        (_, Dtype::Auto) => (2, "bfloat16 (on a GPU)"),
    }
}

/// Tokens and tiles of the picture that has most.
fn largest(card: &OnevisionCard, spec: &LlavaOnevision) -> Option<[usize; 2]> {
    let side = card.vision_config.image_size;
    let anyres = Anyres::new(card, &Processor::open_onevision(&spec.weights, side).ok()?);
    let sizes = card.image_grid_pinpoints.iter();
    let packings = sizes.map(|&[height, width]| anyres.single(height, width));
    packings
        .map(|packing| [packing.tokens(), packing.tiles()])
        .max()
}

pub fn size(bytes: u64) -> String {
    match bytes as f64 {
        bytes if bytes >= 1e8 => format!("{:.1} GB", bytes / 1e9),
        bytes if bytes >= 1e5 => format!("{:.1} MB", bytes / 1e6),
        bytes => format!("{:.0} KB", bytes / 1e3),
    }
}
