//! Memory estimates for the stages of a pipeline, computed from the models' configs and the token
//! counts, compared with the memory of this machine.

mod needs;

use std::fmt::Write as _;
use std::num::NonZeroU32;

use serde_json::{Value, json};

use super::tokens::TokenCounts;
use needs::{Precision, Refusal, computing, of_stage, video_frames};
use ovchat_models::checkpoint::size_in_words as size;
use ovchat_models::{DeviceSpec, Dtype, ModelError, ModelLoader, ModelSpec, Room};
use ovchat_pipeline::config::{At, Diagnostic, KeyPath, Plan};
use ovchat_pipeline::run::workers_of;
use ovchat_pipeline::stages::{Failure, TableName};

/// The memory of a stage.
pub struct Taken {
    table: String,
    stage_type: String,
    precision: &'static str,
    /// The parts of the estimate, each with its bytes and a remark.
    items: Vec<(&'static str, u64, String)>,
    /// The estimate on this machine, if its devices are known.
    here: Option<Here>,
}

/// The memory of a stage on this machine.
struct Here {
    room: Room,
    /// The peak memory of the model and its computation on the compute device.
    peak: u64,
    /// The peak memory of this process on the host, as far as it is known: its current memory, the
    /// peak if the model is on the CPU, and images that wait.
    host: Option<u64>,
    /// A description of the longest row.
    worst: String,
    /// The reason why the stage does not fit.
    refusal: Option<Refusal>,
    /// The processes that compute the stage, each of which has a copy of the model.
    workers: u32,
}

/// Refuses workers whose copies do not fit into the memory of the machine. On GPUs, each has its own.
fn of_copies(workers: u32, peak: u64, room: Room) -> Option<Refusal> {
    let all = peak.saturating_mul(u64::from(workers));
    (workers > 1 && !room.on_gpu && all > room.device).then(|| Refusal {
        cause: format!(
            "{workers} workers with {} each take {}, but the machine has {}",
            size(peak),
            size(all),
            size(room.device)
        ),
        help: "use fewer with --workers".to_owned(),
    })
}

/// Estimates the memory of each stage that opens a network; skips models whose config cannot be
/// read, which `check` reports. Without a `loader`, nothing is known about this machine.
pub fn of_plan(
    plan: &Plan,
    tokens: &[TokenCounts],
    loader: Option<&dyn ModelLoader>,
    workers: Option<NonZeroU32>,
) -> Result<Vec<Taken>, Failure> {
    let mut all = Vec::new();
    let frames = video_frames(plan);
    for stage in plan.all() {
        let Some(model) = computing(plan, stage) else {
            continue;
        };
        let precision = precision(&plan.models[model].clone().opened(), loader);
        let precision = precision.map_err(Failure::of(model))?;
        let Some(needs) = of_stage(plan, frames, stage, tokens, precision) else {
            continue;
        };
        let room = match loader {
            Some(loader) => {
                let room = loader.room(&plan.models[&needs.model].clone().opened());
                room.map_err(Failure::of(&needs.model))?
            }
            None => None,
        };
        let count = workers_of(plan, stage, loader, workers, false)?.unwrap_or(1);
        let here = room.map(|room| {
            let (peak, refusal) = (needs.peak)(room);
            let refusal = refusal.or_else(|| of_copies(count, peak, room));
            let on_host = if room.on_gpu { 0 } else { peak };
            Here {
                room,
                peak,
                host: resident().map(|now| now + on_host + needs.pixels),
                worst: needs.worst.clone(),
                refusal,
                workers: count,
            }
        });
        all.push(Taken {
            table: stage.name.to_string(),
            stage_type: stage.stage_type().to_owned(),
            precision: needs.precision,
            items: needs.items,
            here,
        });
    }
    Ok(all)
}

/// Returns diagnostics for stages that do not fit this machine's memory.
pub fn refusals(plan: &Plan, all: &[Taken]) -> Vec<(TableName, Diagnostic)> {
    let mut diagnostics = Vec::new();
    for taken in all {
        let stage = plan.all().find(|stage| stage.name.as_str() == taken.table);
        let refusal = taken.here.as_ref().and_then(|here| here.refusal.as_ref());
        if let (Some(stage), Some(refusal)) = (stage, refusal) {
            let message = format!("not enough memory for `{}`: {}", taken.table, refusal.cause);
            let diagnostic = Diagnostic::new("plan::memory", At::key(KeyPath::default()), message);
            let diagnostic = diagnostic.help(refusal.help.clone());
            diagnostics.push((stage.name.clone(), diagnostic.placed(stage.place())));
        }
    }
    diagnostics
}

pub fn render(all: &[Taken]) -> String {
    let mut text = String::new();
    for taken in all {
        if text.is_empty() {
            text.push_str("\nestimated memory (one model is open at a time)\n");
        }
        let Taken {
            table,
            stage_type,
            precision,
            items,
            here,
        } = taken;
        writeln!(text, "  {table} = {stage_type}, in {precision}").expect(ANY_TEXT);
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
            let remark = format!("of the {room} available on {device}; {}", here.worst);
            item("peak, at most", size(here.peak), &remark);
            if here.workers > 1 {
                let all = size(here.peak * u64::from(here.workers));
                item(
                    "workers",
                    here.workers.to_string(),
                    &format!("{all} in all"),
                );
            }
            if let Some(host) = here.host {
                item(
                    "process, about",
                    size(host),
                    "including libraries and images",
                );
            }
        }
    }
    text
}

/// Returns the estimates as JSON.
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
            json["workers"] = json!(here.workers);
            json["worst"] = json!(here.worst);
            json["refusal"] = json!(here.refusal.as_ref().map(Refusal::in_one));
        }
        json
    };
    all.iter().map(one).collect()
}

const ANY_TEXT: &str = "writing to a string does not fail";

/// Returns the precision in which a model computes. `auto` is bfloat16 on a GPU, and only the
/// engine knows if there is one.
fn precision(spec: &ModelSpec, loader: Option<&dyn ModelLoader>) -> Result<Precision, ModelError> {
    let Some(compute) = spec.compute() else {
        return Ok((4, "float32"));
    };
    let dtype = match loader {
        Some(loader) => loader.precision(spec)?,
        None => compute.dtype,
    };
    Ok(match (compute.device, dtype) {
        (_, Dtype::Float32) | (DeviceSpec::Cpu, Dtype::Auto) => (4, "float32"),
        (_, Dtype::Bfloat16) => (2, "bfloat16"),
        (_, Dtype::Auto) => (2, "bfloat16 (on a GPU)"),
    })
}

/// Returns the resident memory of this process, in bytes; `None` outside Linux.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let mut lines = status.lines();
    let line = lines.find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}
