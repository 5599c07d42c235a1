//! The health of a run's rounds for the page.

use serde_json::{Value, json};

use super::asked::{Asked, Problem};
use super::runs::Runs;
use ovchat_pipeline::config::{METRICS, metric};
use ovchat_pipeline::run::{best_round, health_of};

/// Returns the metrics, their values by round, and the best round.
pub fn health(runs: &Runs, asked: &Asked) -> Result<Value, Problem> {
    let snapshot = runs.of(asked)?.now()?;
    let rounds = health_of(&snapshot.run)?;
    let mut metrics: Vec<Value> = Vec::new();
    let mut rows = Vec::new();
    for (round, of_round) in &rounds {
        for row in of_round {
            let known = metric(&row.metric);
            if known.is_none() && row.condition.is_none() {
                continue;
            }
            let entry = json!({
                "metric": row.metric, "of": row.source,
                "title": known.map_or("query of the guard", |metric| metric.title),
                "help": known.map_or("A condition of the pipeline's `guard`.", |metric| metric.help),
            });
            if !metrics.contains(&entry) {
                metrics.push(entry);
            }
            rows.push(json!({
                "round": round, "metric": row.metric, "of": row.source, "value": row.value, "n": row.n,
                "low": row.low, "high": row.high, "bound": row.condition, "action": row.action,
            }));
        }
    }
    let place = |entry: &Value| {
        METRICS
            .iter()
            .position(|metric| entry["metric"] == metric.name)
    };
    metrics.sort_by_key(place);
    let best = best_round(&snapshot.run)?;
    let by = rounds
        .iter()
        .flat_map(|(_, rows)| rows)
        .find(|row| row.metric == "kept_by");
    let kept = best.map(|best| {
        json!({ "round": best.round, "by": by.map(|row| &row.source), "values": best.values })
    });
    Ok(json!({ "metrics": metrics, "rows": rows, "kept": kept }))
}
