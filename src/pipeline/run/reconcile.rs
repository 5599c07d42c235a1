//! Reconciling a table with its key: keep the current version, restore an archived one, or begin a
//! new one.
//!
//! A complete table built under another key stays visible to readers until its new version is
//! complete; so does everything built from it. Tables that are no longer in the plan are archived
//! when a complete run ends.

use serde_json::Value;

use super::keys::{explain, explained, in_words};
use super::runner::{Runner, Slot, titled};
use crate::config::PlannedStage;
use crate::stages::{Failure, StageKind, TableName};
use ovchat_data::store::TableVersion;
use ovchat_data::tables::{Health, Row};

impl Runner<'_> {
    /// Ensures that the manifest has a version under this key, to be begun or resumed, whose
    /// checkpoint goes to the folder `checkpoint`. Returns false if such a version is complete
    /// already, even if only staged.
    pub(super) fn reconcile(
        &mut self,
        table: &TableName,
        round: Option<u32>,
        kind: Option<&str>,
        key: &str,
        because: &Value,
        checkpoint: Option<&str>,
    ) -> Result<bool, Failure> {
        let name = table.as_str();
        let explained = explained(because, self.plan.stage(table));
        let manifest = self.folder.manifest();
        let goes_on = manifest
            .staged(name, round)
            .is_some_and(|made| made.key == key);
        if let Some(made) = manifest.find(name, round)
            && made.key != key
            && !goes_on
        {
            let reasons = explain(&made.because, &explained);
            let reasons = in_words(&reasons, self.plan, table);
            let mut archived = manifest.archived.iter().map(|archived| &archived.made);
            let returns =
                archived.any(|made| made.is(name, round) && made.key == key && made.complete);
            let deed = if returns { "restoring" } else { "rebuilding" };
            let title = titled(table, round);
            self.report.note(&format!("{deed} {title}: {reasons}"));
        }
        if !goes_on {
            self.folder.archive_staged(name, round)?;
            let is_blocked = self.folder.is_blocked(name, round, key, checkpoint);
            let current = self.folder.manifest().find(name, round);
            if current.is_some_and(|made| !made.complete && (made.key != key || is_blocked)) {
                self.folder.archive(name, round)?;
            }
            let current = self.folder.manifest().find(name, round);
            if current.is_none_or(|made| made.key != key) {
                self.folder.restore(name, round, key, checkpoint)?;
            }
        }
        if let Some(made) = self.folder.manifest().under_way(name, round)
            && made.key == key
        {
            return Ok(!made.complete);
        }
        let made = TableVersion {
            table: name.to_owned(),
            round,
            kind: kind.map(str::to_owned),
            key: key.to_owned(),
            because: explained,
            part_groups: 0,
            is_gathered: false,
            threads: None,
            workers: None,
            complete: false,
            content: None,
            parts: Vec::new(),
            states: Vec::new(),
            checkpoint: None,
            expected: self.expected(table, round),
        };
        self.folder.begin(made, checkpoint)?;
        Ok(true)
    }

    /// Returns the tables that are no longer in the pipeline, or not in that round. The health of a round
    /// is there once the round has ended; before the run `has_ended`, it counts as planned.
    pub(super) fn unplanned(&self, slots: &[Slot<'_>], has_ended: bool) -> Vec<TableVersion> {
        let is_health = |made: &TableVersion| {
            let is_guarded = made
                .round
                .is_some_and(|round| self.guarded.contains(&round));
            made.kind.as_deref() == Some(Health::KIND) && (is_guarded || !has_ended)
        };
        let planned = |made: &TableVersion| {
            slots.iter().any(|(stage, round)| {
                *round == made.round
                    && (is_health(made)
                        || tables_of(stage)
                            .iter()
                            .any(|table| table.as_str() == made.table))
            })
        };
        let manifest = self.folder.manifest();
        let made = manifest.made.iter();
        made.filter(|made| !planned(made) && !manifest.is_kept(made.round))
            .cloned()
            .collect()
    }

    /// Archives these tables, and staged versions that a complete run did not resume, so that they
    /// are not queried or exported as part of the pipeline.
    pub(super) fn archive_unplanned(&mut self, slots: &[Slot<'_>]) -> Result<(), Failure> {
        for made in self.unplanned(slots, true) {
            self.folder.archive(&made.table, made.round)?;
        }
        let staged = self.folder.manifest().staged.iter();
        let staged: Vec<_> = staged
            .map(|made| (made.table.clone(), made.round))
            .collect();
        for (table, round) in staged {
            self.folder.archive_staged(&table, round)?;
        }
        Ok(())
    }
}

/// Returns the tables that a stage builds: its own, and the one that a training needs before its
/// first step.
pub(super) fn tables_of(stage: &PlannedStage) -> Vec<TableName> {
    let mut tables = vec![stage.name.clone()];
    // A query's SQL may be read from a file; only training stages have a second table.
    if stage.kind.is_some()
        && let StageKind::Train(work) = stage.spec.as_stage().work()
        && let Some((before, _)) = work.before(&stage.name)
    {
        tables.push(before);
    }
    tables
}
