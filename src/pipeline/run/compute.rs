//! The compute stages: a table of few rows, built in one piece from whole tables.

use std::time::Instant;

use super::report::{Start, Unit};
use super::runner::{Runner, took};
use crate::config::PlannedStage;
use crate::stages::{ComputeStage, Failure, WholeTables};
use ovchat_data::store::TableVersion;

impl Runner<'_> {
    /// Builds a table that is computed from whole tables.
    pub(super) fn compute_whole(
        &mut self,
        stage: &PlannedStage,
        round: Option<u32>,
        work: &dyn ComputeStage,
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
        let manifest = self.folder.manifest();
        let rows_in = stage.inputs.iter().filter_map(|(_, input)| {
            let made = manifest.find(input.as_str(), self.plan.round_of(input, round));
            made.map(TableVersion::rows)
        });
        let rows_in = rows_in.max().unwrap_or(0);
        let root = self.folder.root();
        let images = manifest.images.iter().map(|file| root.join(&file.file));
        let interrupt = self.interrupt;
        let judges = stage.inputs.iter().filter_map(|(_, table)| {
            let name = self.plan.judge_of(table)?;
            Some((table.clone(), name))
        });
        let tables = WholeTables {
            judges: judges.collect(),
            files: self.input_files(stage, round),
            images: images.collect(),
            stopping: &|| interrupt.raised(),
        };
        let rows = work.compute(&tables)?;
        let mut writer = self.writer(table, round, "part-00000", &stage.schema);
        match rows.num_rows() {
            // A table without rows still has columns for readers.
            0 => writer.write_nothing()?,
            _ => writer.write(&rows)?,
        }
        let files = writer.finish()?;
        let done = rows.num_rows() as u64;
        self.report.progress(done);
        self.finish_in_one(table, round, rows_in, files, took(begun, done))
    }
}
