//! The preflight of a run: its forecast, token counts and memory estimates. `plan` prints it;
//! `plan` and `run` reject a pipeline by it.

use std::collections::HashSet;
use std::num::NonZeroU32;
use std::path::Path;

use super::failed::Failed;
use super::memory::{self, Taken};
use super::tokens::{self, Extent, TokenCounts};
use ovchat_data::store::Rates;
use ovchat_models::ModelLoader;
use ovchat_pipeline::config::{Diagnostic, KeyPath, NO_KEY, Plan};
use ovchat_pipeline::run::{self, Forecast};
use ovchat_pipeline::stages::{Failure, TableName};

/// The tables that a run would build, with their tokens and memory.
pub struct Preflight {
    pub forecasts: Vec<Forecast>,
    pub tokens: Vec<TokenCounts>,
    pub taken: Vec<Taken>,
}

impl Preflight {
    /// Returns everything that `plan` shows.
    pub fn of_plan(
        plan: &Plan,
        folder: &Path,
        loader: Option<&dyn ModelLoader>,
        workers: Option<NonZeroU32>,
    ) -> Result<Self, Failed> {
        let rates = Rates::open(Rates::usual_place());
        let forecasts = run::forecast(plan, folder, loader, &rates);
        let mut forecasts = forecasts.map_err(|failure| words(plan, &failure))?;
        for forecast in &mut forecasts {
            let stage = plan.stage(&forecast.table).expect("a table of the plan");
            let count = run::workers_of(plan, stage, loader, workers, false);
            let count = count.map_err(|failure| words(plan, &failure))?.unwrap_or(1);
            let seconds = &mut forecast.estimate.seconds;
            *seconds = seconds.map(|seconds| seconds / f64::from(count));
        }
        let tokens = tokens::count(plan, folder, &forecasts, Extent::Enough)?;
        Self::measured(plan, loader, workers, forecasts, tokens)
    }

    /// Returns as much as is needed to decide whether a run may start. Data of an existing run that
    /// cannot be read is no reason to refuse it: the run repairs its tables, or reports the errors
    /// in the user's files.
    pub fn of_run(
        plan: &Plan,
        folder: &Path,
        loader: Option<&dyn ModelLoader>,
        workers: Option<NonZeroU32>,
    ) -> Result<Self, Failed> {
        let mut known = (Vec::new(), Vec::new());
        if folder.join("manifest.json").exists() {
            let rates = Rates::default();
            let forecasts = run::forecast_of_run(plan, folder, loader, &rates).unwrap_or_default();
            let counted = tokens::count(plan, folder, &forecasts, Extent::UntilOneFits);
            known = (forecasts, counted.unwrap_or_default());
        }
        let (forecasts, tokens) = known;
        Self::measured(plan, loader, workers, forecasts, tokens)
    }

    fn measured(
        plan: &Plan,
        loader: Option<&dyn ModelLoader>,
        workers: Option<NonZeroU32>,
        forecasts: Vec<Forecast>,
        tokens: Vec<TokenCounts>,
    ) -> Result<Self, Failed> {
        let taken = memory::of_plan(plan, &tokens, loader, workers);
        Ok(Self {
            taken: taken.map_err(|failure| words(plan, &failure))?,
            forecasts,
            tokens,
        })
    }

    /// Returns diagnostics for stages that do not fit this machine's memory or a model's context,
    /// among the stages that a run would build, up to `until`.
    pub fn refusals(&self, plan: &Plan, until: Option<&TableName>) -> Vec<Diagnostic> {
        let made = self.made(plan, until);
        let mut refusals = memory::refusals(plan, &self.taken);
        refusals.extend(tokens::refusals(plan, &self.tokens));
        refusals.retain(|(table, _)| made.contains(table));
        refusals.into_iter().map(|(_, refusal)| refusal).collect()
    }

    /// Returns diagnostics for API keys missing from the environment, of the models that a run
    /// would use.
    pub fn missing_keys(&self, plan: &Plan, until: Option<&TableName>) -> Vec<Diagnostic> {
        let made = self.made(plan, until);
        let stages = plan.all().filter(|stage| made.contains(&stage.name));
        let used: Vec<KeyPath> = stages
            .flat_map(|stage| stage.spec.as_stage().uses())
            .map(|used| KeyPath::root().key("models").key(used.model.as_str()))
            .collect();
        let notes = plan.warnings.iter().filter(|one| one.code == NO_KEY);
        let notes = notes.filter(|note| used.iter().any(|model| note.at.path.is_in(model)));
        notes.cloned().map(Diagnostic::as_error).collect()
    }

    /// Returns the tables that a run would build.
    fn made<'p>(&self, plan: &'p Plan, until: Option<&TableName>) -> HashSet<&'p TableName> {
        let mut slots = plan.slots();
        if let Some(last) = slots
            .iter()
            .position(|(stage, _)| Some(&stage.name) == until)
        {
            slots.truncate(last + 1);
        }
        // A new run builds everything.
        let is_made = |table: &TableName, round: Option<u32>| {
            let of_slot = |made: &&Forecast| made.table == *table && made.round == round;
            let made = self.forecasts.iter().find(of_slot);
            self.forecasts.is_empty() || made.is_some_and(Forecast::is_work)
        };
        let made = slots
            .iter()
            .filter(|(stage, round)| is_made(&stage.name, *round));
        made.map(|(stage, _)| &stage.name).collect()
    }
}

pub fn words(plan: &Plan, failure: &Failure) -> Failed {
    Failed::Words(plan.secrets.hide(&failure.to_string()))
}
