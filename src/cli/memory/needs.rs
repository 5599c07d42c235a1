//! What a stage needs of memory, by its model's config and the rows that were counted.

use std::num::NonZeroU32;

use crate::tokens::TokenCounts;
use ovchat_models::checkpoint::{
    AtOnce, IMAGES_AHEAD, IMAGES_AT_ONCE_MAX, LlavaOnevisionConfig, LlavaRlhfConfig,
    PACK_TOKENS_MAX, Sizes, TrainingSizes, elements, judge_elements, learned_logits,
    size_in_words as size,
};
use ovchat_models::preprocess::{Anyres, ImageProcessorConfig};
use ovchat_models::{
    Checkpointing, LlavaOnevisionSpec, Mode, ModelSpec, Optimizer, Part, Room, Tower, Trained,
};
use ovchat_pipeline::config::{Plan, PlannedStage};
use ovchat_pipeline::stages::{
    ModelName, Sample, StageSpec, TableName, TrainDpo, TrainReward, TrainSft,
};

/// Bytes of a number, and the precision's name.
pub type Precision = (u64, &'static str);

/// Answers of a pair, and how long they are where the pipeline does not say.
const ANSWERS: usize = 2;
const ANSWER_TOKENS: usize = 512;

/// What a stage needs, before it is known where.
pub struct Needs {
    pub precision: &'static str,
    pub items: Vec<(&'static str, u64, String)>,
    pub model: ModelName,
    /// The most that it takes in a room, and why it has no place there.
    pub peak: Box<dyn Fn(Room) -> (u64, Option<Refusal>)>,
    pub worst: String,
    /// Pixels of the pictures that wait for the network.
    pub pixels: u64,
}

/// The refusal of a stage that has too little memory or context.
pub struct Refusal {
    /// The amount needed, by item, and the amount available.
    pub cause: String,
    /// The way out.
    pub help: String,
}

impl Refusal {
    /// That a model's weights alone are too large.
    fn of_weights(model: &ModelName, weights: u64, room: Room, help: &str) -> Option<Self> {
        (weights > room.bytes).then(|| Self {
            cause: format!(
                "the weights of `{model}` alone take {}, and it may use {}",
                size(weights),
                size(room.bytes)
            ),
            help: help.to_owned(),
        })
    }

    /// That what a training needs whatever its batches are is too large.
    fn of_state(model: &ModelName, sizes: &TrainingSizes, room: Room, help: &str) -> Option<Self> {
        (sizes.state() > room.bytes).then(|| Self {
            cause: format!(
                "weights ({}), gradients ({}) and optimizer moments ({}) of `{model}` alone take {}, and \
                 it may use {}",
                size(sizes.weights),
                size(sizes.gradients),
                size(sizes.moments),
                size(sizes.state()),
                size(room.bytes)
            ),
            help: help.to_owned(),
        })
    }

    /// In one sentence.
    pub fn in_one(&self) -> String {
        format!("{}; {}", self.cause, self.help)
    }
}

/// The advice that gives a model more memory.
fn more_memory(plan: &Plan, model: &ModelName) -> String {
    match plan.models[model].memory_gb() {
        Some(limit) => format!(
            "raise `memory_gb` of `{model}`, which is {}, or use a device with more memory",
            f64::from(limit)
        ),
        None => format!(
            "use a device with more memory, or set `memory_gb` of `{model}`: left out, it is nine tenths \
             of a GPU's memory or half of the machine's"
        ),
    }
}

/// The model of a stage of which it is known what it takes: the one that is opened.
pub fn computing<'a>(plan: &'a Plan, stage: &'a PlannedStage) -> Option<&'a ModelName> {
    match &stage.spec {
        StageSpec::Sample(sample) => Some(&sample.model),
        StageSpec::Score(score) => Some(plan.backing_model(&score.judge)),
        StageSpec::Compare(compare) => Some(plan.backing_model(&compare.judge)),
        StageSpec::TrainDpo(train) => Some(&train.model),
        StageSpec::TrainSft(train) => Some(&train.model),
        StageSpec::TrainReward(train) => Some(&train.model),
        _ => None,
    }
}

pub fn of_stage(
    plan: &Plan,
    stage: &PlannedStage,
    tokens: &[TokenCounts],
    precision: Precision,
) -> Option<Needs> {
    let counted = tokens.iter().find(|one| one.is_of(stage.name.as_str()));
    let policy = |model: &ModelName| match plan.models[model].clone().opened() {
        ModelSpec::LlavaOnevision(spec) => Some(spec),
        _ => None,
    };
    let judged = |judge: &ModelName, part: NonZeroU32, answers: usize| {
        let Some(asking) = plan.models[judge].asking() else {
            return of_judge(plan, judge, precision);
        };
        let model = plan.backing_model(judge);
        // Both answers of a pair are asked about twice, with each in front once.
        let (shown, asks) = match asking.mode {
            Mode::Pointwise => (1, answers),
            Mode::Pairwise => (2, answers * (answers - 1)),
        };
        let writing = Writing {
            model,
            answers: 1,
            new: asking.max_new_tokens.0.get() as usize,
            part: part.get() as usize * asks,
            beside: shown * answer_tokens(plan),
        };
        of_writing(plan, &writing, &policy(model)?, counted, precision)
    };
    match &stage.spec {
        StageSpec::Sample(sample) => {
            let writing = Writing {
                model: &sample.model,
                answers: sample.count.get() as usize,
                new: sample.max_new_tokens.get() as usize,
                part: sample.part.get() as usize,
                beside: 0,
            };
            of_writing(plan, &writing, &policy(&sample.model)?, counted, precision)
        }
        StageSpec::Score(score) => {
            let count = sampled(plan).map_or(ANSWERS, |(_, sample)| sample.count.get() as usize);
            judged(&score.judge, score.part, count)
        }
        StageSpec::Compare(compare) => judged(&compare.judge, compare.part, ANSWERS),
        StageSpec::TrainDpo(train) => match &plan.models[&train.model] {
            ModelSpec::LlavaOnevision(spec) => of_training(plan, train, spec, tokens, precision),
            _ => None,
        },
        StageSpec::TrainSft(train) => of_lessons(plan, train, counted),
        StageSpec::TrainReward(train) => of_reward_training(plan, train, counted),
        _ => None,
    }
}

/// The stage that answers prompts.
fn sampled(plan: &Plan) -> Option<(&TableName, &Sample)> {
    plan.stages.iter().find_map(|stage| match &stage.spec {
        StageSpec::Sample(sample) => Some((&stage.name, sample)),
        _ => None,
    })
}

/// How long its answers may become.
fn answer_tokens(plan: &Plan) -> usize {
    sampled(plan).map_or(ANSWER_TOKENS, |(_, sample)| {
        sample.max_new_tokens.get() as usize
    })
}

/// What a policy writes.
struct Writing<'a> {
    model: &'a ModelName,
    /// Answers to each prompt, and how long they may become.
    answers: usize,
    new: usize,
    /// Prompts that are there at once.
    part: usize,
    /// Tokens of a prompt beside those that were counted.
    beside: usize,
}

fn of_writing(
    plan: &Plan,
    writing: &Writing<'_>,
    spec: &LlavaOnevisionSpec,
    counted: Option<&TokenCounts>,
    precision: Precision,
) -> Option<Needs> {
    let config = LlavaOnevisionConfig::open(&spec.weights).ok()?;
    let (element, precision) = precision;
    let sizes = Sizes::new(elements(&config), &config.text_config, element);
    let &Writing {
        answers,
        part,
        beside,
        ..
    } = writing;
    let new = answers * writing.new;
    let [image, tiles] = largest(&config, spec).unwrap_or_default();
    let (longest, worst) = longest(counted, image);
    let longest = longest + beside;
    let of_tokens = format!(
        "{} a token; the largest picture ({image} tokens) and its {answers} answers",
        size(sizes.token)
    );
    let taken = move |rows: usize, tokens: usize, read: usize| {
        sizes.weights
            + rows as u64 * sizes.row
            + tokens as u64 * sizes.token
            + read as u64 * sizes.read
    };
    let (model, help) = (writing.model.clone(), more_memory(plan, writing.model));
    let peak = move |room: Room| {
        let at_once = AtOnce::in_room(room, sizes);
        let rows = at_once.rows.min(part * answers).max(answers);
        let prompts = rows.div_ceil(answers).min(part);
        let tokens = (prompts * (longest + new))
            .min(at_once.tokens)
            .max(longest + new);
        let read = at_once.read_tokens.min(prompts * longest).max(longest);
        let peak =
            taken(rows, tokens, read).min(room.bytes.max(taken(answers, longest + new, longest)));
        let refusal = Refusal::of_weights(&model, sizes.weights, room, &help);
        (peak, refusal)
    };
    Some(Needs {
        precision,
        items: vec![
            ("weights", sizes.weights, String::new()),
            (
                "keys and values",
                sizes.token * (image + new) as u64,
                of_tokens,
            ),
            ("logits", sizes.row, "an answer that grows".to_owned()),
        ],
        model: writing.model.clone(),
        peak: Box::new(peak),
        worst,
        pixels: pixels(&config, tiles),
    })
}

fn of_judge(plan: &Plan, judge: &ModelName, precision: Precision) -> Option<Needs> {
    let ModelSpec::LlavaRlhf(spec) = &plan.models[judge] else {
        return None;
    };
    let config = LlavaRlhfConfig::open(spec).ok()?;
    let (element, precision) = precision;
    let sizes = Sizes {
        row: 0,
        ..Sizes::new(judge_elements(&config), &config.text_config, element)
    };
    let pixels = judge_pixels(&config);
    let (model, help) = (judge.clone(), more_memory(plan, judge));
    let peak = move |room: Room| {
        let at_once = AtOnce::in_room(room, sizes);
        let tokens = at_once.read_tokens.min(at_once.tokens) as u64;
        let refusal = Refusal::of_weights(&model, sizes.weights, room, &help);
        (sizes.weights + tokens * (sizes.read + sizes.token), refusal)
    };
    Some(Needs {
        precision,
        items: vec![
            ("weights", sizes.weights, String::new()),
            ("keys and values", sizes.token, "a token".to_owned()),
            ("activations", sizes.read, "a token that is read".to_owned()),
        ],
        model: judge.clone(),
        peak: Box::new(peak),
        worst: "every picture takes as much".to_owned(),
        pixels,
    })
}

fn of_training(
    plan: &Plan,
    stage: &TrainDpo,
    spec: &LlavaOnevisionSpec,
    tokens: &[TokenCounts],
    precision: Precision,
) -> Option<Needs> {
    let config = LlavaOnevisionConfig::open(&spec.weights).ok()?;
    let (element, precision) = precision;
    let sizes = stage.sizes(&config, element);
    let mut items = vec![
        (
            "weights",
            sizes.weights,
            "those that are trained in float32".to_owned(),
        ),
        ("gradients", sizes.gradients, String::new()),
        ("moments", sizes.moments, "of AdamW".to_owned()),
    ];
    let [image, tiles] = largest(&config, spec).unwrap_or_default();
    let sampled = sampled(plan);
    let new = ANSWERS * answer_tokens(plan);
    let largest_pair = image + new;
    let remark = format!(
        "the largest picture and two answers, {largest_pair} tokens and {tiles} tiles; {} where layers \
         are computed again",
        size(sizes.computed_again(largest_pair, tiles))
    );
    items.push(("activations", sizes.remembered(largest_pair, tiles), remark));
    let counted =
        sampled.and_then(|(table, _)| tokens.iter().find(|one| one.is_of(table.as_str())));
    let (longest, worst) = longest(counted, image);
    let checkpointing = stage.activation_checkpointing;
    let pair = longest + new;
    // Short pairs go side by side.
    let at_once = pair.max(PACK_TOKENS_MAX.min(pair * 8));
    let tiles_at_once = tiles * at_once.div_ceil(pair.max(1));
    let model = stage.model.clone();
    let help = format!(
        "train an adapter (`lora`) or fewer parts (`train`), use `optimizer: adamw_8bit`, or {}",
        more_memory(plan, &model)
    );
    let peak = move |room: Room| {
        let has_room = sizes.has_room(room.bytes, at_once, tiles_at_once);
        let activations = match checkpointing {
            Checkpointing::Never => sizes.remembered(at_once, tiles_at_once),
            Checkpointing::Auto if has_room => sizes.remembered(at_once, tiles_at_once),
            Checkpointing::Auto | Checkpointing::Always => {
                sizes.computed_again(at_once, tiles_at_once)
            }
        };
        let refusal = Refusal::of_state(&model, &sizes, room, &help);
        (sizes.state() + activations, refusal)
    };
    Some(Needs {
        precision,
        items,
        model: stage.model.clone(),
        peak: Box::new(peak),
        worst,
        pixels: pixels(&config, tiles),
    })
}

fn of_lessons(plan: &Plan, stage: &TrainSft, counted: Option<&TokenCounts>) -> Option<Needs> {
    let (sizes, text, image, tiles, pixels) = match &plan.models[&stage.model] {
        ModelSpec::LlavaOnevision(spec) => {
            let config = LlavaOnevisionConfig::open(&spec.weights).ok()?;
            let parts = Part::ALL.into_iter();
            let parts =
                parts.filter(|part| stage.tower == Tower::Train || *part != Part::VisionTower);
            let trained = Trained::Parts(parts.map(|part| (part, None)).collect());
            let [image, tiles] = largest(&config, spec).unwrap_or_default();
            let sizes = TrainingSizes::new(&config, &trained, Optimizer::Adamw, 4);
            let pixels = pixels(&config, tiles);
            (sizes, config.text_config, image, tiles, pixels)
        }
        ModelSpec::LlavaRlhf(spec) => {
            let config = LlavaRlhfConfig::open(spec).ok()?;
            let sizes = TrainingSizes::of_base(&config, stage.tower);
            let pixels = judge_pixels(&config);
            (
                sizes,
                config.text_config,
                config.vision_config.patches(),
                1,
                pixels,
            )
        }
        _ => return None,
    };
    let (longest, worst) = longest(counted, image);
    let at_once = side_by_side(longest, stage.batch_prompts);
    let learned = counted.map_or(ANSWER_TOKENS, |counted| counted.learned_of(at_once));
    let remark = format!("of {learned} tokens that are learned at once");
    let steps = Steps {
        model: &stage.model,
        help: more_memory(plan, &stage.model),
        sizes,
        tokens: at_once,
        tiles: tiles * at_once.div_ceil(longest.max(1)),
        logits: Some((learned_logits(&text, learned), remark)),
        worst,
        pixels,
    };
    Some(steps.needs())
}

fn of_reward_training(
    plan: &Plan,
    stage: &TrainReward,
    counted: Option<&TokenCounts>,
) -> Option<Needs> {
    let ModelSpec::LlavaRlhf(spec) = &plan.models[&stage.model] else {
        return None;
    };
    let config = LlavaRlhfConfig::open(spec).ok()?;
    let rank = config.adapter.as_ref().map(|adapter| adapter.r);
    let rank = rank.unwrap_or(stage.rank.get() as usize);
    let sizes = TrainingSizes::of_adapter(&config, rank);
    let image = config.vision_config.patches();
    let (longest, worst) = if counted.is_some() {
        longest(counted, image)
    } else {
        let pair = image + ANSWERS * ANSWER_TOKENS;
        let words = "a picture and two answers of";
        (
            pair,
            format!("{words} {ANSWER_TOKENS} tokens, no pair was counted yet"),
        )
    };
    let steps = Steps {
        model: &stage.model,
        help: more_memory(plan, &stage.model),
        sizes,
        tokens: side_by_side(longest, stage.batch_pairs),
        tiles: 0,
        logits: None,
        worst,
        pixels: judge_pixels(&config),
    };
    Some(steps.needs())
}

/// Tokens of rows that go side by side; short ones do.
fn side_by_side(longest: usize, rows: NonZeroU32) -> usize {
    let all = longest.saturating_mul(rows.get() as usize);
    longest.max(PACK_TOKENS_MAX.min(all))
}

/// A training in float32 that remembers everything.
struct Steps<'a> {
    model: &'a ModelName,
    /// The advice that gives it more memory.
    help: String,
    sizes: TrainingSizes,
    /// What goes side by side.
    tokens: usize,
    tiles: usize,
    /// What it takes beside state and activations, and what that is.
    logits: Option<(u64, String)>,
    worst: String,
    pixels: u64,
}

impl Steps<'_> {
    fn needs(self) -> Needs {
        let sizes = self.sizes;
        let activations = sizes.remembered(self.tokens, self.tiles);
        let remark = format!("of {} tokens at once", self.tokens);
        let mut items = vec![
            ("weights", sizes.weights, String::new()),
            ("gradients", sizes.gradients, String::new()),
            ("moments", sizes.moments, "of AdamW".to_owned()),
            ("activations", activations, remark),
        ];
        let beside = self.logits.as_ref().map_or(0, |(bytes, _)| *bytes);
        items.extend(self.logits.map(|(bytes, remark)| ("logits", bytes, remark)));
        let (model, help) = (self.model.clone(), self.help);
        let peak = move |room: Room| {
            let refusal = Refusal::of_state(&model, &sizes, room, &help);
            (sizes.state() + activations + beside, refusal)
        };
        Needs {
            precision: "float32",
            items,
            model: self.model.clone(),
            peak: Box::new(peak),
            worst: self.worst,
            pixels: self.pixels,
        }
    }
}

/// The tokens of the longest row, and which it is; of the largest picture where none was counted.
fn longest(counted: Option<&TokenCounts>, image: usize) -> (usize, String) {
    match counted {
        Some(counted) => (counted.longest(), counted.worst()),
        None => (
            image,
            format!("the largest picture takes {image} tokens, no prompt was counted yet"),
        ),
    }
}

/// Tokens and tiles of the picture that has most.
fn largest(config: &LlavaOnevisionConfig, spec: &LlavaOnevisionSpec) -> Option<[usize; 2]> {
    let side = config.vision_config.image_size;
    let anyres = Anyres::new(
        config,
        &ImageProcessorConfig::open_onevision(&spec.weights, side).ok()?,
    );
    let sizes = config.image_grid_pinpoints.iter();
    let packings = sizes.map(|&[height, width]| anyres.single(height, width));
    packings
        .map(|packing| [packing.tokens(), packing.tiles()])
        .max()
}

/// Bytes of the pixels of pictures that wait for the network, in float32, each of so many tiles.
fn pixels(config: &LlavaOnevisionConfig, tiles: usize) -> u64 {
    let vision = &config.vision_config;
    let tile = 4 * vision.num_channels * vision.image_size.pow(2);
    ((IMAGES_AHEAD + IMAGES_AT_ONCE_MAX) * tiles * tile) as u64
}

/// The same for a reward model, which takes a picture as a whole.
fn judge_pixels(config: &LlavaRlhfConfig) -> u64 {
    let vision = &config.vision_config;
    let image = 4 * vision.num_channels * vision.image_size.pow(2);
    ((IMAGES_AHEAD + IMAGES_AT_ONCE_MAX) * image) as u64
}
