//! `pipeline health`: the metrics of each round of a run, and the SQL that computes them.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::failed::Failed;
use super::file::{read_run, run_folder};
use super::out::{Output, line};
use ovchat_data::store::RunFolder;
use ovchat_data::tables::{Health, Row};
use ovchat_pipeline::config::{METRICS, metric};
use ovchat_pipeline::run::{best_round, health_of, rounded};

/// Show the health of a run's rounds: lengths, diversity, repetition, held-out rewards, and what the
/// guard watches for.
#[derive(Args)]
#[command(after_help = formulas())]
pub struct ShowHealth {
    /// The run: its folder, or its name below runs/.
    run: PathBuf,
    /// Print the queries that compute the metrics.
    #[arg(long)]
    sql: bool,
    #[command(flatten)]
    output: Output,
}

impl ShowHealth {
    pub fn run(&self) -> Result<(), Failed> {
        let run = read_run(&run_folder(&self.run))?;
        if self.sql {
            return print_queries(&run);
        }
        let rounds = health_of(&run)?;
        if self.output.is_json() {
            return line(format_args!("{:#}", as_json(&run, &rounds)?));
        }
        if rounds.is_empty() {
            return line(no_health(&run));
        }
        line(table(&rounds))?;
        for words in conditions(&rounds) {
            line(words)?;
        }
        if let Some(best) = best_round(&run)? {
            line(format_args!("best round: {}", best.round))?;
        }
        Ok(())
    }
}

/// Returns the message for a run without the table.
fn no_health(run: &RunFolder) -> String {
    format!(
        "{} has no health yet: it is computed when a round of DPO ends, and for the rounds of earlier versions when \
         `pipeline run` runs again",
        run.root().display()
    )
}

/// Returns metrics and rounds as a JSON object.
fn as_json(run: &RunFolder, rounds: &[(u32, Vec<Health>)]) -> Result<Value, Failed> {
    let row = |round: u32, row: &Health| {
        json!({
            "round": round, "metric": row.metric, "source": row.source, "value": row.value, "n": row.n,
            "low": row.low, "high": row.high, "condition": row.condition, "action": row.action,
        })
    };
    let rows = rounds.iter();
    let rows: Vec<Value> = rows
        .flat_map(|(round, rows)| rows.iter().map(|one| row(*round, one)))
        .collect();
    let best = best_round(run)?;
    Ok(json!({ "rows": rows, "best_round": best.map(|best| best.round) }))
}

/// Returns a table with a line for each metric of each source, and a column for each round.
pub fn table(rounds: &[(u32, Vec<Health>)]) -> String {
    let mut lines: Vec<(&str, &str)> = Vec::new();
    for (_, rows) in rounds {
        for row in rows {
            let name = (row.metric.as_str(), row.source.as_str());
            if !lines.contains(&name) && metric(&row.metric).is_some() {
                lines.push(name);
            }
        }
    }
    let place = |name: &str| METRICS.iter().position(|metric| metric.name == name);
    lines.sort_by_key(|(name, _)| place(name));
    let mut cells = vec![vec!["metric".to_owned(), "of".to_owned()]];
    cells[0].extend(rounds.iter().map(|(round, _)| format!("round {round}")));
    for (name, source) in lines {
        let mut row = vec![name.to_owned(), source.to_owned()];
        for (_, rows) in rounds {
            let mut found = rows.iter();
            let found = found.find(|row| row.metric == name && row.source == source);
            row.push(found.map_or_else(String::new, cell));
        }
        cells.push(row);
    }
    let widths: Vec<usize> = (0..cells[0].len())
        .map(|at| {
            cells
                .iter()
                .map(|row| row[at].chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in &cells {
        let row: Vec<String> = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(at, (cell, width))| match at {
                0 | 1 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            })
            .collect();
        writeln!(text, "{}", row.join("  ").trim_end()).expect("a string grows");
    }
    text.trim_end().to_owned()
}

/// Returns the value of a metric, with `!` if a condition of the guard is true.
fn cell(row: &Health) -> String {
    let mark = if row.action.is_some() { " !" } else { "" };
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), rounded);
    match (row.low, row.high) {
        (Some(low), Some(high)) => {
            let (low, high) = (rounded(low), rounded(high));
            format!("{} [{low}, {high}]{mark}", number(row.value))
        }
        _ => format!("{}{mark}", number(row.value)),
    }
}

/// Returns a line for each condition of the guard that is true.
pub fn conditions(rounds: &[(u32, Vec<Health>)]) -> Vec<String> {
    let mut lines = Vec::new();
    for (round, rows) in rounds {
        for row in rows {
            if let (Some(condition), Some(action)) = (&row.condition, &row.action) {
                let condition = condition.split_whitespace().collect::<Vec<_>>().join(" ");
                lines.push(format!("! round {round}: {condition} ({action})"));
            }
        }
    }
    lines
}

/// Prints the queries of the last round.
fn print_queries(run: &RunFolder) -> Result<(), Failed> {
    let made = run.manifest().made.iter();
    let last = made
        .filter(|made| made.kind.as_deref() == Some(Health::KIND) && made.complete)
        .max_by_key(|made| made.round);
    let Some(last) = last else {
        return line(no_health(run));
    };
    let queries = last.because["settings"]["health"]["queries"].as_array();
    let round = last.round.unwrap_or_default().to_string();
    for query in queries.into_iter().flatten().filter_map(Value::as_str) {
        line(format_args!(
            "{};\n",
            query.replace("$round", &round).trim_end()
        ))?;
    }
    Ok(())
}

/// Returns the formulas and default conditions of the metrics, for the help.
fn formulas() -> String {
    let mut text = "Metrics:\n".to_owned();
    for metric in &METRICS {
        let warns = metric
            .warns
            .map_or_else(String::new, |warns| format!("; warns if {warns}"));
        let (name, help) = (metric.name, metric.help);
        writeln!(text, "  {name}\n      {help}{warns}").expect("a string grows");
    }
    text.push_str(
        "\nChange what the guard does in the pipeline file:\n  guard: { length_correlation > 0.4: stop, \
         cut_off > 0.05: off }\n\nExamples:\n  pipeline health runs/small-world\n  \
         pipeline health runs/small-world --sql\n  \
         pipeline sql runs/small-world \"select round, value from health where metric = 'distinct_2'\"",
    );
    text
}
