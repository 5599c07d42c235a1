//! What the stages of a pipeline take of memory, computed from the models' configs and the prompts
//! that were counted, beside what there is here.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::tokens::Tokens;
use crate::config::{At, Complaint, KeyPath, Plan, PlannedStage};
use crate::models::{
    Checkpointing, DeviceSpec, Dtype, LlavaOnevision, ModelError, ModelLoader, ModelSpec, Room,
};
use crate::prep::{
    Anyres, AtOnce, OnevisionCard, PACK_TOKENS_MAX, PICTURES_AHEAD, PICTURES_AT_ONCE_MAX,
    Processor, RewardCard, Sizes, elements, judge_elements,
};
use crate::stages::{ModelName, Sample, StageSpec, TrainDpo};

/// Bytes of a number, and the precision's name.
type Precision = (u64, &'static str);

/// Answers to a prompt that are trained on, and how long they are where the pipeline does not say.
const ANSWERS: usize = 2;
const ANSWER_TOKENS: usize = 512;

/// What a stage takes.
pub struct Taken {
    table: String,
    verb: String,
    precision: &'static str,
    /// Parts of it with their bytes and remarks.
    items: Vec<(&'static str, u64, String)>,
    /// Where there is a device to ask, how it goes about it there.
    here: Option<Here>,
}

/// What a stage takes on this machine.
struct Here {
    room: Room,
    /// The most that the model and what is computed at once take on the device.
    peak: u64,
    /// The most that this process takes of the machine's memory, as far as it is known: what it takes
    /// as it is, what is on the CPU, pictures that wait.
    host: Option<u64>,
    /// The row that takes most, in words.
    worst: String,
    /// Why it can't be.
    refusal: Option<String>,
}

/// What a stage needs, before it is known where.
struct Needs {
    precision: &'static str,
    items: Vec<(&'static str, u64, String)>,
    model: ModelName,
    /// The most that it takes in a room, and why it has no place there.
    peak: Box<dyn Fn(Room) -> (u64, Option<String>)>,
    worst: String,
    /// Pixels of the pictures that wait for the network.
    pixels: u64,
}

/// What each stage takes that opens a network; nothing for a model whose config can't be read, which
/// is what the check complains about. Without a `loader` nothing is known of this machine.
pub fn of_plan(
    plan: &Plan,
    tokens: &[Tokens],
    loader: Option<&dyn ModelLoader>,
) -> Result<Vec<Taken>, ModelError> {
    let mut all = Vec::new();
    for stage in plan.all() {
        let Some(model) = computing(stage) else {
            continue;
        };
        let precision = precision(&plan.models[model], loader)?;
        let Some(needs) = of_stage(plan, stage, tokens, precision) else {
            continue;
        };
        let room = match loader {
            Some(loader) => loader.room(&plan.models[&needs.model])?,
            None => None,
        };
        let here = room.map(|room| {
            let (peak, refusal) = (needs.peak)(room);
            let on_host = if room.on_gpu { 0 } else { peak };
            Here {
                room,
                peak,
                host: resident().map(|now| now + on_host + needs.pixels),
                worst: needs.worst.clone(),
                refusal,
            }
        });
        all.push(Taken {
            table: stage.name.to_string(),
            verb: stage.verb().to_owned(),
            precision: needs.precision,
            items: needs.items,
            here,
        });
    }
    Ok(all)
}

/// Complaints about stages that have no room on this machine.
pub fn refusals(plan: &Plan, all: &[Taken]) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    for taken in all {
        let stage = plan.all().find(|stage| stage.name.as_str() == taken.table);
        let refusal = taken.here.as_ref().and_then(|here| here.refusal.as_ref());
        if let (Some(stage), Some(refusal)) = (stage, refusal) {
            let message = format!("`{}` does not fit into the memory here", taken.table);
            let complaint = Complaint::new("plan::memory", At::key(KeyPath::default()), message);
            complaints.push(complaint.label(refusal.clone()).placed(stage.place.clone()));
        }
    }
    complaints
}

pub fn render(all: &[Taken]) -> String {
    let mut text = String::new();
    for taken in all {
        if text.is_empty() {
            text.push_str("\nmemory, computed (one model is open at a time)\n");
        }
        let Taken {
            table,
            verb,
            precision,
            items,
            here,
        } = taken;
        writeln!(text, "  {table} = {verb}, in {precision}").expect(ANY_TEXT);
        let mut item = |name: &str, bytes: String, remark: &str| {
            let line = format!("      {name:<18} {bytes:>9}   {remark}");
            writeln!(text, "{}", line.trim_end()).expect(ANY_TEXT);
        };
        for (name, bytes, remark) in items {
            item(name, size(*bytes), remark);
        }
        if let Some(here) = here {
            let device = if here.room.on_gpu {
                "the GPU"
            } else {
                "the CPU"
            };
            let room = size(here.room.bytes);
            let remark = format!("of the {room} that it may take on {device}; {}", here.worst);
            item("peak, at most", size(here.peak), &remark);
            if let Some(host) = here.host {
                item("process, about", size(host), "with libraries and pictures");
            }
        }
    }
    text
}

/// The same for programs.
pub fn to_json(all: &[Taken]) -> Value {
    let one = |taken: &Taken| {
        let items = taken.items.iter();
        let items = items.map(|(name, bytes, _)| (name.replace(' ', "_"), json!(bytes)));
        let mut json = json!({
            "table": taken.table, "precision": taken.precision,
            "bytes": items.collect::<serde_json::Map<_, _>>(),
        });
        if let Some(here) = &taken.here {
            json["device"] = json!(if here.room.on_gpu { "gpu" } else { "cpu" });
            json["room"] = json!(here.room.bytes);
            json["peak"] = json!(here.peak);
            json["host"] = json!(here.host);
            json["worst"] = json!(here.worst);
            json["refusal"] = json!(here.refusal);
        }
        json
    };
    all.iter().map(one).collect()
}

const ANY_TEXT: &str = "a string takes any text";

/// The model of a stage of which it is known what it takes.
fn computing(stage: &PlannedStage) -> Option<&ModelName> {
    match &stage.spec {
        StageSpec::Sample(sample) => Some(&sample.model),
        StageSpec::Score(score) => Some(&score.judge),
        StageSpec::Compare(compare) => Some(&compare.judge),
        StageSpec::TrainDpo(train) => Some(&train.model),
        _ => None,
    }
}

fn of_stage(
    plan: &Plan,
    stage: &PlannedStage,
    tokens: &[Tokens],
    precision: Precision,
) -> Option<Needs> {
    match &stage.spec {
        StageSpec::Sample(sample) => match &plan.models[&sample.model] {
            ModelSpec::LlavaOnevision(spec) => of_sampling(stage, sample, spec, tokens, precision),
            _ => None,
        },
        StageSpec::Score(score) => of_judge(plan, &score.judge, precision),
        StageSpec::Compare(compare) => of_judge(plan, &compare.judge, precision),
        StageSpec::TrainDpo(train) => match &plan.models[&train.model] {
            ModelSpec::LlavaOnevision(spec) => of_training(plan, train, spec, tokens, precision),
            _ => None,
        },
        _ => None,
    }
}

fn of_sampling(
    stage: &PlannedStage,
    sample: &Sample,
    spec: &LlavaOnevision,
    tokens: &[Tokens],
    precision: Precision,
) -> Option<Needs> {
    let card = OnevisionCard::open(&spec.weights).ok()?;
    let (element, precision) = precision;
    let sizes = Sizes::new(elements(&card), &card.text_config, element);
    let answers = sample.count.get() as usize;
    let new = answers * sample.max_new_tokens.get() as usize;
    let part = sample.part.get() as usize;
    let [picture, tiles] = largest(&card, spec).unwrap_or_default();
    let counted = tokens.iter().find(|one| one.is_of(stage.name.as_str()));
    let (longest, worst) = match counted {
        Some(counted) => (counted.longest(), counted.worst()),
        None => (
            picture,
            format!("the largest picture takes {picture} tokens, no prompt was counted yet"),
        ),
    };
    let of_tokens = format!(
        "{} a token; the largest picture ({picture} tokens) and its {answers} answers",
        size(sizes.token)
    );
    let taken = move |rows: usize, tokens: usize, read: usize| {
        sizes.weights
            + rows as u64 * sizes.row
            + tokens as u64 * sizes.token
            + read as u64 * sizes.read
    };
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
        let refusal = (sizes.weights > room.bytes).then(|| {
            format!(
                "its weights take {}, and {} may be used; give the model a larger `memory_gb` or a \
                 device with more",
                size(sizes.weights),
                size(room.bytes)
            )
        });
        (peak, refusal)
    };
    Some(Needs {
        precision,
        items: vec![
            ("weights", sizes.weights, String::new()),
            (
                "keys and values",
                sizes.token * (picture + new) as u64,
                of_tokens,
            ),
            ("logits", sizes.row, "an answer that grows".to_owned()),
        ],
        model: sample.model.clone(),
        peak: Box::new(peak),
        worst,
        pixels: pixels(&card, tiles),
    })
}

fn of_judge(plan: &Plan, judge: &ModelName, precision: Precision) -> Option<Needs> {
    let ModelSpec::LlavaRlhf(spec) = &plan.models[judge] else {
        return None;
    };
    let card = RewardCard::open(spec).ok()?;
    let (element, precision) = precision;
    let sizes = Sizes {
        row: 0,
        ..Sizes::new(judge_elements(&card), &card.text_config, element)
    };
    let vision = &card.vision_config;
    let picture = 4 * (vision.num_channels * vision.image_size.pow(2)) as u64;
    let peak = move |room: Room| {
        let at_once = AtOnce::in_room(room, sizes);
        let tokens = at_once.read_tokens.min(at_once.tokens) as u64;
        let refusal = (sizes.weights > room.bytes).then(|| {
            format!(
                "the weights of the judge take {}, and {} may be used; give it a larger `memory_gb` or \
                 a device with more",
                size(sizes.weights),
                size(room.bytes)
            )
        });
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
        pixels: (PICTURES_AHEAD + PICTURES_AT_ONCE_MAX) as u64 * picture,
    })
}

fn of_training(
    plan: &Plan,
    stage: &TrainDpo,
    spec: &LlavaOnevision,
    tokens: &[Tokens],
    precision: Precision,
) -> Option<Needs> {
    let card = OnevisionCard::open(&spec.weights).ok()?;
    let (element, precision) = precision;
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
    let [picture, tiles] = largest(&card, spec).unwrap_or_default();
    let sampled = plan.stages.iter().find_map(|stage| match &stage.spec {
        StageSpec::Sample(sample) => Some((&stage.name, sample.max_new_tokens.get() as usize)),
        _ => None,
    });
    let new = ANSWERS * sampled.map_or(ANSWER_TOKENS, |(_, new)| new);
    let largest_pair = picture + new;
    let remark = format!(
        "the largest picture and two answers, {largest_pair} tokens and {tiles} tiles; {} where layers \
         are computed again",
        size(sizes.computed_again(largest_pair, tiles))
    );
    items.push(("activations", sizes.remembered(largest_pair, tiles), remark));
    let counted =
        sampled.and_then(|(table, _)| tokens.iter().find(|one| one.is_of(table.as_str())));
    let (longest, worst) = match counted {
        Some(counted) => (counted.longest(), counted.worst()),
        None => (
            picture,
            format!("the largest picture takes {picture} tokens, no prompt was counted yet"),
        ),
    };
    let checkpointing = stage.activation_checkpointing;
    let pair = longest + new;
    // Short pairs go side by side.
    let at_once = pair.max(PACK_TOKENS_MAX.min(pair * 8));
    let tiles_at_once = tiles * at_once.div_ceil(pair.max(1));
    let peak = move |room: Room| {
        let has_room = sizes.has_room(room.bytes, at_once, tiles_at_once);
        let activations = match checkpointing {
            Checkpointing::Never => sizes.remembered(at_once, tiles_at_once),
            Checkpointing::Auto if has_room => sizes.remembered(at_once, tiles_at_once),
            Checkpointing::Auto | Checkpointing::Always => {
                sizes.computed_again(at_once, tiles_at_once)
            }
        };
        let refusal = (sizes.state() > room.bytes).then(|| {
            format!(
                "weights, gradients and moments take {}, and {} may be used; train an adapter \
                 (`lora`), fewer parts (`train`), with `optimizer: adamw_8bit`, or give the model a \
                 larger `memory_gb`",
                size(sizes.state()),
                size(room.bytes)
            )
        });
        (sizes.state() + activations, refusal)
    };
    Some(Needs {
        precision,
        items,
        model: stage.model.clone(),
        peak: Box::new(peak),
        worst,
        pixels: pixels(&card, tiles),
    })
}

/// What a model computes in. `auto` is bfloat16 on a GPU, which may be there or not: only the engine
/// knows.
fn precision(spec: &ModelSpec, loader: Option<&dyn ModelLoader>) -> Result<Precision, ModelError> {
    let (device, dtype) = match spec {
        ModelSpec::LlavaOnevision(spec) => (spec.device, spec.dtype),
        ModelSpec::LlavaRlhf(spec) => (spec.device, spec.dtype),
        _ => return Ok((4, "float32")),
    };
    let dtype = match loader {
        Some(loader) => loader.precision(spec)?,
        None => dtype,
    };
    Ok(match (device, dtype) {
        (_, Dtype::Float32) | (DeviceSpec::Cpu, Dtype::Auto) => (4, "float32"),
        (_, Dtype::Bfloat16) => (2, "bfloat16"),
        (_, Dtype::Auto) => (2, "bfloat16 (on a GPU)"),
    })
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

/// Bytes of the pixels of pictures that wait for the network, in float32, each of so many tiles.
fn pixels(card: &OnevisionCard, tiles: usize) -> u64 {
    let vision = &card.vision_config;
    let tile = 4 * vision.num_channels * vision.image_size.pow(2);
    ((PICTURES_AHEAD + PICTURES_AT_ONCE_MAX) * tiles * tile) as u64
}

/// What this process takes of the machine's memory now, in bytes, where Linux tells.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let mut lines = status.lines();
    let line = lines.find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

pub fn size(bytes: u64) -> String {
    match bytes as f64 {
        bytes if bytes >= 1e8 => format!("{:.1} GB", bytes / 1e9),
        bytes if bytes >= 1e5 => format!("{:.1} MB", bytes / 1e6),
        bytes => format!("{:.0} KB", bytes / 1e3),
    }
}
