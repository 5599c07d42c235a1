//! The forecast of a run: the tables it would reuse or build, with reasons, row counts and
//! estimated times.

use std::path::Path;

use serde_json::Value;

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
    let fingerprints = Fingerprints::open(folder.join(".cache/fingerprints.json"));
    let mut forecaster = Forecaster {
        plan,
        manifest: run.as_ref().map_or(&nothing, RunFolder::manifest),
        rates,
        keys: Keys::new(plan, loader, fingerprints),
        forecasts: Vec::new(),
    };
    let mut round_before = None;
    for (stage, round) in plan.slots() {
        if let (Some(ended), Some(run)) = (round_before, &run)
            && round > Some(ended)
            && ended > 0
        {
            // The last round is known only if none of the tables that `stop_when` reads is rebuilt.
            let mut so_far = forecaster.forecasts.iter();
            if so_far.all(|made| made.action == Action::Reuse) && ends(plan, run, ended, || false)?
            {
                break;
            }
        }
        round_before = round;
        let forecast = forecaster.forecast(stage, round)?;
        forecaster.forecasts.push(forecast);
    }
    Ok((forecaster.forecasts, forecaster.keys))
}

/// A forecast in progress.
struct Forecaster<'a, 'm> {
    plan: &'a Plan,
    manifest: &'m Manifest,
    rates: &'m Rates,
    keys: Keys<'a>,
    /// The forecasts of the tables so far.
    forecasts: Vec<Forecast>,
}

impl Forecaster<'_, '_> {
    /// Forecasts a table in a round, and records its key for the tables that read it.
    fn forecast(&mut self, stage: &PlannedStage, round: Option<u32>) -> Result<Forecast, Failure> {
        let forecast = |action, estimate| Forecast {
            table: stage.name.clone(),
            round,
            action,
            estimate,
        };
        let kept = self.manifest.find(stage.name.as_str(), round);
        if let Some(made) = kept.filter(|_| self.manifest.is_kept(round)) {
            let key = known_key(made).to_owned();
            self.keys.know(&stage.name, round, key);
            return Ok(forecast(Action::Reuse, of_made(made)));
        }
        let because = self.keys.because(stage, round)?;
        let key = table_key(&because);
        let versions = Versions::of(self.manifest, &stage.name, round, &key);
        let action = versions.action(stage, &because);
        let complete = versions.found.filter(|made| made.complete);
        let known = match complete {
            Some(made) => made.content.clone().unwrap_or_else(|| key.clone()),
            None if is_load(stage) => {
                // Its rows are unknown, and may turn out to be unchanged.
                format!("rows of {key}")
            }
            None => key,
        };
        self.keys.know(&stage.name, round, known);
        let estimate = match complete {
            Some(made) => of_made(made),
            None => self.estimate(stage, round)?,
        };
        Ok(forecast(action, estimate))
    }

    /// Estimates a table that is to be built, from the forecasts of its inputs.
    fn estimate(&self, stage: &PlannedStage, round: Option<u32>) -> Result<Estimate, Failure> {
        let rows_in = |table: &TableName| {
            let round = self.plan.round_of(table, round);
            let of_table = |made: &&Forecast| made.table == *table && made.round == round;
            self.forecasts.iter().find(of_table)?.estimate.rows
        };
        let known = Known {
            manifest: self.manifest,
            rates: self.rates,
            keys: &self.keys,
            forecasts: &self.forecasts,
        };
        known.estimate(stage, round, &rows_in)
    }
}

/// The versions of a table that decide the action on it.
struct Versions<'m> {
    /// The current version, if it has the key.
    fitting: Option<&'m TableVersion>,
    /// The version that has the key: current, staged or archived.
    found: Option<&'m TableVersion>,
    /// The current version, or else the last archived one.
    before: Option<&'m TableVersion>,
}

impl<'m> Versions<'m> {
    fn of(manifest: &'m Manifest, table: &TableName, round: Option<u32>, key: &str) -> Self {
        let current = manifest.find(table.as_str(), round);
        let fitting = current.filter(|made| made.key == key);
        let archived = manifest.archived.iter().rev();
        let mut archived = archived
            .map(|archived| &archived.made)
            .filter(|made| made.is(table.as_str(), round));
        let staged = manifest.staged(table.as_str(), round);
        let mut others = staged.into_iter().chain(archived.clone());
        Self {
            fitting,
            found: fitting.or_else(|| others.find(|made| made.key == key)),
            before: current.or_else(|| archived.next()),
        }
    }

    /// Returns the action on the table, whose key inputs are `because`.
    fn action(&self, stage: &PlannedStage, because: &Value) -> Action {
        match (self.found, self.before) {
            (Some(made), _) if made.complete && self.fitting.is_some() => Action::Reuse,
            (Some(made), _) if made.complete => Action::Return,
            (Some(made), _) => Action::Resume { rows: made.rows() },
            (None, None) => Action::Make {
                reasons: Vec::new(),
                by_row: false,
            },
            (None, Some(before)) => {
                let now = explained(because, Some(stage));
                let reasons = explain(&before.because, &now);
                let is_input = |reason: &Reason| matches!(reason, Reason::Input(_));
                let by_row = is_by_row(stage) && reasons.iter().all(is_input);
                Action::Make { reasons, by_row }
            }
        }
    }
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

/// Returns true for a stage that maps groups of rows, each on its own.
fn is_by_row(stage: &PlannedStage) -> bool {
    stage.kind.is_some() && matches!(stage.spec.as_stage().work(), StageKind::Rows(_))
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
        let workers = self.workers(stage).ok().flatten().unwrap_or(1);
        expected.map_or_else(
            |_| Expected::default(),
            |Estimate { rows, seconds, .. }| Expected {
                rows,
                seconds: seconds.map(|seconds| seconds / f64::from(workers)),
            },
        )
    }
}
