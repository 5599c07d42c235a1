//! `pipeline graph`: the tables of a pipeline and how they are made from each other, as a drawing.

mod draw;

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::engine;
use super::failed::Failed;
use super::file::{PipelineFile, folder_of};
use super::forecast;
use super::out::line;
use super::preflight::words;
use ovchat_data::store::{Manifest, Rates, RunFolder, TableVersion, lock_holder};
use ovchat_data::tables::{Health, Row};
use ovchat_models::{ModelLoader, ModelSpec};
use ovchat_pipeline::config::{Plan, load};
use ovchat_pipeline::run::{self, Action, Forecast, stale};

/// Draw the tables of a pipeline: what each is made from, its rows and time, and what a run would
/// build and why.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  pipeline graph pipelines/dpo.yaml > graph.svg\n  \
    pipeline graph pipelines/dpo.yaml --format mermaid"
)]
pub struct ShowGraph {
    #[command(flatten)]
    file: PipelineFile,
    /// The run's folder [default: runs/<pipeline name>].
    #[arg(long = "run", value_name = "DIR")]
    folder: Option<PathBuf>,
    /// The format of the graph.
    #[arg(long, value_enum, default_value = "svg")]
    format: GraphFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum GraphFormat {
    /// A drawing.
    Svg,
    /// A flowchart for Markdown.
    Mermaid,
    /// The tables with their inputs, as JSON.
    Json,
}

/// The tables of a run, in the order in which they are built.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Graph {
    pub tables: Vec<GraphTable>,
}

/// A table in a round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GraphTable {
    pub table: String,
    pub round: Option<u32>,
    pub stage_type: String,
    /// The tables that it is made from.
    pub inputs: Vec<String>,
    pub rows: Option<u64>,
    /// The seconds of computing, without reading and writing, of all its workers.
    pub seconds: Option<f64>,
    pub state: State,
    /// The action of a run: `up to date`, `would be built`, …; empty if it is not known.
    pub action: String,
    /// The reasons to build it.
    pub reasons: Vec<String>,
}

/// The state of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    #[serde(rename = "done")]
    Done,
    #[serde(rename = "running")]
    Running,
    #[serde(rename = "begun")]
    Begun,
    #[serde(rename = "stale")]
    Stale,
    #[serde(rename = "not begun")]
    NotBegun,
}

impl ShowGraph {
    pub fn run(&self, loader: Option<&dyn ModelLoader>) -> Result<(), Failed> {
        let plan = load(&self.file.file, &self.file.sets, false)?.fetched()?;
        let folder = folder_of(&plan, self.folder.as_deref());
        // The precision of models is part of keys, and only the engine knows it.
        let has_networks = plan.models.values().any(ModelSpec::needs_torch);
        if loader.is_none() && has_networks && folder.join("manifest.json").exists() {
            return Err(engine::become_it());
        }
        let rates = Rates::open(Rates::usual_place());
        let forecasts = run::forecast(&plan, &folder, loader, &rates);
        let forecasts = forecasts.map_err(|failure| words(&plan, &failure))?;
        let graph = Graph::of_plan(&plan, &folder, &forecasts);
        line(match self.format {
            GraphFormat::Svg => graph.svg(),
            GraphFormat::Mermaid => graph.mermaid(),
            GraphFormat::Json => serde_json::to_string(&graph).expect("plain data serializes"),
        })
    }
}

impl Graph {
    /// Returns the graph of a plan, with the state of its tables in a run folder.
    fn of_plan(plan: &Plan, folder: &Path, forecasts: &[Forecast]) -> Self {
        let run = RunFolder::read(folder).ok();
        let manifest = run.as_ref().map(RunFolder::manifest);
        let is_running = lock_holder(folder).is_some();
        let tables = forecasts.iter().filter_map(|one| {
            let stage = plan.stage(&one.table)?;
            let made = manifest.and_then(|manifest| manifest.find(one.table.as_str(), one.round));
            Some(GraphTable {
                table: one.table.to_string(),
                round: one.round,
                stage_type: stage.stage_type().to_owned(),
                inputs: stage
                    .inputs
                    .iter()
                    .map(|(_, table)| table.to_string())
                    .collect(),
                rows: made.map(TableVersion::rows),
                seconds: made.and_then(TableVersion::took).map(|took| took.seconds),
                state: state(manifest, made, is_running),
                action: match one.action {
                    Action::Reuse => "up to date",
                    Action::Return => "would be restored from the archive",
                    Action::Resume { .. } => "would be resumed",
                    Action::Make { .. } => "would be built",
                }
                .to_owned(),
                reasons: match forecast::why(plan, one) {
                    why if why.is_empty() => Vec::new(),
                    why => vec![why],
                },
            })
        });
        Self {
            tables: tables.collect(),
        }
    }

    /// Returns the graph of the tables that a run has, without those that its pipeline file would add.
    pub fn of_run(run: &RunFolder) -> Self {
        let manifest = run.manifest();
        let is_running = lock_holder(run.root()).is_some();
        let key = |made: &TableVersion| made.content.clone().unwrap_or_else(|| made.key.clone());
        let tables = manifest
            .made
            .iter()
            .filter(|made| made.kind.as_deref() != Some(Health::KIND));
        let tables = tables.map(|made| {
            let inputs = made.because["inputs"].as_object();
            let inputs = inputs.into_iter().flat_map(|inputs| inputs.values());
            let keys: Vec<&str> = inputs.filter_map(Value::as_str).collect();
            let mut names: Vec<String> = Vec::new();
            for other in manifest
                .made
                .iter()
                .filter(|other| keys.contains(&key(other).as_str()))
            {
                if !names.contains(&other.table) {
                    names.push(other.table.clone());
                }
            }
            let stage_type = made.because["settings"].as_object();
            let stage_type = stage_type.and_then(|settings| settings.keys().next().cloned());
            GraphTable {
                table: made.table.clone(),
                round: made.round,
                stage_type: stage_type.unwrap_or_default(),
                inputs: names,
                rows: Some(made.rows()),
                seconds: made.took().map(|took| took.seconds),
                state: state(Some(manifest), Some(made), is_running),
                action: String::new(),
                reasons: Vec::new(),
            }
        });
        Self {
            tables: tables.collect(),
        }
    }
}

fn state(manifest: Option<&Manifest>, made: Option<&TableVersion>, is_running: bool) -> State {
    let (Some(manifest), Some(made)) = (manifest, made) else {
        return State::NotBegun;
    };
    match made.complete {
        true if stale(manifest).contains(&made) => State::Stale,
        true => State::Done,
        false if is_running => State::Running,
        false => State::Begun,
    }
}
