//! Whether tables are as the pipeline expects them.

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::Float64Type;
use arrow::util::pretty::pretty_format_batches;

use super::Runner;
use crate::config::{Expectation, Otherwise, PlannedStage};
use crate::query::{self, QueryTable};
use crate::stages::Failure;

/// Rows that are shown of those that should not be there.
const SHOWN: usize = 3;

impl Runner<'_> {
    /// Checks what is expected of a table that is there. Done in every run, also for a table that an
    /// earlier one made: what was not as expected then is not now.
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
                "`{name}` expects something else of `{}`{of_round}: {problem}",
                stage.name
            );
            match expectation.otherwise {
                Otherwise::Warn => self.report.note(&format!("warning: {words}")),
                Otherwise::Stop => {
                    return Err(Failure::Other(format!(
                        "{words}\nnothing behind it was made; look with `pipeline sql {}`, and change \
                         what makes the table, or what is expected",
                        self.folder.root().display()
                    )));
                }
            }
        }
        Ok(())
    }

    /// What is not as expected, if anything is.
    fn problem(
        &self,
        expectation: &Expectation,
        round: Option<u32>,
    ) -> Result<Option<String>, Failure> {
        let mut tables = Vec::new();
        for stage in self.plan.all() {
            let table_round = self.plan.round_of(&stage.name, round);
            let made = self
                .folder
                .manifest()
                .find(stage.name.as_str(), table_round);
            if made.is_some_and(|made| made.complete) {
                tables.push(QueryTable {
                    name: stage.name.to_string(),
                    schema: stage.schema.clone(),
                    files: vec![(None, self.folder.files(stage.name.as_str(), table_round))],
                    with_round: false,
                });
            }
        }
        let mut found: Vec<RecordBatch> = Vec::new();
        let mut count = 0;
        query::run(
            &expectation.sql(),
            &[],
            &tables,
            &[],
            None,
            |batch| -> Result<(), Failure> {
                if count < SHOWN && batch.num_rows() > 0 {
                    found.push(batch.slice(0, batch.num_rows().min(SHOWN - count)));
                }
                count += batch.num_rows();
                Ok(())
            },
        )?;
        if expectation.query.is_none() {
            if count > 1 {
                return Err(Failure::Other(format!(
                    "the value that is expected of `{}` must be one number, and `{}` gave {count} rows: \
                     aggregate them into one value, such as: avg(reward)",
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
            ", the first of them:"
        } else {
            ":"
        };
        Ok(Some(format!("{count} {plural}{first}\n{rows}")))
    }
}
