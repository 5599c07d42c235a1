//! `pipeline check` and `pipeline plan`: validate a pipeline, and show what a run would do.

use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::failed::Failed;
use super::file::{PipelineFile, folder_of, warn};
use super::out::{Output, line, say};
use super::preflight::Preflight;
use super::{calls, engine, forecast, memory, tokens};
use ovchat_models::{ModelLoader, ModelSpec};
use ovchat_pipeline::config::{
    At, Diagnostic, Diagnostics, KeyPath, LoadError, Plan, PlannedStage, load,
};
use ovchat_pipeline::run::withheld as withheld_from;
use ovchat_pipeline::stages::StageSpec;

/// Validate a pipeline: report all errors before anything runs.
#[derive(Args)]
#[command(after_help = "Examples:\n  pipeline check pipelines/dpo.yaml\n  \
    pipeline check pipelines/dpo.yaml --set stages.candidates.sample.count=8\n  \
    pipeline check pipelines/dpo.yaml --offline --format json")]
pub struct Check {
    #[command(flatten)]
    file: PipelineFile,
    /// Do not check that the files and folders in the pipeline exist.
    #[arg(long)]
    offline: bool,
    #[command(flatten)]
    output: Output,
}

/// Show the plan of a pipeline: its stages in execution order with all settings, the tables that a
/// run would reuse or build, and why.
#[derive(Args)]
#[command(after_help = "Examples:\n  pipeline plan pipelines/dpo.yaml\n  \
    pipeline plan pipelines/dpo.yaml --set stages.candidates.sample.temperature=0.8\n  \
    pipeline plan pipelines/dpo.yaml --run /data/runs/first --format json")]
pub struct ShowPlan {
    #[command(flatten)]
    file: PipelineFile,
    /// The run's folder [default: runs/<pipeline name>].
    #[arg(long = "run", value_name = "DIR")]
    folder: Option<PathBuf>,
    /// The number of worker processes of the run [default: one a GPU; on a CPU, none].
    #[arg(long, value_name = "N")]
    workers: Option<NonZeroU32>,
    #[command(flatten)]
    output: Output,
}

impl Check {
    pub fn run(&self) -> Result<(), Failed> {
        let loaded = load(&self.file.file, &self.file.sets, self.offline);
        let loaded = loaded.map(|mut plan| {
            plan.warnings.extend(withheld(&plan));
            plan
        });
        if self.output.is_json() {
            let all = |diagnostics: &[Diagnostic]| -> Vec<Value> {
                diagnostics.iter().map(Diagnostic::to_json).collect()
            };
            let list = match &loaded {
                Ok(plan) => all(&plan.warnings),
                Err(LoadError::Refused(diagnostics)) => all(&diagnostics.0),
                Err(unreadable) => {
                    vec![json!({ "severity": "error", "message": unreadable.to_string() })]
                }
            };
            line(json!({ "ok": loaded.is_ok(), "complaints": list }))?;
            return loaded.map(|_| ()).map_err(|_| Failed::Code(2));
        }
        let plan = loaded?;
        warn(&plan);
        let stages = plan.all().count();
        let rounds = plan.rounds.get();
        let plural = if rounds == 1 { "round" } else { "rounds" };
        let warnings = plan.warnings.iter().filter(|one| one.is_warning()).count();
        let found = match warnings {
            0 => "no errors".to_owned(),
            1 => "no errors, 1 warning".to_owned(),
            warnings => format!("no errors, {warnings} warnings"),
        };
        say!(
            "{}: {found} ({stages} stages, {rounds} {plural})",
            self.file.file.display()
        );
        Ok(())
    }
}

/// Returns notes about environment variables that the pipeline's commands do not inherit.
fn withheld(plan: &Plan) -> Vec<Diagnostic> {
    let notes = plan.all().filter_map(|stage| {
        let StageSpec::Exec(exec) = &stage.spec else {
            return None;
        };
        // With an `only` list, this is evident from the pipeline.
        let names = withheld_from(&exec.env, &plan.secrets);
        if exec.env.is_only() || names.is_empty() {
            return None;
        }
        let names: Vec<_> = names.iter().map(|name| name.to_string_lossy()).collect();
        let message = format!(
            "the command of `{}` does not inherit {}",
            stage.name,
            names.join(", ")
        );
        let help = format!("pass them with `env: [{}]`", names.join(", "));
        let note = Diagnostic::note("config::withheld", At::key(KeyPath::default()), message);
        Some(note.help(help).placed(stage.place()))
    });
    notes.collect()
}

impl ShowPlan {
    pub fn run(&self, loader: Option<&dyn ModelLoader>) -> Result<(), Failed> {
        let plan = load(&self.file.file, &self.file.sets, false)?.fetched()?;
        let folder = folder_of(&plan, self.folder.as_deref());
        // The precision of models is part of keys, and only the engine knows it; it also knows this
        // machine's devices. Without an engine, the plan is shown as far as possible.
        let has_networks = plan.models.values().any(ModelSpec::needs_torch);
        if loader.is_none()
            && has_networks
            && (folder.join("manifest.json").exists() || engine::path().is_ok())
        {
            return Err(engine::become_it());
        }
        let preflight = Preflight::of_plan(&plan, &folder, loader, self.workers)?;
        let Preflight {
            forecasts,
            tokens,
            taken,
        } = &preflight;
        let calls = calls::of_plan(&plan, &folder, forecasts)?;
        if self.output.is_json() {
            let mut json = to_json(&plan);
            json["calls"] = calls::to_json(&calls);
            json["tokens"] = tokens::to_json(tokens);
            json["memory"] = memory::to_json(taken);
            json["run"] = json!(folder);
            json["tables"] = forecast::to_json(&plan, forecasts);
            line(format_args!("{json:#}"))?;
            return refuse(preflight.refusals(&plan, None));
        }
        let mut text = String::new();
        plan.render(&mut text)
            .expect("writing to a string does not fail");
        text.push_str(&memory::render(taken));
        text.push_str(&tokens::render(tokens));
        text.push_str(&calls::render(&plan, &calls));
        text.push_str(&forecast::render(&plan, &folder, forecasts));
        line(text.trim_end())?;
        warn(&plan);
        refuse(preflight.refusals(&plan, None))
    }
}

/// Fails if there are diagnostics that refuse a run.
pub fn refuse(refusals: Vec<Diagnostic>) -> Result<(), Failed> {
    if refusals.is_empty() {
        return Ok(());
    }
    Err(Failed::Refused(LoadError::Refused(Diagnostics(refusals))))
}

fn to_json(plan: &Plan) -> Value {
    let stage = |stage: &PlannedStage| {
        let inputs: Vec<Value> = stage
            .inputs
            .iter()
            .map(|(field, table)| json!({ "field": field, "table": table.as_str() }))
            .collect();
        json!({
            "table": stage.name.as_str(),
            "kind": stage.kind,
            "once": stage.is_static,
            "first_round": stage.round_first,
            "inputs": inputs,
            "settings": stage.settings,
        })
    };
    json!({
        "pipeline": plan.pipeline.as_str(),
        "seed": plan.seed,
        "rounds": plan.rounds.get(),
        "models": plan.models.iter().map(|(name, spec)| (name.to_string(), json!(spec.network()))).collect::<serde_json::Map<_, _>>(),
        "stages": plan.stages.iter().map(stage).collect::<Vec<_>>(),
        "evaluate": plan.evaluate.iter().map(stage).collect::<Vec<_>>(),
        "warnings": plan.warnings.iter().map(Diagnostic::to_json).collect::<Vec<_>>(),
    })
}
