//! The report at the end of a run: the views of `report`, as tables and charts.

use arrow::array::RecordBatch;
use arrow::util::pretty::pretty_format_batches;

use super::chart;
use super::failed::Failed;
use super::health;
use super::out::line;
use super::rows::{readable, shown};
use super::sql::ask;
use ovchat_data::store::{RunFolder, create_folder};
use ovchat_pipeline::config::Plan;
use ovchat_pipeline::run::health_of;

/// Prints the views of a complete run, and writes their charts to its folder `report`. `say`
/// receives messages about everything that is not printed.
pub fn print(plan: &Plan, run: &RunFolder, say: &mut dyn FnMut(&str)) -> Result<(), Failed> {
    for (name, view) in &plan.report {
        let mut batches: Vec<RecordBatch> = Vec::new();
        let mut plain: Vec<RecordBatch> = Vec::new();
        // The query itself, because a view has no order.
        let asked = ask(run, &view.query, |batch| {
            batches.push(readable(&batch, true)?);
            plain.push(batch);
            Ok(())
        });
        asked.map_err(|failed| match failed {
            Failed::Query(error) => {
                Failed::Words(format!("view `{name}` of `report` failed: {error}"))
            }
            other => other,
        })?;
        if batches.is_empty() {
            say(&format!("{name}: no rows"));
            continue;
        }
        line(format_args!("{name}"))?;
        let cells: Vec<RecordBatch> = batches.iter().map(shown).collect::<Result<_, _>>()?;
        line(pretty_format_batches(&cells)?)?;
        let Some(wanted) = &view.chart else {
            continue;
        };
        let folder = run.root().join("report");
        create_folder(&folder)?;
        for path in chart::write(run, &folder, name, &plain, wanted)? {
            say(&format!("wrote {}", path.display()));
        }
    }
    let rounds = health_of(run)?;
    if !rounds.is_empty() {
        line(format_args!("health\n{}", health::table(&rounds)))?;
    }
    Ok(())
}
