//! Notes that are printed before anything changes: the tables that a run replaces, and the devices
//! on which its models compute.

use std::path::Path;

use super::forecast::Action;
use super::keys::Reason;
use super::options::Options;
use super::reconcile::tables_of;
use super::report::Report;
use super::runner::{LAST, LAST_WHOLE, RunError, Runner, Slot};
use super::train::checkpoint_of;
use super::workers::places::number_of;
use crate::config::Plan;
use crate::stages::{Failure, ModelName, TableName};
use ovchat_data::store::TableVersion;
use ovchat_models::{ModelLoader, Placement};

/// Tables with the rounds in which they are replaced; empty rounds for a table without rounds.
type Replaced = Vec<(String, Vec<u32>)>;

/// Reports the placement of each model of the run. Fails before anything is built if a device
/// cannot be used.
pub(super) fn say_placements(
    plan: &Plan,
    until: Option<&TableName>,
    loader: &dyn ModelLoader,
    report: &mut dyn Report,
) -> Result<(), RunError> {
    let mut placements: Vec<(Placement, Vec<&ModelName>)> = Vec::new();
    for (stage, round) in plan.slots() {
        for used in stage.spec.as_stage().uses() {
            let model = plan.backing_model(used.model);
            let spec = &plan.models[model];
            let is_told = placements.iter().any(|(_, models)| models.contains(&model));
            if is_told || !spec.needs_torch() {
                continue;
            }
            let placement = loader.placement(&spec.clone().opened());
            let placement = placement.map_err(|error| RunError {
                stage: Some(stage.name.clone()),
                round,
                failure: Box::new(Failure::of(model)(error)),
            })?;
            let Some(placement) = placement else {
                continue;
            };
            match placements.iter_mut().find(|(known, _)| *known == placement) {
                Some((_, models)) => models.push(model),
                None => placements.push((placement, vec![model])),
            }
        }
        if until == Some(&stage.name) {
            break;
        }
    }
    for (placement, models) in placements {
        let models: Vec<&str> = models.iter().map(|model| model.as_str()).collect();
        let Placement {
            device,
            precision,
            reason,
        } = placement;
        report.note(&format!(
            "{}: computing on {device} in {precision} ({reason})",
            models.join(", ")
        ));
    }
    Ok(())
}

/// Reports the workers and the tables that they compute. Fails if there cannot be as many.
pub(super) fn say_workers(
    plan: &Plan,
    options: &Options<'_>,
    loader: Option<&dyn ModelLoader>,
    report: &mut dyn Report,
) -> Result<(), RunError> {
    let Some(workers) = &options.workers else {
        return Ok(());
    };
    let mut computed: Vec<(u32, Vec<&str>)> = Vec::new();
    let mut others: Vec<&str> = Vec::new();
    for stage in plan.all() {
        let is_in_cluster = workers.ranks.is_some();
        let count = number_of(plan, stage, loader, workers.asked, is_in_cluster);
        let count = count.map_err(|failure| RunError {
            stage: Some(stage.name.clone()),
            round: None,
            failure: Box::new(failure),
        })?;
        // A training's own table is computed here, what it needs first is not.
        match count.filter(|_| stage.trained().is_none()) {
            None => others.push(stage.name.as_str()),
            Some(count) => match computed.iter_mut().find(|(known, _)| *known == count) {
                Some((_, tables)) => tables.push(stage.name.as_str()),
                None => computed.push((count, vec![stage.name.as_str()])),
            },
        }
    }
    for (count, tables) in &computed {
        let noun = if *count == 1 { "worker" } else { "workers" };
        let here = match workers.ranks {
            Some(ranks) => format!(" of each of {} ranks", ranks.world),
            None => String::new(),
        };
        report.note(&format!("{count} {noun}{here}: {}", tables.join(", ")));
    }
    if let Some(ranks) = workers.ranks {
        report.note(&format!("rank {} alone: {}", ranks.rank, others.join(", ")));
    }
    Ok(())
}

impl Runner<'_> {
    /// Lists the complete tables that the run replaces, the reasons, and the command that restores
    /// them.
    pub(super) fn announce(&mut self, options: &Options<'_>, slots: &[Slot<'_>]) {
        let manifest = self.folder.manifest();
        let mut replaced: Vec<&TableVersion> = Vec::new();
        let mut reasons: Vec<String> = Vec::new();
        let mut is_past = false;
        for one in &options.forecasts {
            // The rest of the first round that has the table is not built either.
            if is_past {
                break;
            }
            is_past = options.until.as_ref() == Some(&one.table);
            let Some(stage) = self.plan.stage(&one.table) else {
                continue;
            };
            // A table under the same key stays.
            if matches!(one.action, Action::Reuse) {
                continue;
            }
            let checkpoint = checkpoint_of(self.plan, stage, one.round);
            let table = one.table.as_str();
            let displaced = self
                .folder
                .displaced(table, one.round, None, checkpoint.as_deref());
            let mut displaced: Vec<&TableVersion> =
                displaced.filter(|made| made.complete).collect();
            if let Action::Make { reasons, .. } = &one.action
                && reasons
                    .iter()
                    .any(|reason| matches!(reason, Reason::Input(_) | Reason::Model(_)))
            {
                // The reference's log-probabilities are rebuilt together with the pairs they belong
                // to.
                let beside = tables_of(stage).into_iter().skip(1);
                let beside = beside.filter_map(|table| manifest.find(table.as_str(), one.round));
                displaced.extend(beside.filter(|made| made.complete));
            }
            if displaced.is_empty() {
                continue;
            }
            for made in displaced {
                if !replaced.contains(&made) {
                    replaced.push(made);
                }
            }
            if let Action::Make { reasons: all, .. } = &one.action {
                let own = all
                    .iter()
                    .filter(|reason| !matches!(reason, Reason::Input(_) | Reason::Model(_)));
                for reason in own.map(|reason| reason.in_words(self.plan, &one.table)) {
                    if !reasons.contains(&reason) {
                        reasons.push(reason);
                    }
                }
            }
        }
        let mut removed = self.unplanned(slots, false);
        removed
            .retain(|made| options.until.is_none() && made.complete && !replaced.contains(&made));
        let folder = self.folder.root().display();
        let mut lines = Vec::new();
        if !replaced.is_empty() {
            let why = match reasons[..] {
                [] => String::new(),
                _ => format!("; reason: {}", reasons.join("; ")),
            };
            lines.push(format!(
                "replacing tables of {folder}: {}{why}; each stays readable until its new version is complete, \
                 and is then archived in .cache",
                listed(replaced)
            ));
        }
        if !removed.is_empty() {
            lines.push(format!(
                "removing tables of {folder} that are no longer in the pipeline: {}; they stay readable until \
                 the run completes, and are then archived in .cache",
                listed(&removed)
            ));
        }
        if !lines.is_empty() {
            lines.push(self.way_back(options));
            self.report.note(&lines.join("\n"));
        }
    }

    /// Lists the tables of later rounds that will be archived once `rounds.stop_when` has ended the
    /// rounds with `last`.
    pub(super) fn announce_end(&mut self, options: &Options<'_>, last: u32, reached: &[Slot<'_>]) {
        let mut removed = self.unplanned(reached, true);
        removed.retain(|made| made.round > Some(last));
        if !removed.is_empty() {
            let text = format!(
                "removing tables of {} after round {last}, the last one: {}; they are archived in .cache\n{}",
                self.folder.root().display(),
                listed(&removed),
                self.way_back(options)
            );
            self.report.note(&text);
        }
    }

    /// The line with the command that restores the tables which this run replaces: the last
    /// complete run, or the last run of any kind if the last complete run was this very command.
    fn way_back(&self, options: &Options<'_>) -> String {
        let command = |run: &str| self.before[run]["command"].as_str().map(str::to_owned);
        let of_file = || {
            let file = self.before["file"].as_str().unwrap_or("PIPELINE.yaml");
            format!("pipeline run {file}")
        };
        let runs = [LAST_WHOLE, LAST].map(command);
        let now = self.plan.secrets.hide(&options.command);
        let mut known = runs.into_iter().flatten().peekable();
        let first = known.peek().cloned().unwrap_or_else(of_file);
        let last = &self.before[LAST_WHOLE];
        let content = self.keys.fingerprints().file(&self.plan.path).ok();
        let is_edited = last["file"].as_str().map(Path::new) == Some(&self.plan.path)
            && last["content"].is_string()
            && last["content"].as_str() != content.as_deref();
        match known.find(|command| *command != now) {
            Some(other) if is_edited => {
                format!("to restore them, undo the change to the file and run: {other}")
            }
            Some(other) => format!("to restore them, run: {other}"),
            None if first != now => format!("to restore them, run: {first}"),
            None => format!("to restore them, undo the change and run: {now}"),
        }
    }
}

fn add(tables: &mut Replaced, table: &str, round: Option<u32>) {
    let known = tables.iter_mut().find(|(name, _)| name == table);
    match known {
        Some((_, rounds)) => rounds.extend(round),
        None => tables.push((table.to_owned(), round.into_iter().collect())),
    }
}

/// Formats versions as a list of tables, see [`in_words`].
pub fn listed<'m>(versions: impl IntoIterator<Item = &'m TableVersion>) -> String {
    let mut tables = Replaced::new();
    for made in versions {
        add(&mut tables, &made.table, made.round);
    }
    in_words(&tables)
}

/// Formats tables with their rounds: `prompts, pairs (rounds 1 to 3), steps (round 3)`.
fn in_words(tables: &Replaced) -> String {
    let texts = tables.iter().map(|(table, rounds)| {
        let mut rounds = rounds.clone();
        rounds.sort_unstable();
        match rounds[..] {
            [] => table.clone(),
            [round] => format!("{table} (round {round})"),
            [first, .., last] if last - first + 1 == rounds.len() as u32 => {
                format!("{table} (rounds {first} to {last})")
            }
            _ => {
                let rounds: Vec<String> = rounds.iter().map(ToString::to_string).collect();
                format!("{table} (rounds {})", rounds.join(", "))
            }
        }
    });
    texts.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_listed_with_their_rounds() {
        let mut tables = Replaced::new();
        for (table, round) in [
            ("prompts", None),
            ("pairs", Some(2)),
            ("pairs", Some(1)),
            ("steps", Some(3)),
        ] {
            add(&mut tables, table, round);
        }
        add(&mut tables, "grades", Some(0));
        add(&mut tables, "grades", Some(2));
        assert_eq!(
            in_words(&tables),
            "prompts, pairs (rounds 1 to 2), steps (round 3), grades (rounds 0, 2)"
        );
    }
}
