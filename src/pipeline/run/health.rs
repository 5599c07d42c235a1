//! The health of a round: metrics by SQL, the conditions of the guard, and the value of `rounds.by`.
//!
//! After a round, they become the rows of the table `health`, which the run builds without a stage.
//! Then the guard acts: it warns, or stops the run.

mod queries;
mod read;

use std::path::{Path, PathBuf};
use std::time::Instant;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type};
use serde_json::{Value, json};

use super::keys::{known_key, table_key};
use super::runner::{Runner, took};
use super::stop::tables_up_to;
use crate::config::{Action, Condition, METRICS, Plan};
use crate::stages::{Failure, TableName};
use ovchat_data::store::{LABELS, PartRecord, StoreError, TableFile, read_file};
use ovchat_data::tables::{Health, Label, Row};
use ovchat_query::{self as query, Param, Part, QueryTable};
use queries::{MetricQuery, queries};
use read::KEPT_BY;
pub use read::{BestRound, best_round, health_of, rounded};

/// The version of the metrics: raised when their queries or the way they are run change.
const VERSION: u32 = 1;

/// The metric of a query of `guard`.
const QUERY: &str = "query";

impl Runner<'_> {
    /// Ends a round: builds its `health` and does what the guard says.
    pub(super) fn guard(&mut self, round: u32) -> Result<(), Failure> {
        let plan = self.plan;
        if self.folder.manifest().is_kept(Some(round)) || !has_health(plan) {
            return Ok(());
        }
        let queries: Vec<MetricQuery> = queries(plan)
            .into_iter()
            .filter(|query| self.is_there(query, round))
            .collect();
        if queries.is_empty()
            && plan.keep_by.is_none()
            && plan.guard.iter().all(|one| !one.is_written)
        {
            return Ok(());
        }
        self.threads = None;
        let table = TableName::try_from(Health::KIND.to_owned()).expect("a valid name");
        let because = self.because_of_health(&queries, round);
        let key = table_key(&because);
        if self.reconcile(
            &table,
            Some(round),
            Some(Health::KIND),
            &key,
            &because,
            None,
        )? {
            self.build_health(&table, round, &queries)?;
        }
        self.folder.replace_by_staged(table.as_str(), Some(round))?;
        self.guarded.insert(round);
        self.act(&table, round)
    }

    /// True if the tables of a query are there in a round.
    fn is_there(&self, query: &MetricQuery, round: u32) -> bool {
        let manifest = self.folder.manifest();
        let is_complete = |table: &TableName| {
            let made = manifest.find(table.as_str(), Some(round));
            made.is_some_and(|made| made.complete)
        };
        query.of_round.iter().all(is_complete)
    }

    /// Returns the key inputs of the health of a round: its queries, and the tables of all rounds so far.
    fn because_of_health(&self, queries: &[MetricQuery], round: u32) -> Value {
        let hide = |text: &str| self.plan.secrets.hide(text);
        let sql: Vec<String> = queries.iter().map(|query| hide(&query.sql)).collect();
        let guard = self.plan.guard.iter();
        let guard: serde_json::Map<String, Value> = guard
            .map(|guard| (hide(&guard.text), json!(guard.action.as_str())))
            .collect();
        let by = self.plan.keep_by.as_deref();
        // Hidden values of the environment have hashes instead.
        let written = self
            .plan
            .guard
            .iter()
            .map(|guard| guard.text.as_str())
            .chain(by);
        let is_hidden = written.into_iter().any(|text| hide(text) != text);
        let references = self.plan.environment.iter().filter(|_| is_hidden);
        let references = references.map(|one| (one.name.clone(), json!(one.sha256)));
        let made = self.folder.manifest().made.iter().filter(|made| {
            made.complete
                && self
                    .plan
                    .all()
                    .any(|stage| stage.name.as_str() == made.table)
                && made.round.is_none_or(|of| of <= round)
        });
        let inputs = made.map(|made| {
            let name = match made.round {
                Some(of) => format!("{} (round {of})", made.table),
                None => made.table.clone(),
            };
            (name, Value::from(known_key(made)))
        });
        let inputs: serde_json::Map<String, Value> = inputs.collect();
        // Labels belong to no table version.
        let labels = labels_of(self.folder.root(), round);
        let labels = labels
            .iter()
            .map(|file| file.path.metadata().map_or(0, |data| data.len()));
        let settings = json!({
            "queries": sql, "guard": guard, "by": by.map(hide), "labels": labels.sum::<u64>(),
            "env": references.collect::<serde_json::Map<_, _>>(),
        });
        json!({
            "settings": { "health": settings },
            "inputs": inputs, "models": {}, "files": {}, "version": [VERSION],
        })
    }

    fn build_health(
        &mut self,
        table: &TableName,
        round: u32,
        queries: &[MetricQuery],
    ) -> Result<(), Failure> {
        let mut tables = tables_up_to(self.plan, &self.folder, round);
        tables.push(QueryTable {
            name: LABELS.to_owned(),
            schema: Label::schema(),
            files: vec![(None, labels_of(self.folder.root(), round))],
            with_round: false,
        });
        // A run that was killed goes on behind what it has committed.
        if !self.has_part(table, round, 0) {
            let begun = Instant::now();
            let mut rows = Vec::new();
            for query in queries {
                let found = match self.metrics(query, &tables, round) {
                    Ok(found) => found,
                    Err(Failure::Query(problem)) => {
                        // A metric is no reason to lose a run.
                        self.report.note(&format!(
                            "warning: round {round}: no health of `{}`: {problem}",
                            query.source
                        ));
                        continue;
                    }
                    Err(failure) => return Err(failure),
                };
                rows.extend(found.into_iter().filter(|row| row.n != Some(0)));
            }
            // The rows of a union have no order.
            rows.sort_by_key(|row| METRICS.iter().position(|metric| metric.name == row.metric));
            for row in &mut rows {
                self.judge(row);
            }
            self.commit_health(table, round, 0, &rows, begun)?;
        }
        if !self.has_part(table, round, 1) {
            let begun = Instant::now();
            // These queries may read the metrics of this round.
            tables.push(self.health_up_to(table, round));
            let rows = self.answers_of_queries(&tables, round)?;
            self.commit_health(table, round, 1, &rows, begun)?;
        }
        self.finish(table, Some(round), None, None)
    }

    fn has_part(&self, table: &TableName, round: u32, part: u32) -> bool {
        let made = self
            .folder
            .manifest()
            .under_way(table.as_str(), Some(round));
        made.is_some_and(|made| made.parts.iter().any(|known| known.part == part))
    }

    /// Returns the rows of the queries of `guard`, and of `rounds.by`.
    fn answers_of_queries(
        &self,
        tables: &[QueryTable],
        round: u32,
    ) -> Result<Vec<Health>, Failure> {
        let mut rows = Vec::new();
        let plan = self.plan;
        for guard in &plan.guard {
            if let Condition::Query(sql) = &guard.condition {
                let met = self.value(sql, tables, round, "the query of `guard`")? == Some(1.0);
                let text = plan.secrets.hide(&guard.text);
                rows.push(Health {
                    condition: met.then(|| text.clone()),
                    action: met.then(|| guard.action.as_str().to_owned()),
                    ..row(QUERY, text, Some(f64::from(u8::from(met))))
                });
            }
        }
        if let Some(sql) = &plan.keep_by {
            let value = self.value(sql, tables, round, "`rounds.by`")?;
            rows.push(row(KEPT_BY, plan.secrets.hide(sql), value));
        }
        Ok(rows)
    }

    /// Computes the metrics of a query.
    fn metrics(
        &self,
        metrics: &MetricQuery,
        tables: &[QueryTable],
        round: u32,
    ) -> Result<Vec<Health>, Failure> {
        let mut rows = Vec::new();
        self.after_round(&metrics.sql, tables, round, |batch| {
            let number = |name: &str| -> Vec<Option<f64>> {
                let Some(column) = batch.column_by_name(name) else {
                    return vec![None; batch.num_rows()];
                };
                numbers(column)
            };
            let [values, counts, lows, highs] = ["value", "n", "low", "high"].map(number);
            let names = cast(&batch.column(0), &DataType::Utf8).expect("a text is a text");
            let names = names.as_string::<i32>();
            for at in 0..batch.num_rows() {
                rows.push(Health {
                    n: counts[at].map(|n| n as i64),
                    low: lows[at].map(stable),
                    high: highs[at].map(stable),
                    ..row(
                        names.value(at),
                        metrics.source.clone(),
                        values[at].map(stable),
                    )
                });
            }
            Ok(())
        })?;
        Ok(rows)
    }

    /// Returns the value of a query that returns one number or boolean, or no row.
    fn value(
        &self,
        sql: &str,
        tables: &[QueryTable],
        round: u32,
        name: &str,
    ) -> Result<Option<f64>, Failure> {
        let mut values = Vec::new();
        self.after_round(sql, tables, round, |batch| {
            values.extend(numbers(batch.column(0)));
            Ok(())
        })?;
        match values[..] {
            [value] => Ok(value),
            [] => Ok(None),
            _ => Err(Failure::Other(format!(
                "{name} returned {} rows after round {round}, expected one: aggregate the rows into one\n{sql}",
                values.len()
            ))),
        }
    }

    fn after_round(
        &self,
        sql: &str,
        tables: &[QueryTable],
        round: u32,
        mut sink: impl FnMut(&RecordBatch) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let spill = tempfile::tempdir_in(self.folder.cache()?)
            .map_err(StoreError::io("create a folder in", self.folder.root()))?;
        let params = [("round", Param::Integer(round.into()))];
        query::stream(sql, &params, tables, &[], Some(spill.path()), |part| {
            if self.interrupt.raised() {
                return Err(Failure::Interrupted);
            }
            match part {
                Part::Rows(batch) => sink(&batch),
                Part::Header(_) | Part::Nothing => Ok(()),
            }
        })
    }

    /// Notes the strictest condition of the guard that a metric meets.
    fn judge(&self, row: &mut Health) {
        for guard in &self.plan.guard {
            if let Condition::Bound(bound) = &guard.condition
                && bound.metric == row.metric
                && bound.is_met(row.value, row.low, row.high)
                && (row.action.is_none() || guard.action == Action::Stop)
            {
                row.condition = Some(guard.text.clone());
                row.action = Some(guard.action.as_str().to_owned());
            }
        }
    }

    fn commit_health(
        &mut self,
        table: &TableName,
        round: u32,
        part: u32,
        rows: &[Health],
        begun: Instant,
    ) -> Result<(), Failure> {
        let name = format!("part-{part:05}");
        let mut writer = self.writer(table, Some(round), &name, &Health::schema());
        match rows {
            [] => writer.write_nothing()?,
            _ => writer.write(&Health::to_batch(rows))?,
        }
        let part = PartRecord {
            part,
            rows_in: 0,
            files: writer.finish()?,
            rejects: Vec::new(),
            telemetry: Vec::new(),
            faults: 0,
            dropped: 0,
            took: Some(took(begun, rows.len() as u64)),
        };
        self.commit_part(table, Some(round), part)
    }

    /// Returns the table `health` of the rounds so far, with the version of `round` that is being built.
    fn health_up_to(&self, table: &TableName, round: u32) -> QueryTable {
        let manifest = self.folder.manifest();
        let before = manifest.made.iter().filter(|made| {
            made.table == table.as_str() && made.complete && made.round < Some(round)
        });
        let made = before.chain(manifest.under_way(table.as_str(), Some(round)));
        QueryTable {
            name: table.to_string(),
            schema: Health::schema(),
            files: made
                .map(|made| (made.round, self.folder.checked(made.files())))
                .collect(),
            with_round: true,
        }
    }

    /// Warns of the conditions that are true after a round, and fails if one of them stops the run.
    fn act(&mut self, table: &TableName, round: u32) -> Result<(), Failure> {
        let mut stops = Vec::new();
        for file in self.folder.files(table.as_str(), Some(round)) {
            for row in read_file::<Health>(&file)? {
                if row.metric == KEPT_BY && row.value.is_none() && round > 0 {
                    self.report.note(&format!(
                        "warning: round {round}: `rounds.by` has no value, so this round cannot be the best"
                    ));
                }
                let Some(condition) = &row.condition else {
                    continue;
                };
                let words = in_words(&row, condition);
                if row.action.as_deref() == Some(Action::Stop.as_str()) {
                    stops.push(words);
                } else {
                    self.report
                        .note(&format!("warning: round {round}: {words}"));
                }
            }
        }
        if stops.is_empty() {
            return Ok(());
        }
        Err(Failure::Other(format!(
            "the guard stops the run after round {round}: {}\nall tables and checkpoints so far are kept; to see the \
             metrics, run:\npipeline health {}\nchange what causes it, or the condition under `guard`, and run again",
            stops.join("; "),
            self.folder.root().display()
        )))
    }
}

/// Returns a sentence about a condition that is true.
pub fn in_words(row: &Health, condition: &str) -> String {
    if row.metric == QUERY {
        let query = condition.split_whitespace().collect::<Vec<_>>().join(" ");
        return format!("a query of `guard` is true: {query}");
    }
    let number =
        |value: Option<f64>| value.map_or_else(|| "null".to_owned(), |value| rounded(value));
    let interval = match (row.low, row.high) {
        (Some(_), Some(_)) => format!(" [{}, {}]", number(row.low), number(row.high)),
        _ => String::new(),
    };
    let (metric, source) = (&row.metric, &row.source);
    format!(
        "`{metric}` of `{source}` is {}{interval}, and the guard watches for {condition}",
        number(row.value)
    )
}

/// Returns a number with twelve significant digits. The others depend on the order of the rows in the
/// files of a table, which depends on where a run was interrupted.
fn stable(value: f64) -> f64 {
    let text = format!("{value:.11e}");
    text.parse().expect("a number that was just written")
}

/// True if a run of the plan builds the table `health`.
pub fn has_health(plan: &Plan) -> bool {
    plan.all().all(|stage| stage.name.as_str() != Health::KIND)
}

fn row(metric: &str, source: String, value: Option<f64>) -> Health {
    Health {
        metric: metric.to_owned(),
        source,
        value: value.filter(|value| value.is_finite()),
        n: None,
        low: None,
        high: None,
        condition: None,
        action: None,
    }
}

/// Returns the values of a column of numbers or booleans.
fn numbers(column: &dyn Array) -> Vec<Option<f64>> {
    match cast(column, &DataType::Float64) {
        Ok(column) => column.as_primitive::<Float64Type>().iter().collect(),
        Err(_) => vec![None; column.len()],
    }
}

/// Returns the files of labels of a round, and of those that belong to none.
fn labels_of(root: &Path, round: u32) -> Vec<TableFile> {
    let entries = std::fs::read_dir(root.join(LABELS)).into_iter().flatten();
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let is_of_round = |path: &PathBuf| {
        let stem = path
            .file_stem()
            .and_then(|stem| stem.to_str())
            .unwrap_or_default();
        let of = stem
            .rsplit_once("-round-")
            .and_then(|(_, number)| number.parse::<u32>().ok());
        of.is_none_or(|of| of == round)
    };
    let mut paths: Vec<PathBuf> = paths
        .filter(|path| path.extension() == Some("jsonl".as_ref()) && is_of_round(path))
        .collect();
    paths.sort();
    paths.into_iter().map(TableFile::from).collect()
}

#[cfg(test)]
mod tests {
    use super::stable;

    #[test]
    fn the_last_digits_do_not_depend_on_the_order_of_rows() {
        assert_eq!(stable(0.1 + 0.2), 0.3);
        assert_eq!(stable(-1.0 / 3.0), -0.333_333_333_333);
    }
}
