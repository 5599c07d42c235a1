//! The `exam` of a judge: labeled pairs that it must pass before it scores.
//!
//! An exam expands to two tables that are built before all others, the labels and the judge's
//! verdicts on them, and to expectations on the second. So it is built once for a given judge, its
//! result can be queried, and a judge that fails stops the run before anything is scored.

use serde_json::json;

use super::diagnostic::{At, Diagnostic};
use super::expectation::{Expectation, Otherwise};
use super::pipeline::{Entry, PipelineSpec};
use super::source::KeyPath;
use crate::stages::{StageSpec, TableName};
use ovchat_models::{Exam, ModelSpec};

/// Adds the tables and expectations of every exam to the pipeline.
pub fn add(written: &mut PipelineSpec) -> Vec<Diagnostic> {
    let mut diagnostics = Vec::new();
    let mut stages = Vec::new();
    for model in &written.models {
        let Some(exam) = model.spec.as_ref().and_then(ModelSpec::exam) else {
            continue;
        };
        let path = model.settings.key("exam");
        let backing_model = model.spec.as_ref().and_then(ModelSpec::backing_model);
        if is_trained(written, backing_model.unwrap_or(model.name.as_str())) {
            let message = format!(
                "`{}` cannot have an `exam`: it is trained in this pipeline, and exams run before training",
                model.name
            );
            let diagnostic = Diagnostic::new("config::exam", At::key(path), message);
            let help = "compare it with labels under `evaluate`, and set the limits under `expect`";
            diagnostics.push(diagnostic.help(help));
            continue;
        }
        // The name of a model is also valid as the name of a table.
        let table = |end: &str| TableName::try_from(format!("{}_{end}", model.name));
        let (Ok(labels), Ok(comparison)) = (table("exam_labels"), table("exam")) else {
            continue;
        };
        let others = written.stages.iter().chain(&written.evaluate);
        let mut taken = others.filter(|stage| [&labels, &comparison].contains(&&stage.name));
        if let Some(other) = taken.next() {
            let at = At::key(other.path.clone());
            let message = format!(
                "the exam of `{}` already builds a table `{}`",
                model.name, other.name
            );
            let diagnostic = Diagnostic::new("config::duplicate", at, message);
            diagnostics.push(diagnostic.help("rename this stage"));
            continue;
        }
        let load = json!({ "load_feedback": { "from": exam.from, "images": exam.images } });
        let compare = json!({ "compare": { "pairs": labels, "judge": model.name } });
        for (name, settings) in [(&labels, load), (&comparison, compare)] {
            stages.push(entry(name.clone(), &path, &settings));
        }
        for (what, expectation) in expected(exam, &labels, &comparison) {
            let Ok(name) = TableName::try_from(format!("{comparison}_{what}")) else {
                continue;
            };
            written.expect.push(Entry {
                name,
                path: path.clone(),
                settings: path.clone(),
                spec: Some(expectation),
            });
        }
    }
    stages.append(&mut written.stages);
    written.stages = stages;
    diagnostics
}

fn entry(
    name: TableName,
    path: &KeyPath,
    settings: &serde_json::Value,
) -> Entry<TableName, StageSpec> {
    let stage_type = settings.as_object().and_then(|map| map.keys().next());
    let stage_type = stage_type.expect("the settings name a stage type");
    Entry {
        name,
        path: path.clone(),
        settings: path.key(stage_type),
        spec: serde_json::from_value(settings.clone()).ok(),
    }
}

fn is_trained(written: &PipelineSpec, model: &str) -> bool {
    let specs = written
        .stages
        .iter()
        .filter_map(|stage| stage.spec.as_ref());
    let mut uses = specs.flat_map(|spec| spec.as_stage().uses());
    uses.any(|used| used.role.learns() && used.model.as_str() == model)
}

/// The expectations on the judge's verdicts.
fn expected(
    exam: &Exam,
    labels: &TableName,
    comparison: &TableName,
) -> Vec<(&'static str, Expectation)> {
    let expectation = |value: String, at_least: Option<f64>, at_most: Option<f64>| Expectation {
        table: comparison.clone(),
        query: None,
        value: Some(value),
        at_least,
        at_most,
        otherwise: Otherwise::Stop,
    };
    let accuracy = "avg(case when agrees then 1.0 else 0.0 end)".to_owned();
    let mut all = vec![(
        "accuracy",
        expectation(accuracy, Some(exam.accuracy_min.get()), None),
    )];
    if let Some(most) = exam.length_correlation_max {
        // If all lengths are equal, the correlation is undefined.
        let value = format!(
            "max((select coalesce(abs(corr(e.margin, cast(length(l.chosen) - length(l.rejected) as double))), 0) \
             from {comparison} e join {labels} l on l.row_key = e.pair))"
        );
        all.push((
            "length_correlation",
            expectation(value, None, Some(most.get())),
        ));
    }
    if let Some(most) = exam.flip_rate_max {
        // A judge that sees one answer at a time has no position bias.
        let value = "avg(case when flips then 1.0 else 0.0 end)".to_owned();
        all.push(("flip_rate", expectation(value, None, Some(most.get()))));
    }
    if let Some(golden) = &exam.golden {
        let id = golden.id.replace('\'', "''");
        let value = format!(
            "max(case when id = '{id}' then abs(chosen_reward - ({})) end)",
            golden.chosen_reward
        );
        all.push((
            "golden",
            expectation(value, None, Some(golden.tolerance.into())),
        ));
    }
    all
}
