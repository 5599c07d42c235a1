//! Expectations: tables are checked against the pipeline's `expect` entries and its limit on
//! rejects.

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::Float64Type;
use arrow::util::pretty::pretty_format_batches;

use super::query::ask;
use super::runner::Runner;
use crate::config::{Expectation, Otherwise, PlannedStage};
use crate::stages::{Failure, TableName};
use ovchat_data::store::{TableVersion, read_file};
use ovchat_data::tables::{Reject, RejectClass};
use ovchat_query::QueryTable;

/// The number of offending rows that a message shows.
const SHOWN: usize = 3;

impl Runner<'_> {
    /// Checks the expectations of a complete table. Runs in every run, also for tables that an
    /// earlier run built: an expectation that failed then fails again.
    pub(super) fn expect(
        &mut self,
        stage: &PlannedStage,
        round: Option<u32>,
    ) -> Result<(), Failure> {
        let plan = self.plan;
        for (name, expectation) in &plan.expect {
            if expectation.table != stage.name {
                continue;
            }
            let Some(problem) = self.problem(expectation, round)? else {
                continue;
            };
            let of_round = round.map_or_else(String::new, |round| format!(" (round {round})"));
            let words = format!(
                "expectation `{name}` failed for `{}`{of_round}: {problem}",
                stage.name
            );
            match expectation.otherwise {
                Otherwise::Warn => self.report.note(&format!("warning: {words}")),
                Otherwise::Stop => {
                    return Err(Failure::Other(format!(
                        "{words}\nto see its rows, run:\n{}\nchange the stage that builds the table, or the expectation",
                        self.sql_of(&stage.name, round, &format!("select * from {}", stage.name))
                    )));
                }
            }
        }
        Ok(())
    }

    /// Fails if more rows were rejected as faulty than the pipeline allows.
    pub(super) fn check_rejects(
        &self,
        table: &TableName,
        round: Option<u32>,
    ) -> Result<(), Failure> {
        let made = self.under_way(table, round);
        let total: u64 = made.parts.iter().map(|part| part.rows_in).sum();
        let faults: u64 = made.parts.iter().map(|part| part.faults).sum();
        let share_max = self.plan.reject_share_max.get();
        if faults as f64 <= share_max * total as f64 {
            return Ok(());
        }
        let first = self.first_fault(made)?;
        let are = match total {
            1 => "row is",
            _ => "rows are",
        };
        Err(Failure::Other(format!(
            "{faults} of {total} {are} faulty, more than `reject_share_max: {share_max}` allows; the first is \
             {first}\nto see all, run:\n{}\nfix them, or raise `reject_share_max`",
            self.sql_of(
                table,
                round,
                &format!("select * from rejects where stage = '{table}'")
            )
        )))
    }

    fn first_fault(&self, made: &TableVersion) -> Result<String, Failure> {
        for file in made.rejects() {
            let path = self.folder.root().join(&file.file);
            for row in read_file::<Reject>(&path)? {
                if row.class == RejectClass::Fault {
                    return Ok(format!("{}: {}", row.id, row.reason));
                }
            }
        }
        Ok("not recorded".to_owned())
    }

    /// Returns the command that queries a refused version: it is in its usual place, or is staged
    /// beside the table that it would have replaced.
    pub(super) fn sql_of(&self, table: &TableName, round: Option<u32>, query: &str) -> String {
        let staged = self.folder.manifest().staged(table.as_str(), round);
        let flag = if staged.is_some() { "--staged " } else { "" };
        let folder = self.folder.root().display();
        format!("pipeline sql {flag}{folder} \"{query}\"")
    }

    /// Returns the message of a failed expectation; `None` if it holds.
    fn problem(
        &self,
        expectation: &Expectation,
        round: Option<u32>,
    ) -> Result<Option<String>, Failure> {
        let mut tables = Vec::new();
        let manifest = self.folder.manifest();
        for stage in self.plan.all() {
            let name = stage.name.as_str();
            let table_round = self.plan.round_of(&stage.name, round);
            let made = if stage.name == expectation.table {
                manifest.under_way(name, table_round)
            } else {
                manifest.find(name, table_round)
            };
            if let Some(made) = made.filter(|made| made.complete) {
                tables.push(QueryTable {
                    name: name.to_owned(),
                    schema: stage.schema.clone(),
                    files: vec![(None, self.folder.checked(made.files()))],
                    with_round: false,
                });
            }
        }
        let mut found: Vec<RecordBatch> = Vec::new();
        let mut count = 0;
        ask(self.interrupt, &expectation.sql(), &tables, None, |batch| {
            if count < SHOWN && batch.num_rows() > 0 {
                found.push(batch.slice(0, batch.num_rows().min(SHOWN - count)));
            }
            count += batch.num_rows();
            Ok(())
        })?;
        if expectation.query.is_none() {
            if count > 1 {
                return Err(Failure::Other(format!(
                    "the expected value of `{}` must be one number, but `{}` returned {count} rows: \
                     aggregate them into one value, such as avg(reward)",
                    expectation.table,
                    expectation.value.as_deref().unwrap_or_default()
                )));
            }
            let value = found.first().and_then(|batch| {
                let values = batch.column(0).as_primitive::<Float64Type>();
                values.is_valid(0).then(|| values.value(0))
            });
            return Ok(expectation.judge(value));
        }
        if count == 0 {
            return Ok(None);
        }
        let rows =
            pretty_format_batches(&found).map_err(|error| Failure::Other(error.to_string()))?;
        let plural = if count == 1 { "row" } else { "rows" };
        let first = if count > SHOWN {
            ", starting with:"
        } else {
            ":"
        };
        Ok(Some(format!("{count} {plural}{first}\n{rows}")))
    }
}
