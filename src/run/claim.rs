//! Claiming: which tables of the run are current, which are set aside, and which come back.
//!
//! What was made under another key, or is no longer in the plan, is parked in the store; so is all
//! that was made from it, so that nobody queries or exports rows that no longer belong together.

use std::collections::HashSet;

use serde_json::Value;

use super::keys::{explain, in_words};
use super::{Runner, titled};
use crate::config::PlannedStage;
use crate::stages::{Failure, TableName, Work};
use crate::store::{Event, Made};

impl Runner<'_> {
    /// Sees to it that the manifest has a table under this key, to be begun or gone on with. False
    /// when it is complete already.
    pub(super) fn claim(
        &mut self,
        table: &TableName,
        round: Option<u32>,
        kind: Option<&str>,
        key: &str,
        because: &Value,
    ) -> Result<bool, Failure> {
        let name = table.as_str();
        if let Some(made) = self.folder.manifest().find(name, round)
            && made.key != key
        {
            let reasons = in_words(&explain(&made.because, because));
            self.report.note(&format!(
                "{} is made again: {reasons}",
                titled(table, round)
            ));
            self.folder.park(name, round)?;
            self.park_dependents(table, round)?;
        }
        if self.folder.manifest().find(name, round).is_none() {
            self.folder.unpark(name, round, key)?;
        }
        if let Some(made) = self.folder.manifest().find(name, round) {
            return Ok(!made.complete);
        }
        self.folder.commit(Event::Begin(Made {
            table: name.to_owned(),
            round,
            kind: kind.map(str::to_owned),
            key: key.to_owned(),
            because: because.clone(),
            part_groups: 0,
            complete: false,
            content: None,
            parts: Vec::new(),
            states: Vec::new(),
            checkpoint: None,
            expected: self.expected(table, round),
        }))?;
        Ok(true)
    }

    /// Sets tables aside that the pipeline no longer has, or has not in that round: nobody should
    /// query or export them as if they belonged to it.
    pub(super) fn park_unplanned(
        &mut self,
        slots: &[(&PlannedStage, Option<u32>)],
    ) -> Result<(), Failure> {
        let planned = |made: &Made| {
            slots.iter().any(|(stage, round)| {
                *round == made.round
                    && tables_of(stage)
                        .iter()
                        .any(|table| table.as_str() == made.table)
            })
        };
        let unplanned: Vec<_> = self
            .folder
            .manifest()
            .made
            .iter()
            .filter(|made| !planned(made) && !self.folder.manifest().is_kept(made.round))
            .cloned()
            .collect();
        for made in unplanned {
            self.folder.park(&made.table, made.round)?;
        }
        Ok(())
    }

    /// Sets everything aside that was made from a table which is about to be made again. What turns
    /// out to be as before comes back without work.
    fn park_dependents(&mut self, table: &TableName, round: Option<u32>) -> Result<(), Failure> {
        let mut stale = HashSet::from([(table.clone(), round)]);
        for (stage, round) in self.plan.slots() {
            if self.folder.manifest().is_kept(round) {
                continue;
            }
            let reads = stage.inputs.iter().any(|(_, input)| {
                stale.contains(&(input.clone(), self.plan.round_of(input, round)))
            });
            let uses = stage.spec.as_stage().uses().iter().any(|used| {
                let training = self.plan.training(stage, used.model, round);
                training.is_some_and(|(table, round)| stale.contains(&(table.clone(), Some(round))))
            });
            if reads || uses {
                for table in tables_of(stage) {
                    self.folder.park(table.as_str(), round)?;
                }
                stale.insert((stage.name.clone(), round));
            }
        }
        Ok(())
    }
}

/// The tables that a stage makes: its own, and the one that a training needs before its first step.
pub(super) fn tables_of(stage: &PlannedStage) -> Vec<TableName> {
    let mut tables = vec![stage.name.clone()];
    // A query's SQL may be read from a file; only trainings have a second table.
    if stage.kind.is_some()
        && let Work::Fold(work) = stage.spec.as_stage().work()
        && let Some((before, _)) = work.before(&stage.name)
    {
        tables.push(before);
    }
    tables
}
