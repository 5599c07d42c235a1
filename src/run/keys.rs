//! What decides a table, as JSON: hashed it is the table's key, compared it explains a re-run.

use std::collections::HashMap;
use std::fmt;

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::config::{Plan, PlannedStage};
use crate::models::{Asking, Dtype, ModelLoader, ModelSpec};
use crate::stages::{Failure, Load, ModelState, Role, StageSpec, TableName, Use, Work};
use crate::store::{Fingerprints, Key};

/// Counts changes of this program that change what tables hold although nothing in the pipeline did.
const KEY_VERSION: u32 = 1;

/// What decides each table of a plan.
pub struct Keys<'a> {
    plan: &'a Plan,
    loader: Option<&'a dyn ModelLoader>,
    fingerprints: Fingerprints,
    /// What readers of a table are keyed by.
    known: HashMap<(TableName, Option<u32>), String>,
}

impl<'a> Keys<'a> {
    pub fn new(
        plan: &'a Plan,
        loader: Option<&'a dyn ModelLoader>,
        fingerprints: Fingerprints,
    ) -> Self {
        Self {
            plan,
            loader,
            fingerprints,
            known: HashMap::new(),
        }
    }

    /// Notes what readers of a table are keyed by.
    pub fn know(&mut self, table: &TableName, round: Option<u32>, key: String) {
        self.known.insert((table.clone(), round), key);
    }

    /// Writes down which files were read, so that they are not read again.
    pub fn save(&self) -> Result<(), Failure> {
        Ok(self.fingerprints.save()?)
    }

    /// Everything that decides a table in a round.
    pub fn because(&self, stage: &PlannedStage, round: Option<u32>) -> Result<Value, Failure> {
        let spec = stage.spec.as_stage();
        let mut inputs = Map::new();
        for (field, table) in &stage.inputs {
            let key = self
                .known
                .get(&(table.clone(), self.plan.round_of(table, round)));
            let key = key
                .expect("inputs are made first [ref:plan_is_ordered]")
                .clone();
            // Some stages read several tables under one field, and know them by name.
            let name = if matches!(stage.spec, StageSpec::Sql(_) | StageSpec::Combine(_))
                || (*field == "rewards" && matches!(stage.spec, StageSpec::AskPeople(_)))
            {
                format!("{field}.{table}")
            } else {
                (*field).to_owned()
            };
            inputs.insert(name, Value::String(key));
        }
        let mut models = Map::new();
        for used in spec.uses() {
            let fingerprint = self.model(stage, &used, round)?;
            models.insert(used.field.to_owned(), Value::String(fingerprint));
        }
        let files = self.files(stage)?;
        let mut because = json!({ "settings": stage.settings, "inputs": inputs, "models": models, "files": files });
        because["version"] = json!([KEY_VERSION, spec.version()]);
        if spec.draws() {
            because["seed"] = json!(self.plan.seed);
            because["round"] = json!(round);
            because["name"] = json!(stage.name.as_str());
        }
        Ok(because)
    }

    /// Fingerprints of a stage's files: for a source that is loaded, of the pictures that it names,
    /// not of the whole folder in which they lie.
    fn files(&self, stage: &PlannedStage) -> Result<Map<String, Value>, Failure> {
        let mut files = Map::new();
        let work = stage.kind.map(|_| stage.spec.as_stage().work());
        let load = match &work {
            Some(Work::Load(load)) => Some(load),
            _ => None,
        };
        for (field, path) in stage.spec.as_stage().files() {
            if load.is_some() && field == "images" {
                continue;
            }
            let fingerprint = Value::String(self.fingerprints.folder(path)?);
            // A stage may name several files under one field.
            let others = files.keys().filter(|name| name.starts_with(field)).count();
            let name = match others {
                0 => field.to_owned(),
                _ => format!("{field}[{others}]"),
            };
            files.insert(name, fingerprint);
        }
        if let Some(load) = load {
            files.insert(
                "pictures".to_owned(),
                Value::String(pictures(&self.fingerprints, &**load)?),
            );
        }
        Ok(files)
    }

    /// What decides what a model computes, for a stage in a round: its weights and its precision,
    /// not where its files lie, nor the device.
    pub fn model(
        &self,
        stage: &PlannedStage,
        used: &Use<'_>,
        round: Option<u32>,
    ) -> Result<String, Failure> {
        let spec = &self.plan.models[used.model];
        let asking = spec.asking().map(|asking| {
            // The text's content counts, not where it lies.
            json!({ "ask": Asking { template: None, ..asking.clone() } })
        });
        if spec.speaker().is_some() {
            let speaks = Use {
                model: self.plan.speaker(used.model),
                role: Role::Answers,
                ..*used
            };
            let mut key = Key::new("asked").with(self.model(stage, &speaks, round)?);
            for (field, path) in spec.paths() {
                key = key.with(field).with(self.fingerprints.folder(path)?);
            }
            return Ok(key.with_json(&asking.unwrap_or_default()).finish());
        }
        let precision = self.precision(spec, used)?;
        let training = match used.state {
            ModelState::Now => self.plan.training(stage, used.model, round),
            ModelState::Initial => None,
        };
        if let Some((table, round)) = training {
            let key = self.known.get(&(table.clone(), Some(round)));
            let key = key.expect("rounds are run in order [ref:plan_is_ordered]");
            return Ok(Key::new("checkpoint").with(key).with(precision).finish());
        }
        let mut key = Key::new("model").with(spec.network()).with(precision);
        if let Some(asking) = asking {
            key = key.with_json(&asking);
        }
        if let ModelSpec::LlavaRlhf(judge) = spec
            && used.role == Role::Scores
            && judge.caption_orders.get() > 1
        {
            key = key.with(judge.caption_orders.get().to_le_bytes());
        }
        if let ModelSpec::Sql(reward) = spec {
            key = key.with(&reward.reward);
        }
        if let ModelSpec::Http(http) = spec {
            key = key.with(&http.model);
        }
        if let ModelSpec::Scripted(scripted) = spec {
            key = key.with(scripted.words.to_le_bytes());
        }
        for (field, path) in spec.paths() {
            key = key.with(field).with(self.fingerprints.folder(path)?);
        }
        Ok(key.finish())
    }

    /// What decides how long a row of a table takes: the verb, its settings, how large its models are
    /// and in which precision and on how many threads they compute.
    pub fn pace(&self, stage: &PlannedStage) -> Result<String, Failure> {
        let mut key = Key::new("pace").with_json(&stage.settings);
        for used in stage.spec.as_stage().uses() {
            let spec = &self.plan.models[self.plan.speaker(used.model)];
            key = key.with(spec.network()).with(self.precision(spec, &used)?);
            for config in spec.configs() {
                key = key.with(self.fingerprints.file(&config)?);
            }
        }
        for (name, value) in self.loader.iter().flat_map(|loader| loader.build()) {
            key = key.with(name).with(value);
        }
        Ok(key.finish())
    }

    /// Learning answers and learning to score are in float32, whatever the model answers in.
    fn precision(&self, spec: &ModelSpec, used: &Use<'_>) -> Result<&'static str, Failure> {
        let is_wide = matches!(used.role, Role::LearnsAnswers | Role::LearnsRewards);
        let precision = match self.loader {
            _ if is_wide || !spec.needs_torch() => Dtype::Float32,
            Some(loader) => loader
                .precision(&spec.clone().opened())
                .map_err(Failure::of(used.model))?,
            None => Dtype::Auto,
        };
        Ok(match precision {
            Dtype::Auto => "auto",
            Dtype::Float32 => "float32",
            Dtype::Bfloat16 => "bfloat16",
        })
    }
}

/// The key of a table that is decided so.
pub fn table_key(because: &Value) -> String {
    Key::new("table").with_json(because).finish()
}

/// Pictures whose fingerprints are taken at once.
const PICTURES_AT_ONCE: usize = 4096;

/// Fingerprint of all pictures that a source names; a missing one counts as missing.
fn pictures(fingerprints: &Fingerprints, load: &dyn Load) -> Result<String, Failure> {
    let mut key = Key::new("pictures");
    let mut names = Vec::new();
    let mut take = |names: &mut Vec<std::path::PathBuf>| {
        let hashes: Vec<String> = names
            .par_iter()
            .map(|path| {
                fingerprints
                    .file(path)
                    .unwrap_or_else(|_| "missing".to_owned())
            })
            .collect();
        names.clear();
        key = hashes.iter().fold(key.clone(), Key::with);
    };
    for record in load.records()? {
        names.extend(load.pictures(&record?));
        if names.len() >= PICTURES_AT_ONCE {
            take(&mut names);
        }
    }
    take(&mut names);
    Ok(key.finish())
}

/// Why a table is made again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// A setting of the stage, by its path below the verb, was something else.
    Setting {
        name: String,
        before: Value,
        now: Value,
    },
    /// A table that it reads is not the one that it was made from.
    Input(String),
    /// So is the model under this setting.
    Model(String),
    /// Files that the stage reads, in words.
    Files(String),
    /// Something else, in words.
    Other(String),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Setting { name, before, now } => write!(f, "`{name}` {before} → {now}"),
            Self::Input(table) => write!(f, "its input `{table}` changed"),
            Self::Model(field) => write!(f, "the model under `{field}` changed"),
            Self::Files(words) | Self::Other(words) => f.write_str(words),
        }
    }
}

/// What differs between two becauses.
pub fn explain(before: &Value, now: &Value) -> Vec<Reason> {
    let mut reasons = Vec::new();
    compare("", before, now, &mut reasons);
    reasons
}

/// Reasons as one text.
pub fn in_words(reasons: &[Reason]) -> String {
    if reasons.is_empty() {
        return "it changed".to_owned();
    }
    let texts: Vec<String> = reasons.iter().map(ToString::to_string).collect();
    texts.join("; ")
}

fn compare(path: &str, before: &Value, now: &Value, reasons: &mut Vec<Reason>) {
    if before == now {
        return;
    }
    if let (Value::Object(old), Value::Object(new)) = (before, now) {
        for name in old
            .keys()
            .chain(new.keys().filter(|name| !old.contains_key(*name)))
        {
            let path = if path.is_empty() {
                name.clone()
            } else {
                format!("{path}.{name}")
            };
            let value =
                |object: &Map<String, Value>| object.get(name).cloned().unwrap_or(Value::Null);
            compare(&path, &value(old), &value(new), reasons);
        }
        return;
    }
    let (group, name) = path.split_once('.').unwrap_or(("", path));
    reasons.push(match group {
        "inputs" => Reason::Input(
            name.split_once('.')
                .map_or(name, |(_, table)| table)
                .to_owned(),
        ),
        "models" => Reason::Model(name.to_owned()),
        "files" if name == "pictures" => {
            Reason::Files("a picture that it names changed".to_owned())
        }
        "files" => Reason::Files(format!("the content of `{name}` changed")),
        "settings" => Reason::Setting {
            name: name
                .split_once('.')
                .map_or(name, |(_, setting)| setting)
                .to_owned(),
            before: before.clone(),
            now: now.clone(),
        },
        _ if path == "version" => Reason::Other("this program makes it in another way".to_owned()),
        _ => Reason::Other(format!("`{path}` {before} → {now}")),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rerun_is_explained_by_what_changed() {
        let before = json!({"settings": {"sample": {"temperature": 0.7, "count": 5}}, "inputs": {"prompts": "a"}, "seed": 1});
        let now = json!({"settings": {"sample": {"temperature": 0.8, "count": 5}}, "inputs": {"prompts": "b"}, "seed": 2});
        let reasons = explain(&before, &now);
        let texts: Vec<String> = reasons.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "`temperature` 0.7 → 0.8",
                "its input `prompts` changed",
                "`seed` 1 → 2"
            ]
        );
        assert!(explain(&now, &now).is_empty());
    }
}
