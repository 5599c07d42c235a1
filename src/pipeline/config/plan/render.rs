//! Rendering of a plan as readable equations.

use std::fmt::{self, Write as _};

use serde_json::Value;

use super::{Plan, PlannedStage};
use crate::config::secrets::Secrets;

impl Plan {
    /// Writes the plan as equations, grouped by the rounds in which they run.
    pub fn render(&self, f: &mut dyn fmt::Write) -> fmt::Result {
        let rounds = self.rounds.get();
        let plural = if rounds == 1 { "round" } else { "rounds" };
        let most = if self.stop_when.is_some() {
            "at most "
        } else {
            ""
        };
        writeln!(
            f,
            "{}: {most}{rounds} {plural}, seed {}",
            self.pipeline.as_str(),
            self.seed
        )?;
        let below = self.sources.layers.iter().skip(1);
        for layer in below {
            writeln!(f, "extends {}", layer.source.name)?;
        }
        if !self.models.is_empty() {
            writeln!(f, "\nmodels")?;
        }
        for (name, spec) in &self.models {
            let paths: Vec<_> = spec
                .paths()
                .iter()
                .map(|(field, path)| format!("{field}: {}", path.display()))
                .collect();
            let mut parts = paths;
            if let Some(backing_model) = spec.backing_model() {
                parts.insert(0, format!("backing model: {backing_model}"));
            }
            if let Some(http) = spec.endpoint() {
                parts.insert(
                    0,
                    format!("model: {} at {}", http.model, http.base_url.as_str()),
                );
            }
            let paths = self.secrets.hide(&parts.join(", "));
            write!(f, "  {name} = {}({paths})", spec.network())?;
            match self.trained_by(name) {
                Some(table) => writeln!(f, "   trained by {table}")?,
                None => writeln!(f)?,
            }
        }
        let once: Vec<_> = self.all().filter(|stage| stage.is_static).collect();
        self.render_group(f, "once", &once)?;
        let in_rounds: Vec<_> = self
            .stages
            .iter()
            .filter(|stage| !stage.is_static)
            .collect();
        let title = match rounds {
            1 => "in round 1".to_owned(),
            _ => format!("in each round, 1 to {rounds}"),
        };
        self.render_group(f, &title, &in_rounds)?;
        self.render_ends(f)?;
        for (round_first, title) in [
            (
                0,
                "evaluation, before round 1 (as round 0) and after every round",
            ),
            (1, "evaluation, after every round"),
        ] {
            let group: Vec<_> = self
                .evaluate
                .iter()
                .filter(|stage| !stage.is_static && stage.round_first == round_first)
                .collect();
            self.render_group(f, title, &group)?;
        }
        Ok(())
    }

    /// Writes the queries and conditions that follow a round.
    fn render_ends(&self, f: &mut dyn fmt::Write) -> fmt::Result {
        if let Some(query) = &self.stop_when {
            let query = self.secrets.hide(&words_of(query));
            writeln!(f, "  stops when: {query}")?;
        }
        if let Some(query) = &self.keep_by {
            let query = self.secrets.hide(&words_of(query));
            writeln!(f, "  keeps the best round by: {query}")?;
        }
        for guard in self.guard.iter().filter(|guard| guard.is_written) {
            let text = self.secrets.hide(&words_of(&guard.text));
            writeln!(f, "  guard: {text}: {}", guard.action.as_str())?;
        }
        Ok(())
    }

    fn render_group(
        &self,
        f: &mut dyn fmt::Write,
        title: &str,
        stages: &[&PlannedStage],
    ) -> fmt::Result {
        if stages.is_empty() {
            return Ok(());
        }
        writeln!(f, "\n{title}")?;
        for stage in stages {
            stage.render(f, &self.secrets)?;
        }
        Ok(())
    }
}

/// A query on one line.
fn words_of(query: &str) -> String {
    query.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl PlannedStage {
    /// Writes `rewards = score(candidates: candidates, judge: judge)`, then the other settings.
    fn render(&self, f: &mut dyn fmt::Write, secrets: &Secrets) -> fmt::Result {
        let stage = self.spec.as_stage();
        let mut named: Vec<String> = Vec::new();
        for (field, table) in &self.inputs {
            named.push(format!("{field}: {table}"));
        }
        for used in stage.uses() {
            named.push(format!("{}: {}", used.field, used.model));
        }
        for (field, path) in stage.files() {
            named.push(format!(
                "{field}: {}",
                secrets.hide(&path.display().to_string())
            ));
        }
        writeln!(
            f,
            "  {} = {}({})",
            self.name,
            self.stage_type(),
            named.join(", ")
        )?;
        let settings = self
            .settings
            .get(self.stage_type())
            .and_then(Value::as_object);
        let mut line = String::new();
        for (name, value) in settings
            .into_iter()
            .flatten()
            .filter(|(_, value)| !value.is_null())
        {
            let separator = if line.is_empty() { "" } else { ", " };
            let value = value.get("written").unwrap_or(value);
            write!(line, "{separator}{name}: {value}")?;
        }
        if !line.is_empty() {
            writeln!(f, "      {line}")?;
        }
        Ok(())
    }
}
