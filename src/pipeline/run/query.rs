//! The query stages: one SQL query builds a table.

use std::path::Path;
use std::time::Instant;

use arrow::array::RecordBatch;
use arrow::compute::cast;
use arrow::datatypes::SchemaRef;

use super::interrupt::Interrupt;
use super::report::{Start, Tally, Unit};
use super::runner::{Runner, took};
use crate::config::PlannedStage;
use crate::stages::{Failure, Query};
use ovchat_data::store::StoreError;
use ovchat_query::{self as query, Part, QueryTable};

impl Runner<'_> {
    pub(super) fn query(
        &mut self,
        stage: &PlannedStage,
        round: Option<u32>,
        work: &Query,
    ) -> Result<(), Failure> {
        let table = &stage.name;
        let begun = Instant::now();
        self.report.start(Start {
            table,
            round,
            unit: Unit::Rows,
            total: None,
            done: 0,
        });
        let mut tables = Vec::new();
        let mut rows_in = 0;
        for (_, input) in &stage.inputs {
            let input_round = self.plan.round_of(input, round);
            if let Some(made) = self.folder.manifest().find(input.as_str(), input_round) {
                rows_in = rows_in.max(made.rows());
            }
            tables.push(QueryTable {
                name: input.to_string(),
                schema: self
                    .plan
                    .stage(input)
                    .expect("the plan names every table")
                    .schema
                    .clone(),
                files: vec![(
                    input_round,
                    self.folder.table_files(input.as_str(), input_round),
                )],
                with_round: false,
            });
        }
        let mut writer = self.writer(table, round, "part-00000", &stage.schema);
        let mut done = 0;
        let mut tally = Tally::default();
        let spill = tempfile::tempdir_in(self.folder.cache()?)
            .map_err(StoreError::io("create a folder in", self.folder.root()))?;
        let (report, interrupt) = (&mut *self.report, self.interrupt);
        ask(interrupt, &work.sql, &tables, Some(spill.path()), |batch| {
            done += batch.num_rows() as u64;
            writer.write(&fitted(&batch, &stage.schema)?)?;
            tally.rewards(&batch);
            report.figures(&tally.figures);
            report.progress(done);
            Ok(())
        })?;
        if done == 0 {
            // A table without rows still has columns for readers.
            writer.write_nothing()?;
        }
        let files = writer.finish()?;
        self.finish_in_one(table, round, rows_in, files, took(begun, done))
    }
}

/// Runs a query; stops waiting for it when the run is interrupted.
pub(super) fn ask(
    interrupt: &Interrupt,
    sql: &str,
    tables: &[QueryTable],
    spill: Option<&Path>,
    mut sink: impl FnMut(RecordBatch) -> Result<(), Failure>,
) -> Result<(), Failure> {
    query::stream(sql, &[], tables, &[], spill, |part| {
        if interrupt.raised() {
            return Err(Failure::Interrupted);
        }
        match part {
            Part::Rows(batch) => sink(batch),
            Part::Header(_) | Part::Nothing => Ok(()),
        }
    })
}

/// Returns the columns of the table, in its order and types.
fn fitted(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch, Failure> {
    let column = |field: &arrow::datatypes::FieldRef| {
        let column = batch.column_by_name(field.name());
        let column = column
            .ok_or_else(|| Failure::Other(format!("the query has no column `{}`", field.name())))?;
        cast(column, field.data_type()).map_err(|error| Failure::Other(error.to_string()))
    };
    let columns = schema
        .fields()
        .iter()
        .map(column)
        .collect::<Result<_, _>>()?;
    RecordBatch::try_new(schema.clone(), columns).map_err(|error| Failure::Other(error.to_string()))
}
