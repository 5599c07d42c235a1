//! The forecast of a run: the tables it would reuse or build, with reasons, row counts and
//! estimated times.

use std::path::Path;

use super::keys::{Keys, Reason, explain, explained, known_key, table_key};
use super::runner::Runner;
use super::stop::ends;
use crate::config::{Plan, PlannedStage};
use crate::stages::{Failure, StageKind, TableName};
use ovchat_data::store::{
    Expected, Fingerprints, Manifest, Rates, RunFolder, StoreError, TableVersion,
};
use ovchat_models::ModelLoader;

/// The action that a run takes on a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// The table is up to date.
    Reuse,
    /// An archived version of the table is restored.
    Return,
    /// The table was begun and is resumed; `rows` of its rows exist.
    Resume { rows: u64 },
    /// The table is built: it is new (no reasons), or its key inputs changed.
    Make {
        reasons: Vec<Reason>,
        /// True if rows whose own input is unchanged are reused.
        by_row: bool,
    },
}

/// The estimated size and time of a table, where known.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Estimate {
    pub rows: Option<u64>,
    /// Seconds to build the table, from the rates of this run or else of this machine.
    pub seconds: Option<f64>,
    pub bytes: Option<u64>,
}

/// A table in a round, and the action that a run takes on it.
#[derive(Debug, Clone, PartialEq)]
pub struct Forecast {
    pub table: TableName,
    pub round: Option<u32>,
    pub action: Action,
    pub estimate: Estimate,
}

impl Forecast {
    /// True if any part of the table would be built.
    pub fn is_work(&self) -> bool {
        !matches!(self.action, Action::Reuse | Action::Return)
    }
}

/// Returns the forecast of a run of the plan in `folder`. Writes nothing and opens no model, but
/// `loader` must be the one that the run would use, since it determines the models' precision.
pub fn forecast(
    plan: &Plan,
    folder: &Path,
    loader: Option<&dyn ModelLoader>,
    rates: &Rates,
) -> Result<Vec<Forecast>, Failure> {
    Ok(foresee(plan, folder, loader, rates)?.0)
}

/// Returns the forecast of a run that is about to start in `folder`, and saves the fingerprints of
/// the files it read there, so that the run does not read them again.
pub fn forecast_of_run(
    plan: &Plan,
    folder: &Path,
    loader: Option<&dyn ModelLoader>,
    rates: &Rates,
) -> Result<Vec<Forecast>, Failure> {
    let (forecasts, keys) = foresee(plan, folder, loader, rates)?;
    // Fingerprints that cannot be saved are computed again.
    drop(keys.save());
    Ok(forecasts)
}

fn foresee<'a>(
    plan: &'a Plan,
    folder: &Path,
    loader: Option<&'a dyn ModelLoader>,
    rates: &Rates,
) -> Result<(Vec<Forecast>, Keys<'a>), Failure> {
    let run = match RunFolder::read(folder) {
        Ok(run) => Some(run),
        Err(StoreError::NotARun { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let nothing = Manifest::new(folder, plan.pipeline.as_str());
    let manifest = run.as_ref().map_or(&nothing, RunFolder::manifest);
    let fingerprints = Fingerprints::open(folder.join(".cache/fingerprints.json"));
    let mut keys = Keys::new(plan, loader, fingerprints);
    let mut forecasts: Vec<Forecast> = Vec::new();
    let mut round_before = None;
    for (stage, round) in plan.slots() {
        if let (Some(ended), Some(run)) = (round_before, &run)
            && round > Some(ended)
            && ended > 0
        {
            // The last round is known only if none of the tables that `stop_when` reads is rebuilt.
            let mut so_far = forecasts.iter();
            if so_far.all(|made| made.action == Action::Reuse) && ends(plan, run, ended, || false)?
            {
                break;
            }
        }
        round_before = round;
        let kept = manifest.find(stage.name.as_str(), round);
        if let Some(made) = kept.filter(|_| manifest.is_kept(round)) {
            let key = known_key(made).to_owned();
            keys.know(&stage.name, round, key);
            forecasts.push(Forecast {
                table: stage.name.clone(),
                round,
                action: Action::Reuse,
                estimate: of_made(made),
            });
            continue;
        }
        let because = keys.because(stage, round)?;
        let key = table_key(&because);
        let current = manifest.find(stage.name.as_str(), round);
        let archived = manifest
            .archived
            .iter()
            .rev()
            .map(|archived| &archived.made);
        let mut archived =
            archived.filter(|made| made.table == stage.name.as_str() && made.round == round);
        let current_fits = current.filter(|made| made.key == key);
        let staged = manifest.staged(stage.name.as_str(), round);
        let others = staged.into_iter().chain(archived.clone());
        let found = current_fits.or_else(|| others.into_iter().find(|made| made.key == key));
        let action = match (found, current.or_else(|| archived.next())) {
            (Some(made), _) if made.complete && current_fits.is_some() => Action::Reuse,
            (Some(made), _) if made.complete => Action::Return,
            (Some(made), _) => Action::Resume { rows: made.rows() },
            (None, None) => Action::Make {
                reasons: Vec::new(),
                by_row: false,
            },
            (None, Some(before)) => {
                let now = explained(&because, Some(stage));
                let reasons = explain(&before.because, &now);
                let maps = stage.kind.is_some()
                    && matches!(stage.spec.as_stage().work(), StageKind::Rows(_));
                let only_inputs = reasons
                    .iter()
                    .all(|reason| matches!(reason, Reason::Input(_)));
                let by_row = maps && only_inputs;
                Action::Make { reasons, by_row }
            }
        };
        let known = match found.filter(|made| made.complete) {
            Some(made) => made.content.clone().unwrap_or_else(|| key.clone()),
            None if is_load(stage) => {
                // Its rows are unknown, and may turn out to be unchanged.
                format!("rows of {key}")
            }
            None => key,
        };
        keys.know(&stage.name, round, known);
        let estimate = if let Some(made) = found.filter(|made| made.complete) {
            of_made(made)
        } else {
            let rows_in = |table: &TableName| {
                let round = plan.round_of(table, round);
                let of_table = |made: &&Forecast| made.table == *table && made.round == round;
                forecasts.iter().find(of_table)?.estimate.rows
            };
            {
                let known = Known {
                    manifest,
                    rates,
                    keys: &keys,
                    forecasts: &forecasts,
                };
                known.estimate(stage, round, &rows_in)?
            }
        };
        forecasts.push(Forecast {
            table: stage.name.clone(),
            round,
            action,
            estimate,
        });
    }
    Ok((forecasts, keys))
}

/// Returns the actual size of an existing table.
fn of_made(made: &TableVersion) -> Estimate {
    Estimate {
        rows: Some(made.rows()),
        seconds: Some(0.0),
        bytes: Some(made.bytes()),
    }
}

/// The data that estimates are based on.
struct Known<'a> {
    manifest: &'a Manifest,
    rates: &'a Rates,
    keys: &'a Keys<'a>,
    /// The forecasts of earlier rounds.
    forecasts: &'a [Forecast],
}

impl Known<'_> {
    /// Estimates a table that is to be built. `rows_in` returns the number of rows of an input.
    fn estimate(
        &self,
        stage: &PlannedStage,
        round: Option<u32>,
        rows_in: &dyn Fn(&TableName) -> Option<u64>,
    ) -> Result<Estimate, Failure> {
        let input = stage.inputs.first().and_then(|(_, table)| rows_in(table));
        let last = last_making(self.manifest, stage, round);
        let rows = match (
            stage.spec.as_stage().expected_rows(input.unwrap_or(0)),
            input,
        ) {
            (Some(rows), Some(_)) => Some(rows),
            _ if is_load(stage) => Some(records(stage)?),
            // A table without a rule for its size has about as many rows as last time.
            _ => last
                .map(TableVersion::rows)
                .or_else(|| {
                    let mut earlier = self.forecasts.iter().rev();
                    let earlier = earlier.find(|other| other.table == stage.name)?;
                    earlier.estimate.rows
                })
                .or_else(|| stage.spec.as_stage().rows_at_most(rows_in)),
        };
        // An unreadable model is reported by `check`.
        let rate = self
            .keys
            .pace(stage)
            .ok()
            .and_then(|pace| self.rates.get(&pace));
        let per_row = |whole: f64, of: u64| (of > 0).then(|| whole / of as f64);
        let took = last.and_then(TableVersion::took);
        let pace = took.and_then(|took| per_row(took.seconds, took.rows));
        let size = last.and_then(|made| per_row(made.bytes() as f64, made.rows()));
        let pace = pace.or(rate.map(|rate| rate.seconds_per_row));
        let size = size.or(rate.map(|rate| rate.bytes_per_row));
        let times = |pace: Option<f64>| Some(pace? * rows? as f64);
        Ok(Estimate {
            rows,
            seconds: times(pace),
            bytes: times(size).map(|bytes| bytes as u64),
        })
    }
}

/// Returns true for a load stage. Queries are excluded first, since requesting their work would
/// read their file.
fn is_load(stage: &PlannedStage) -> bool {
    stage.kind.is_some() && matches!(stage.spec.as_stage().work(), StageKind::Load(_))
}

/// Counts the records of a user's file, including faulty ones, which are only known once loaded.
fn records(stage: &PlannedStage) -> Result<u64, Failure> {
    let StageKind::Load(load) = stage.spec.as_stage().work() else {
        return Ok(0);
    };
    let mut count = 0;
    for record in load.records()? {
        record?;
        count += 1;
    }
    Ok(count)
}

/// Returns the latest complete version of a table, of this round if there is one.
fn last_making<'m>(
    manifest: &'m Manifest,
    stage: &PlannedStage,
    round: Option<u32>,
) -> Option<&'m TableVersion> {
    let archived = manifest.archived.iter().map(|archived| &archived.made);
    let of_table = archived.chain(&manifest.made);
    let whole = of_table.filter(|made| made.table == stage.name.as_str() && made.complete);
    // Versions that reused rows of others say less about time.
    whole.max_by_key(|made| {
        let computed = made.took().is_some_and(|took| took.rows > 0);
        (computed, made.round == round, made.round)
    })
}

impl Runner<'_> {
    /// Returns the estimate for a table that is begun.
    pub(super) fn expected(&self, table: &TableName, round: Option<u32>) -> Expected {
        let Some(stage) = self.plan.stage(table) else {
            return Expected::default();
        };
        let manifest = self.folder.manifest();
        let rows_in = |input: &TableName| {
            let made = manifest.find(input.as_str(), self.plan.round_of(input, round));
            made.map(TableVersion::rows)
        };
        if is_load(stage) {
            return Expected::default();
        }
        let known = Known {
            manifest,
            rates: &self.rates,
            keys: &self.keys,
            forecasts: &[],
        };
        let expected = known.estimate(stage, round, &rows_in);
        expected.map_or_else(
            |_| Expected::default(),
            |Estimate { rows, seconds, .. }| Expected { rows, seconds },
        )
    }
}
