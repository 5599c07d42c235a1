//! The memory needs of a stage, computed from its model's config and the token counts.

use std::num::NonZeroU32;

use crate::tokens::TokenCounts;
use ovchat_models::checkpoint::{
    AtOnce, IMAGES_AHEAD, IMAGES_AT_ONCE_MAX, LlavaRlhfConfig, Sizes, TrainingSizes, VisionConfig,
    elements, judge_elements, learned_logits, pack_tokens_max, size_in_words as size,
};
use ovchat_models::{
    Architecture, Checkpointing, Mode, ModelSpec, Room, VisionLanguageSpec, architectures,
};
use ovchat_pipeline::config::{Plan, PlannedStage};
use ovchat_pipeline::stages::{
    ModelName, Sample, StageSpec, TableName, TrainDpo, TrainReward, TrainSft,
};

/// The bytes of an element, and the name of the precision.
pub type Precision = (u64, &'static str);

/// The number of responses of a pair, and their assumed length if the pipeline does not set one.
const ANSWERS: usize = 2;
const ANSWER_TOKENS: usize = 512;

/// The memory needs of a stage, independent of the machine.
pub struct Needs {
    pub precision: &'static str,
    pub items: Vec<(&'static str, u64, String)>,
    pub model: ModelName,
    /// Returns the peak memory with a given amount available, and the refusal if it does not fit.
    pub peak: Box<dyn Fn(Room) -> (u64, Option<Refusal>)>,
    pub worst: String,
    /// The bytes of the pixels of images that wait for the network.
    pub pixels: u64,
}

/// The refusal of a stage that has too little memory or context.
pub struct Refusal {
    /// The amount needed, by item, and the amount available.
    pub cause: String,
    /// The advice for fixing it.
    pub help: String,
}

impl Refusal {
    /// Returns a refusal if a model's weights alone do not fit.
    fn of_weights(model: &ModelName, weights: u64, room: Room, help: &str) -> Option<Self> {
        (weights > room.bytes).then(|| Self {
            cause: format!(
                "the weights of `{model}` alone take {}, but only {} is available",
                size(weights),
                size(room.bytes)
            ),
            help: help.to_owned(),
        })
    }

    /// Returns a refusal if the training state, which is independent of the batches, does not fit.
    fn of_state(model: &ModelName, sizes: &TrainingSizes, room: Room, help: &str) -> Option<Self> {
        (sizes.state() > room.bytes).then(|| Self {
            cause: format!(
                "weights ({}), gradients ({}) and optimizer moments ({}) of `{model}` alone take {}, but \
                 only {} is available",
                size(sizes.weights),
                size(sizes.gradients),
                size(sizes.moments),
                size(sizes.state()),
                size(room.bytes)
            ),
            help: help.to_owned(),
        })
    }

    /// Returns the refusal as one sentence.
    pub fn in_one(&self) -> String {
        format!("{}; {}", self.cause, self.help)
    }
}

/// Returns the advice that gives a model more memory.
fn more_memory(plan: &Plan, model: &ModelName) -> String {
    match plan.models[model].memory_gb() {
        Some(limit) => format!(
            "raise `memory_gb` of `{model}` (now {}), or use a device with more memory",
            f64::from(limit)
        ),
        None => format!(
            "use a device with more memory, or set `memory_gb` of `{model}` (default: 90 % \
             of the GPU's memory, or half of the machine's)"
        ),
    }
}

/// Returns the model that a stage opens, if its memory needs are known.
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

/// Returns the largest number of frames of a video that the pipeline loads; `None` without videos.
pub fn video_frames(plan: &Plan) -> Option<usize> {
    plan.all()
        .filter_map(|stage| stage.spec.video_frames())
        .max()
}

pub fn of_stage(
    plan: &Plan,
    frames: Option<usize>,
    stage: &PlannedStage,
    tokens: &[TokenCounts],
    precision: Precision,
) -> Option<Needs> {
    let counted = tokens.iter().find(|one| one.is_of(stage.name.as_str()));
    let policy = |model: &ModelName| {
        let opened = plan.models[model].clone().opened();
        opened.vision_language().cloned()
    };
    let judged = |judge: &ModelName, part: NonZeroU32, answers: usize| {
        let Some(prompt_settings) = plan.models[judge].prompt_settings() else {
            return of_judge(plan, judge, precision);
        };
        let model = plan.backing_model(judge);
        // Both responses of a pair are judged twice, once in each order.
        let (shown, asks) = match prompt_settings.mode {
            Mode::Pointwise => (1, answers),
            Mode::Pairwise => (2, answers * (answers - 1)),
            Mode::Against => (2, answers),
        };
        let writing = Writing {
            model,
            answers: 1,
            new: prompt_settings.max_new_tokens.0.get() as usize,
            part: [part.get() as usize * asks; 2],
            beside: shown * answer_tokens(plan),
        };
        of_writing(plan, frames, &writing, &policy(model)?, counted, precision)
    };
    match &stage.spec {
        StageSpec::Sample(sample) => {
            let writing = Writing {
                model: &sample.model,
                answers: sample.count.get() as usize,
                new: sample.max_new_tokens.get() as usize,
                part: [false, true].map(|on_gpu| sample.part(on_gpu).get() as usize),
                beside: 0,
            };
            of_writing(
                plan,
                frames,
                &writing,
                &policy(&sample.model)?,
                counted,
                precision,
            )
        }
        StageSpec::Score(score) => {
            let count = sampled(plan).map_or(ANSWERS, |(_, sample)| sample.count.get() as usize);
            judged(&score.judge, score.part, count)
        }
        StageSpec::Compare(compare) => judged(&compare.judge, compare.part, ANSWERS),
        StageSpec::TrainDpo(train) => {
            let spec = plan.models[&train.model].vision_language()?;
            of_training(plan, frames, train, spec, tokens, precision)
        }
        StageSpec::TrainSft(train) => of_examples(plan, frames, train, counted, precision),
        StageSpec::TrainReward(train) => of_reward_training(plan, train, counted, precision),
        _ => None,
    }
}

/// Returns the stage that samples responses.
fn sampled(plan: &Plan) -> Option<(&TableName, &Sample)> {
    plan.stages.iter().find_map(|stage| match &stage.spec {
        StageSpec::Sample(sample) => Some((&stage.name, sample)),
        _ => None,
    })
}

/// Returns the maximum length of its responses.
fn answer_tokens(plan: &Plan) -> usize {
    sampled(plan).map_or(ANSWER_TOKENS, |(_, sample)| {
        sample.max_new_tokens.get() as usize
    })
}

/// The text that a policy generates.
struct Writing<'a> {
    model: &'a ModelName,
    /// The number of responses per prompt, and their maximum length.
    answers: usize,
    new: usize,
    /// The number of prompts in a part, on a CPU and on a GPU.
    part: [usize; 2],
    /// The tokens of a prompt in addition to the counted ones.
    beside: usize,
}

fn of_writing(
    plan: &Plan,
    frames: Option<usize>,
    writing: &Writing<'_>,
    spec: &VisionLanguageSpec,
    counted: Option<&TokenCounts>,
    precision: Precision,
) -> Option<Needs> {
    let architecture = architectures::open(&spec.weights).ok()?;
    let (element, precision) = precision;
    let sizes = Sizes::new(
        elements(&*architecture),
        architecture.text_config(),
        element,
    );
    let &Writing {
        answers,
        part,
        beside,
        ..
    } = writing;
    let new = answers * writing.new;
    let largest = Largest::of(frames, &*architecture);
    let (image, tiles) = (largest.tokens, largest.tiles);
    let (longest, worst) = longest(counted, &largest);
    let longest = longest + beside;
    // A judge reads each prompt several times.
    let counted_all = counted.and_then(TokenCounts::rows);
    let all = counted_all.filter(|_| beside == 0);
    let of_tokens = format!(
        "{} per token, for the largest {} ({image} tokens) and its {answers} responses",
        size(sizes.token),
        largest.kind
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
        let part = part[usize::from(room.on_gpu)];
        let part = all.map_or(part, |all| part.min(all)).max(1);
        let rows = at_once.rows.min(part * answers).max(answers);
        let prompts = rows.div_ceil(answers).min(part);
        let fits = |tokens: usize| tokens.min(at_once.tokens).max(longest + new);
        let read = at_once.read_tokens.min(prompts * longest).max(longest);
        let peak = if prompts == part {
            // All prompts are read before the first answer grows.
            let reading = taken(0, fits(prompts * longest), read);
            reading.max(taken(rows, fits(prompts * (longest + new)), 0))
        } else {
            taken(rows, fits(prompts * (longest + new)), read)
        };
        let peak = peak.min(room.bytes.max(taken(answers, longest + new, longest)));
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
            ("logits", sizes.row, "per response in progress".to_owned()),
        ],
        model: writing.model.clone(),
        peak: Box::new(peak),
        worst,
        pixels: pixels(architecture.vision_config(), tiles),
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
    let pixels = pixels(&config.vision_config, 1);
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
            ("keys and values", sizes.token, "per token".to_owned()),
            (
                "activations",
                sizes.read,
                "per token of a prompt".to_owned(),
            ),
        ],
        model: judge.clone(),
        peak: Box::new(peak),
        worst: "every image takes the same".to_owned(),
        pixels,
    })
}

fn of_training(
    plan: &Plan,
    frames: Option<usize>,
    stage: &TrainDpo,
    spec: &VisionLanguageSpec,
    tokens: &[TokenCounts],
    precision: Precision,
) -> Option<Needs> {
    let architecture = architectures::open(&spec.weights).ok()?;
    let (element, precision) = precision;
    let sizes = stage.sizes(&*architecture, element);
    let mut items = vec![
        (
            "weights",
            sizes.weights,
            "trained weights in float32".to_owned(),
        ),
        ("gradients", sizes.gradients, String::new()),
        ("moments", sizes.moments, "AdamW".to_owned()),
    ];
    let largest = Largest::of(frames, &*architecture);
    let (image, tiles) = (largest.tokens, largest.tiles);
    let sampled = sampled(plan);
    let new = ANSWERS * answer_tokens(plan);
    let largest_pair = image + new;
    let remark = format!(
        "for the largest {} and two responses ({largest_pair} tokens, {tiles} tiles); {} with layers \
         recomputed",
        largest.kind,
        size(sizes.computed_again(largest_pair, tiles))
    );
    items.push(("activations", sizes.remembered(largest_pair, tiles), remark));
    let counted =
        sampled.and_then(|(table, _)| tokens.iter().find(|one| one.is_of(table.as_str())));
    let (longest, worst) = longest(counted, &largest);
    let checkpointing = stage.activation_checkpointing;
    let pair = longest + new;
    let model = stage.model.clone();
    let help = format!(
        "train an adapter (`lora`) or fewer parts (`train`), use `optimizer: adamw_8bit`, or {}",
        more_memory(plan, &model)
    );
    let peak = move |room: Room| {
        // Short pairs are packed.
        let at_once = pair.max(pack_tokens_max(room.on_gpu).min(pair * 8));
        let tiles_at_once = tiles * at_once.div_ceil(pair.max(1));
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
        pixels: pixels(architecture.vision_config(), tiles),
    })
}

fn of_examples(
    plan: &Plan,
    frames: Option<usize>,
    stage: &TrainSft,
    counted: Option<&TokenCounts>,
    precision: Precision,
) -> Option<Needs> {
    let (element, _) = precision;
    let spec = &plan.models[&stage.model];
    let (sizes, text, largest, pixels) = if let Some(spec) = spec.vision_language() {
        let architecture = architectures::open(&spec.weights).ok()?;
        let largest = Largest::of(frames, &*architecture);
        let sizes = TrainingSizes::of_sft(&*architecture, stage.tower, element);
        let pixels = pixels(architecture.vision_config(), largest.tiles);
        (sizes, *architecture.text_config(), largest, pixels)
    } else if let ModelSpec::LlavaRlhf(spec) = spec {
        let config = LlavaRlhfConfig::open(spec).ok()?;
        let sizes = TrainingSizes::of_base(&config, stage.tower, element);
        let pixels = pixels(&config.vision_config, 1);
        let largest = Largest::square(config.vision_config.patches());
        (sizes, config.text_config, largest, pixels)
    } else {
        return None;
    };
    let (longest, worst) = longest(counted, &largest);
    let at_once = side_by_side(longest, stage.batch_prompts, false);
    let learned = counted.map_or(ANSWER_TOKENS, |counted| counted.learned_of(at_once));
    let remark = format!("for {learned} trained tokens at once");
    let steps = Steps {
        model: &stage.model,
        help: more_memory(plan, &stage.model),
        precision,
        sizes,
        longest,
        rows: stage.batch_prompts,
        tiles: largest.tiles,
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
    precision: Precision,
) -> Option<Needs> {
    let ModelSpec::LlavaRlhf(spec) = &plan.models[&stage.model] else {
        return None;
    };
    let config = LlavaRlhfConfig::open(spec).ok()?;
    let rank = config.adapter.as_ref().map(|adapter| adapter.r);
    let rank = rank.unwrap_or(stage.rank.get() as usize);
    let sizes = TrainingSizes::of_adapter(&config, rank, precision.0);
    let image = config.vision_config.patches();
    let (longest, worst) = if counted.is_some() {
        longest(counted, &Largest::square(image))
    } else {
        let pair = image + ANSWERS * ANSWER_TOKENS;
        let words = "an image and two responses of";
        (
            pair,
            format!("{words} {ANSWER_TOKENS} tokens (no pairs to count yet)"),
        )
    };
    let steps = Steps {
        model: &stage.model,
        help: more_memory(plan, &stage.model),
        precision,
        sizes,
        longest,
        rows: stage.batch_pairs,
        tiles: 0,
        logits: None,
        worst,
        pixels: pixels(&config.vision_config, 1),
    };
    Some(steps.needs())
}

/// Returns the tokens of a packed batch of rows; short rows are packed.
fn side_by_side(longest: usize, rows: NonZeroU32, on_gpu: bool) -> usize {
    let all = longest.saturating_mul(rows.get() as usize);
    longest.max(pack_tokens_max(on_gpu).min(all))
}

/// A training that computes layers again where its activations do not fit.
struct Steps<'a> {
    model: &'a ModelName,
    /// The advice that gives it more memory.
    help: String,
    precision: Precision,
    sizes: TrainingSizes,
    /// The tokens and tiles of the longest row, and the rows of a batch.
    longest: usize,
    tiles: usize,
    rows: NonZeroU32,
    /// The memory in addition to state and activations, and a remark.
    logits: Option<(u64, String)>,
    worst: String,
    pixels: u64,
}

impl Steps<'_> {
    fn needs(self) -> Needs {
        let (sizes, longest, rows, tiles) = (self.sizes, self.longest, self.rows, self.tiles);
        let at_once = move |on_gpu: bool| {
            let tokens = side_by_side(longest, rows, on_gpu);
            (tokens, tiles * tokens.div_ceil(longest.max(1)))
        };
        let (tokens, tiles) = at_once(false);
        let again = size(sizes.computed_again(tokens, tiles));
        let remark = format!("for {tokens} tokens at once; {again} with layers recomputed");
        let mut items = vec![
            ("weights", sizes.weights, String::new()),
            ("gradients", sizes.gradients, String::new()),
            ("moments", sizes.moments, "AdamW".to_owned()),
            ("activations", sizes.remembered(tokens, tiles), remark),
        ];
        let beside = self.logits.as_ref().map_or(0, |(bytes, _)| *bytes);
        items.extend(self.logits.map(|(bytes, remark)| ("logits", bytes, remark)));
        let (model, help) = (self.model.clone(), self.help);
        let peak = move |room: Room| {
            let (tokens, tiles) = at_once(room.on_gpu);
            let activations = if sizes.has_room(room.bytes, tokens, tiles) {
                sizes.remembered(tokens, tiles)
            } else {
                sizes.computed_again(tokens, tiles)
            };
            let refusal = Refusal::of_state(&model, &sizes, room, &help);
            (sizes.state() + activations + beside, refusal)
        };
        Needs {
            precision: self.precision.1,
            items,
            model: self.model.clone(),
            peak: Box::new(peak),
            worst: self.worst,
            pixels: self.pixels,
        }
    }
}

/// The largest image or video that a prompt can have.
struct Largest {
    tokens: usize,
    tiles: usize,
    /// `image` or `video`.
    kind: &'static str,
}

impl Largest {
    /// An image of one tile, as reward models read it.
    fn square(tokens: usize) -> Self {
        Self {
            tokens,
            tiles: 1,
            kind: "image",
        }
    }

    /// The tokens of a video depend only on the number of its `frames`.
    fn of(frames: Option<usize>, architecture: &dyn Architecture) -> Self {
        let [tokens, tiles] = architecture.largest_image();
        match frames.map(|frames| architecture.video_packing(frames)) {
            Some(Ok(video)) if video.tokens() > tokens => Self {
                tokens: video.tokens(),
                tiles: tiles.max(video.tiles()),
                kind: "video",
            },
            Some(Ok(video)) => Self {
                tokens,
                tiles: tiles.max(video.tiles()),
                kind: "image",
            },
            _ => Self {
                tokens,
                tiles,
                ..Self::square(tokens)
            },
        }
    }
}

/// Returns the tokens of the longest row and its description; without counts, those of the largest
/// image.
fn longest(counted: Option<&TokenCounts>, largest: &Largest) -> (usize, String) {
    let Largest { tokens, kind, .. } = largest;
    match counted {
        Some(counted) => (counted.longest(), counted.worst()),
        None => (
            *tokens,
            format!("the largest {kind} takes {tokens} tokens (no prompts to count yet)"),
        ),
    }
}

/// Returns the bytes of the pixels of images that wait for the network, in float32, each with
/// `tiles` tiles.
fn pixels(vision: &VisionConfig, tiles: usize) -> u64 {
    let tile = 4 * vision.num_channels * vision.image_size.pow(2);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    ((IMAGES_AHEAD + IMAGES_AT_ONCE_MAX.min(threads)) * tiles * tile) as u64
}
