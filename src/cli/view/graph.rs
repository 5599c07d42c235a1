//! The graph of a run for the page: what `pipeline graph` says of its pipeline file, or, if the file
//! cannot be loaded any more, the tables that the run has.

use serde_json::{Value, json};

use super::asked::{Asked, Problem};
use super::child;
use super::runs::{Run, Runs, Snapshot};
use crate::graph::Graph;
use ovchat_data::store::lock_holder;
use ovchat_pipeline::run::LAST;

/// Returns the tables of the graph.
pub fn graph(runs: &Runs, asked: &Asked) -> Result<Value, Problem> {
    let number = asked.number::<usize>("run")?.unwrap_or(0);
    let run = runs.of(asked)?;
    let (graph, problem) = of_run(run, &*run.now()?, asked)?;
    let tables = serde_json::to_value(&graph.tables).expect("plain data serializes");
    Ok(
        json!({ "svg_light": format!("graph.svg?run={number}"), "tables": tables, "problem": problem }),
    )
}

/// Returns the drawing of the graph.
pub fn svg(runs: &Runs, asked: &Asked) -> Result<String, Problem> {
    let run = runs.of(asked)?;
    Ok(of_run(run, &*run.now()?, asked)?.0.svg())
}

/// Returns the graph of a run, from the cache if the run has not changed since.
fn of_run(
    run: &Run,
    snapshot: &Snapshot,
    asked: &Asked,
) -> Result<(Graph, Option<String>), Problem> {
    let stamp = format!("{} {}", run.stamp(), file_stamp(snapshot));
    let mut known = run.graph.lock().expect("no panic while locked");
    if let Some((of, graph, problem)) = &*known
        && *of == stamp
    {
        return Ok((graph.clone(), problem.clone()));
    }
    let own = Graph::of_run(&snapshot.run);
    // A run in progress has little to forecast, and the forecast would cost it time.
    let (graph, problem) = if lock_holder(&run.folder).is_some() {
        (own, None)
    } else {
        match planned(run, snapshot, asked) {
            Ok(graph) => (graph, None),
            Err(Problem::Refused(problem)) => (own, Some(problem)),
            Err(problem) => return Err(problem),
        }
    };
    *known = Some((stamp, graph.clone(), problem.clone()));
    Ok((graph, problem))
}

/// Returns a text that changes with the pipeline file.
fn file_stamp(snapshot: &Snapshot) -> String {
    let file = snapshot.manifest().source["file"]
        .as_str()
        .unwrap_or_default();
    let data = std::fs::metadata(file).ok();
    let changed = data.as_ref().and_then(|data| data.modified().ok());
    format!("{changed:?} {:?}", data.map(|data| data.len()))
}

/// Returns the graph of the pipeline file that the run was made with, as another process forecasts it:
/// that needs the precision of the networks, which this program does not have.
fn planned(run: &Run, snapshot: &Snapshot, asked: &Asked) -> Result<Graph, Problem> {
    let source = &snapshot.manifest().source;
    let file = source["file"].as_str();
    let file =
        file.ok_or_else(|| Problem::Refused("the run does not name its pipeline file".to_owned()))?;
    let mut command = child::command(&["graph", "--format", "json", "--run"])?;
    command.arg(&run.folder);
    let sets = source[LAST]["sets"].as_array().into_iter().flatten();
    for set in sets.filter_map(Value::as_str) {
        command.arg(format!("--set={set}"));
    }
    command.arg("--").arg(file);
    let output = child::run(command, &[], asked, None)?;
    if !output.is_success {
        let mut lines = output.errors.lines();
        let first = lines
            .find(|line| !line.trim().is_empty())
            .unwrap_or("it failed");
        return Err(Problem::Refused(format!(
            "`pipeline graph {file}` says: {}; the drawing shows the tables of the run",
            first.trim()
        )));
    }
    serde_json::from_slice(&output.out)
        .map_err(|error| Problem::Refused(format!("`pipeline graph` printed no graph: {error}")))
}
