//! What the stages of a pipeline take of memory, computed from the models' configs and the prompts
//! that were counted, beside what there is here.

mod needs;

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::tokens::TokenCounts;
use needs::{Precision, Refusal, computing, of_stage};
use ovchat_models::checkpoint::size_in_words as size;
use ovchat_models::{DeviceSpec, Dtype, ModelError, ModelLoader, ModelSpec, Room};
use ovchat_pipeline::config::{At, Diagnostic, KeyPath, Plan};
use ovchat_pipeline::stages::{Failure, TableName};

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
    refusal: Option<Refusal>,
}

/// What each stage takes that opens a network; nothing for a model whose config can't be read, which
/// is what the check complains about. Without a `loader` nothing is known of this machine.
pub fn of_plan(
    plan: &Plan,
    tokens: &[TokenCounts],
    loader: Option<&dyn ModelLoader>,
) -> Result<Vec<Taken>, Failure> {
    let mut all = Vec::new();
    for stage in plan.all() {
        let Some(model) = computing(plan, stage) else {
            continue;
        };
        let precision = precision(&plan.models[model].clone().opened(), loader);
        let precision = precision.map_err(Failure::of(model))?;
        let Some(needs) = of_stage(plan, stage, tokens, precision) else {
            continue;
        };
        let room = match loader {
            Some(loader) => {
                let room = loader.room(&plan.models[&needs.model].clone().opened());
                room.map_err(Failure::of(&needs.model))?
            }
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
pub fn refusals(plan: &Plan, all: &[Taken]) -> Vec<(TableName, Diagnostic)> {
    let mut diagnostics = Vec::new();
    for taken in all {
        let stage = plan.all().find(|stage| stage.name.as_str() == taken.table);
        let refusal = taken.here.as_ref().and_then(|here| here.refusal.as_ref());
        if let (Some(stage), Some(refusal)) = (stage, refusal) {
            let message = format!("`{}` has too little memory: {}", taken.table, refusal.cause);
            let diagnostic = Diagnostic::new("plan::memory", At::key(KeyPath::default()), message);
            let diagnostic = diagnostic.help(refusal.help.clone());
            diagnostics.push((stage.name.clone(), diagnostic.placed(stage.place.clone())));
        }
    }
    diagnostics
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
            json["refusal"] = json!(here.refusal.as_ref().map(Refusal::in_one));
        }
        json
    };
    all.iter().map(one).collect()
}

const ANY_TEXT: &str = "a string takes any text";

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

/// What this process takes of the machine's memory now, in bytes, where Linux tells.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let mut lines = status.lines();
    let line = lines.find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}
