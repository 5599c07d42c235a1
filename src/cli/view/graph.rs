//! The graph of a run for the page: what `pipeline graph` says of its pipeline file, or, if the file
//! cannot be loaded any more, the tables that the run has.

use std::io::Read as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use super::asked::{Asked, Problem};
use super::runs::{Run, Runs, Snapshot};
use crate::graph::{Graph, State};
use ovchat_pipeline::run::LAST;

/// The interval between checks for the end of the other program.
const LOOK_EVERY: Duration = Duration::from_millis(20);

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
    let mut known = run.graph.lock().expect("no panic while locked");
    if let Some((stamp, graph, problem)) = &*known
        && *stamp == snapshot.stamp
    {
        return Ok((graph.clone(), problem.clone()));
    }
    let own = Graph::of_run(&snapshot.run);
    let is_running = own.tables.iter().any(|table| table.state == State::Running);
    let (graph, problem) = match planned(run, snapshot, asked) {
        // A run in progress has little to forecast, and the forecast would cost it time.
        _ if is_running => (own, None),
        Ok(graph) => (graph, None),
        Err(Problem::Refused(problem)) => (own, Some(problem)),
        Err(problem) => return Err(problem),
    };
    *known = Some((snapshot.stamp.clone(), graph.clone(), problem.clone()));
    Ok((graph, problem))
}

/// Returns the graph of the pipeline file that the run was made with, as another process forecasts it:
/// that needs the precision of the networks, which this program does not have.
fn planned(run: &Run, snapshot: &Snapshot, asked: &Asked) -> Result<Graph, Problem> {
    let source = &snapshot.manifest().source;
    let file = source["file"].as_str();
    let file =
        file.ok_or_else(|| Problem::Refused("the run does not name its pipeline file".to_owned()))?;
    let failed =
        |error: std::io::Error| Problem::Refused(format!("cannot run `pipeline graph`: {error}"));
    let mut command = Command::new(std::env::current_exe().map_err(failed)?);
    command
        .args(["graph", "--format", "json", "--run"])
        .arg(&run.folder);
    for set in source[LAST]["sets"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
    {
        command.arg(format!("--set={set}"));
    }
    command.arg("--").arg(file);
    let streams = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = streams.spawn().map_err(failed)?;
    let [out, errors] = [
        child
            .stdout
            .take()
            .map(|out| Box::new(out) as Box<dyn std::io::Read + Send>),
        child
            .stderr
            .take()
            .map(|out| Box::new(out) as Box<dyn std::io::Read + Send>),
    ]
    .map(|stream| {
        std::thread::spawn(move || {
            let mut text = String::new();
            // An unreadable text is no graph.
            drop(
                stream
                    .expect("it is piped")
                    .take(64 << 20)
                    .read_to_string(&mut text),
            );
            text
        })
    });
    let status = loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            break status;
        }
        if let Err(problem) = asked.go_on() {
            drop(child.kill());
            drop(child.wait());
            return Err(problem);
        }
        std::thread::sleep(LOOK_EVERY);
    };
    let [out, errors] = [out, errors].map(|text| text.join().unwrap_or_default());
    if !status.success() {
        let first = errors
            .lines()
            .find(|line| !line.trim().is_empty())
            .unwrap_or("it failed");
        return Err(Problem::Refused(format!(
            "`pipeline graph {file}` says: {}; the drawing shows the tables of the run",
            first.trim()
        )));
    }
    serde_json::from_str(&out)
        .map_err(|error| Problem::Refused(format!("`pipeline graph` printed no graph: {error}")))
}
