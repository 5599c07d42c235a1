//! Table keys: the inputs that determine a table, as JSON; their hash is the key, their difference
//! explains a rebuild.

use std::collections::HashMap;
use std::fmt;

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::config::{Plan, PlannedStage, Span};
use crate::stages::{
    Failure, LoadStage, ModelRole, ModelState, StageKind, StageSpec, TableName, Use,
};
use ovchat_data::store::{Fingerprints, Key, TableVersion};
use ovchat_io::files;
use ovchat_models::{Dtype, JudgePromptSettings, ModelLoader, ModelSpec};

/// The version of the keys: raised when a change of this program changes table contents although
/// the pipeline is unchanged.
const KEY_VERSION: u32 = 1;

/// The key inputs of each table of a plan.
pub struct Keys<'a> {
    plan: &'a Plan,
    loader: Option<&'a dyn ModelLoader>,
    fingerprints: Fingerprints,
    /// The key under which readers of a table know it.
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

    /// Records the key under which readers of a table know it.
    pub fn know(&mut self, table: &TableName, round: Option<u32>, key: String) {
        self.known.insert((table.clone(), round), key);
    }

    pub fn fingerprints(&self) -> &Fingerprints {
        &self.fingerprints
    }

    /// Saves the fingerprints of the files that were read, so that the files are not read again.
    pub fn save(&self) -> Result<(), Failure> {
        Ok(self.fingerprints.save()?)
    }

    /// Returns the key inputs of a table in a round.
    pub fn because(&self, stage: &PlannedStage, round: Option<u32>) -> Result<Value, Failure> {
        let spec = stage.spec.as_stage();
        let mut inputs = Map::new();
        for (field, table) in &stage.inputs {
            let key = self
                .known
                .get(&(table.clone(), self.plan.round_of(table, round)));
            let key = key
                .expect("inputs are built first [ref:plan_is_ordered]")
                .clone();
            // Some stages read several tables under one field, and refer to them by name.
            let names_tables = match stage.spec {
                StageSpec::Sql(_) | StageSpec::Combine(_) => true,
                StageSpec::AskPeople(_) | StageSpec::Measure(_) => *field == "rewards",
                _ => false,
            };
            let name = if names_tables {
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

    /// Returns the fingerprints of a stage's files. For a load stage, these cover the media that
    /// the source names, not the whole image folder.
    fn files(&self, stage: &PlannedStage) -> Result<Map<String, Value>, Failure> {
        let mut files = Map::new();
        let work = stage.kind.map(|_| stage.spec.as_stage().work());
        let load = match &work {
            Some(StageKind::Load(load)) => Some(load),
            _ => None,
        };
        for (field, path) in stage.spec.as_stage().files() {
            if load.is_some() && field == "images" {
                continue;
            }
            let fingerprint = Value::String(self.fingerprints.folder(path)?);
            // A stage may have several files under one field.
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
                Value::String(media(&self.fingerprints, &**load)?),
            );
        }
        Ok(files)
    }

    /// Returns the fingerprint of a model for a stage in a round: it covers everything that affects
    /// the model's output (weights, precision), not file locations or the compute device.
    pub fn model(
        &self,
        stage: &PlannedStage,
        used: &Use<'_>,
        round: Option<u32>,
    ) -> Result<String, Failure> {
        let spec = &self.plan.models[used.model];
        let prompt_settings = spec.prompt_settings().map(|prompt_settings| {
            // The content of the templates matters, not their paths.
            let (template, system) = (None, None);
            json!({ "ask": JudgePromptSettings { template, system, ..prompt_settings.clone() } })
        });
        if spec.backing_model().is_some() {
            let speaks = Use {
                model: self.plan.backing_model(used.model),
                role: ModelRole::Answers,
                ..*used
            };
            let mut key = Key::new("asked").with(self.model(stage, &speaks, round)?);
            for (field, path) in spec.paths() {
                key = key.with(field).with(self.fingerprints.folder(path)?);
            }
            return Ok(key.with_json(&prompt_settings.unwrap_or_default()).finish());
        }
        let precision = self.precision(spec, used)?;
        let training = match used.state {
            ModelState::Now => self.plan.training(stage, used.model, round),
            ModelState::Initial => None,
        };
        if let Some((table, round)) = training {
            let key = self.known.get(&(table.clone(), Some(round)));
            let key = key.expect("rounds run in order [ref:plan_is_ordered]");
            return Ok(trained(key, precision));
        }
        let mut key = Key::new("model").with(spec.network()).with(precision);
        if let Some(prompt_settings) = prompt_settings {
            key = key.with_json(&prompt_settings);
        }
        if let Some(settings) = spec.key_settings(used.role == ModelRole::Scores) {
            key = key.with(settings);
        }
        for (field, path) in spec.paths() {
            key = key.with(field).with(self.fingerprints.folder(path)?);
        }
        Ok(key.finish())
    }

    /// Returns a key of everything that determines the time per row: the stage's settings, the size
    /// and precision of its models, and the number of threads.
    pub fn pace(&self, stage: &PlannedStage) -> Result<String, Failure> {
        let mut key = Key::new("pace").with_json(&stage.settings);
        for used in stage.spec.as_stage().uses() {
            let spec = &self.plan.models[self.plan.backing_model(used.model)];
            key = key.with(spec.network()).with(self.precision(spec, &used)?);
            for config in spec.configs() {
                key = key.with(self.fingerprints.file(&config)?);
            }
        }
        for (name, value) in self.loader.iter().flat_map(|loader| loader.build()) {
            key = key.with(name).with(value);
        }
        let threads = self.threads(stage)?;
        Ok(key.with(threads.unwrap_or(0).to_string()).finish())
    }

    /// Returns the number of threads of a stage's networks, the most that one of them needs; `None`
    /// without networks.
    pub fn threads(&self, stage: &PlannedStage) -> Result<Option<u32>, Failure> {
        let mut most = None;
        for used in stage.spec.as_stage().uses() {
            let spec = self.plan.models[self.plan.backing_model(used.model)].clone();
            if let Some(loader) = self.loader.filter(|_| spec.needs_torch()) {
                let threads = loader.threads(&spec.opened());
                most = most.max(threads.map_err(Failure::of(used.model))?);
            }
        }
        Ok(most)
    }

    /// Returns the precision in which a model computes.
    fn precision(&self, spec: &ModelSpec, used: &Use<'_>) -> Result<&'static str, Failure> {
        let precision = match self.loader {
            _ if !spec.needs_torch() => Dtype::Float32,
            Some(loader) => loader
                .precision(&spec.clone().opened())
                .map_err(Failure::of(used.model))?,
            None => Dtype::Auto,
        };
        Ok(match precision {
            Dtype::Auto => PRECISIONS[0],
            Dtype::Float32 => PRECISIONS[1],
            Dtype::Bfloat16 => PRECISIONS[2],
        })
    }
}

/// The precisions in which a model computes, as they appear in keys.
const PRECISIONS: [&str; 3] = ["auto", "float32", "bfloat16"];

/// Returns the fingerprint of a model with the checkpoint of a training.
fn trained(key: &str, precision: &str) -> String {
    Key::new("checkpoint").with(key).with(precision).finish()
}

/// Returns the key under which readers of a table know it: the hash of its content if known, else
/// its key.
pub(super) fn known_key(made: &TableVersion) -> &str {
    made.content.as_deref().unwrap_or(&made.key)
}

/// Returns the fingerprints that a model with the checkpoint of this table may have; none without a
/// checkpoint.
pub(super) fn checkpoint_keys(made: &TableVersion) -> impl Iterator<Item = String> + '_ {
    let precisions = made.checkpoint.iter().flat_map(|_| PRECISIONS);
    precisions.map(|precision| trained(known_key(made), precision))
}

/// Returns the table key for these key inputs.
pub fn table_key(because: &Value) -> String {
    Key::new("table").with_json(because).finish()
}

/// The number of images and videos that are fingerprinted at once.
const IMAGES_AT_ONCE: usize = 4096;

/// Returns the fingerprint of all images and videos that a source names; a missing file counts as
/// `missing`.
fn media(fingerprints: &Fingerprints, load: &dyn LoadStage) -> Result<String, Failure> {
    let mut key = Key::new("pictures");
    let mut names = Vec::new();
    let mut take = |names: &mut Vec<(std::path::PathBuf, u64)>| {
        let hashes: Vec<String> = names
            .par_iter()
            .map(|(path, most)| {
                fingerprints
                    .file_at_most(path, *most)
                    .unwrap_or_else(|_| "missing".to_owned())
            })
            .collect();
        names.clear();
        key = hashes.iter().fold(key.clone(), Key::with);
        // An image that was not read because of an interrupt is not missing.
        if files::stopped() {
            return Err(Failure::Interrupted);
        }
        Ok(())
    };
    for record in load.records()? {
        names.extend(load.media(&record?));
        if names.len() >= IMAGES_AT_ONCE || files::stopped() {
            take(&mut names)?;
        }
    }
    take(&mut names)?;
    Ok(key.finish())
}

/// Returns the entry of the manifest for a version: its key inputs, and the origins that explain
/// them.
pub fn explained(because: &Value, stage: Option<&PlannedStage>) -> Value {
    let mut explained = because.clone();
    if let Some(stage) = stage {
        explained[ORIGINS] = stage.origins.clone();
    }
    explained
}

/// The entry that only explains the key inputs, and is not part of the key.
const ORIGINS: &str = "origins";

/// A reason why a table is rebuilt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// A setting of the stage changed; `name` is its path below the stage type. Null where the
    /// setting was or is absent.
    Setting {
        name: String,
        before: Value,
        now: Value,
    },
    /// A top-level setting or a variable changed: `seed`, `vars.tokens`.
    Top {
        name: String,
        before: Value,
        now: Value,
    },
    /// A setting is written as before, but an environment variable in it has changed.
    Environment { name: String, written: String },
    /// An input table is not the version that the table was built from.
    Input(String),
    /// The model under this setting changed.
    Model(String),
    /// Files that the stage reads changed; the message.
    Files(String),
    /// Another reason; the message.
    Other(String),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Setting { name, before, now } | Self::Top { name, before, now } => {
                match (before, now) {
                    (Value::Null, _) => write!(f, "`{name}` was added"),
                    (_, Value::Null) => write!(f, "`{name}` was removed"),
                    _ => write!(f, "`{name}` {before} → {now}"),
                }
            }
            Self::Environment { name, written } => {
                write!(f, "`{name}` is `{written}`, whose value changed")
            }
            Self::Input(table) => write!(f, "its input `{table}` changed"),
            Self::Model(field) => write!(f, "its model `{field}` changed"),
            Self::Files(words) | Self::Other(words) => f.write_str(words),
        }
    }
}

impl Reason {
    /// Returns the place in the pipeline file of the current value.
    pub fn place(&self, plan: &Plan, table: &TableName) -> Option<Span> {
        match self {
            Self::Setting { name, .. } | Self::Environment { name, .. } => {
                Some(plan.place_of(plan.stage(table)?, name))
            }
            Self::Top { name, .. } => Some(plan.place_at_top(name)),
            _ => None,
        }
    }

    /// Returns the reason as a message, with its place.
    pub fn in_words(&self, plan: &Plan, table: &TableName) -> String {
        let text = plan.secrets.hide(&self.to_string());
        match self.place(plan, table) {
            Some(place) => format!("{text} ({place})"),
            None => text,
        }
    }
}

/// Returns the differences between two sets of key inputs.
pub fn explain(before: &Value, now: &Value) -> Vec<Reason> {
    if let (Some(was), Some(is)) = (stage_type(before), stage_type(now))
        && was != is
    {
        let words = format!("its stage type changed from `{was}` to `{is}`");
        return vec![Reason::Other(words)];
    }
    let mut changes = Changes {
        origins: [&before[ORIGINS], &now[ORIGINS]],
        reasons: Vec::new(),
    };
    changes.compare("", before, now);
    changes.reasons
}

/// Returns the stage type in a set of key inputs.
fn stage_type(because: &Value) -> Option<&str> {
    let settings = because["settings"].as_object()?;
    settings.keys().next().map(String::as_str)
}

/// Joins reasons into one message.
pub fn in_words(reasons: &[Reason], plan: &Plan, table: &TableName) -> String {
    if reasons.is_empty() {
        return "it changed".to_owned();
    }
    let texts = reasons.iter().map(|reason| reason.in_words(plan, table));
    texts.collect::<Vec<_>>().join("; ")
}

/// The key inputs of the random numbers of a stage that samples.
const DRAWN_BY: [&str; 3] = ["seed", "round", "name"];

/// The reasons found so far, and the origins that explain them.
struct Changes<'a> {
    /// The origins before and now; null in runs of earlier versions.
    origins: [&'a Value; 2],
    reasons: Vec<Reason>,
}

impl Changes<'_> {
    fn compare(&mut self, path: &str, before: &Value, now: &Value) {
        if before == now || path == ORIGINS {
            return;
        }
        let is_from_environment = |value: &Value| value["written"].is_string();
        if let (Value::Object(old), Value::Object(new)) = (before, now)
            && !is_from_environment(before)
            && !is_from_environment(now)
        {
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
                self.compare(&path, &value(old), &value(new));
            }
            return;
        }
        let reason = self.reason(path, before, now);
        if let Some(reason) = reason
            && !self.reasons.contains(&reason)
        {
            self.reasons.push(reason);
        }
    }

    /// Returns the reason why the values at a path differ; `None` if another reason covers it.
    fn reason(&self, path: &str, before: &Value, now: &Value) -> Option<Reason> {
        let (group, name) = path.split_once('.').unwrap_or(("", path));
        Some(match group {
            "inputs" => Reason::Input(
                name.split_once('.')
                    .map_or(name, |(_, table)| table)
                    .to_owned(),
            ),
            "models" => Reason::Model(name.to_owned()),
            // The images that a source names follow from its other files.
            "files" if name == "pictures" => match self.renamed("images") {
                Some(reason) => reason,
                None if self.renamed("from").is_some() => return None,
                None => Reason::Files("an image or video that it names changed".to_owned()),
            },
            "files" => match self.renamed(name) {
                Some(reason) => reason,
                None if before.is_null() || now.is_null() => setting(name, before, now),
                None => Reason::Files(format!("the content of `{name}` changed")),
            },
            "settings" => {
                let name = name.split_once('.').map_or(name, |(_, setting)| setting);
                let [was, is] = self.origins.map(|origins| origins["vars"][name].as_str());
                match (was, is) {
                    (Some(was), Some(is)) if was == is => Reason::Top {
                        name: format!("vars.{is}"),
                        before: before.clone(),
                        now: now.clone(),
                    },
                    _ => setting(name, before, now),
                }
            }
            _ if path == "version" => {
                Reason::Other("this version of the program builds it differently".to_owned())
            }
            // A stage starts or stops sampling because of a setting, which is the reason.
            _ if DRAWN_BY.contains(&path) && (before.is_null() || now.is_null()) => return None,
            _ if path == "name" => Reason::Other(format!("its table was named {before}")),
            _ if path == "seed" => Reason::Top {
                name: path.to_owned(),
                before: before.clone(),
                now: now.clone(),
            },
            _ => Reason::Other(format!("`{path}` {before} → {now}")),
        })
    }

    /// Returns a change of the path in a file setting, if the paths are known.
    fn renamed(&self, field: &str) -> Option<Reason> {
        let [before, now] = self.origins.map(|origins| origins.get("files"));
        let (before, now) = (&before?[field], &now?[field]);
        (before != now).then(|| setting(field, before, now))
    }
}

/// Returns a change of a setting; values from the environment appear by name.
fn setting(name: &str, before: &Value, now: &Value) -> Reason {
    let written = |value: &Value| match &value["written"] {
        Value::Null => value.clone(),
        written => written.clone(),
    };
    let name = name.to_owned();
    match (written(before), written(now)) {
        (before, Value::String(now)) if before == *now => {
            Reason::Environment { name, written: now }
        }
        (before, now) => Reason::Setting { name, before, now },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_stage_type_is_the_only_reason() {
        let because = |stage_type: &str, version: u32| {
            let mut because = json!({"settings": {}, "inputs": {}, "version": [1, version]});
            because["settings"][stage_type] = json!({"rewards": "rewards"});
            because
        };
        let reasons = explain(&because("select_extremes", 1), &because("select_pairs", 2));
        assert_eq!(
            reasons[0].to_string(),
            "its stage type changed from `select_extremes` to `select_pairs`"
        );
        assert_eq!(reasons.len(), 1);
    }

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

    /// Checks the reasons for a change of settings, files and their origins.
    #[track_caller]
    fn check(before: Value, now: Value, expected: &[&str]) {
        let reasons = explain(&before, &now);
        let texts: Vec<String> = reasons.iter().map(ToString::to_string).collect();
        assert_eq!(texts, expected);
    }

    #[test]
    fn a_file_that_was_added_or_is_another_one_is_no_changed_content() {
        let of = |images: &str, files: Value| json!({"files": {"from": "a", "pictures": images}, "origins": {"files": files}});
        let before = of("p", json!({"from": "x.json"}));
        let added = of("q", json!({"from": "x.json", "images": "photos"}));
        check(before.clone(), added.clone(), &["`images` was added"]);
        check(added.clone(), before.clone(), &["`images` was removed"]);
        let other = of("r", json!({"from": "x.json", "images": "scans"}));
        check(added, other, &["`images` \"photos\" → \"scans\""]);
        let changed = of("q", json!({"from": "x.json"}));
        check(
            before,
            changed,
            &["an image or video that it names changed"],
        );
        // Runs of earlier versions did not record the paths of their files.
        let old = json!({"files": {"from": "a", "pictures": "p"}});
        let new = of("q", json!({"from": "x.json", "images": "photos"}));
        check(old, new, &["an image or video that it names changed"]);
        let none = json!({"files": {"from": "a"}});
        let captions = json!({"files": {"from": "a", "captions": "b"}});
        check(none, captions, &["`captions` was added"]);
    }

    #[test]
    fn a_stage_that_draws_no_more_is_explained_by_its_setting() {
        let of = |temperature: f64| json!({"settings": {"sample": {"temperature": temperature}}});
        let mut drawn = of(0.7);
        for (name, value) in [
            ("seed", json!(1)),
            ("round", json!(1)),
            ("name", json!("a")),
        ] {
            drawn[name] = value;
        }
        check(drawn.clone(), of(0.0), &["`temperature` 0.7 → 0.0"]);
        check(of(0.0), drawn.clone(), &["`temperature` 0.0 → 0.7"]);
        let mut renamed = drawn.clone();
        renamed["name"] = json!("b");
        check(drawn, renamed, &["its table was named \"a\""]);
    }

    #[test]
    fn a_setting_that_is_a_variable_is_told_as_one() {
        let of = |value: u32, vars: Value| json!({"settings": {"sample": {"count": value, "max_new_tokens": value}}, "origins": {"vars": vars}});
        let both = json!({"count": "tokens", "max_new_tokens": "tokens"});
        check(
            of(16, both.clone()),
            of(12, both.clone()),
            &["`vars.tokens` 16 → 12"],
        );
        // It is unknown which variable it was, if any.
        let expected = ["`count` 16 → 12", "`max_new_tokens` 16 → 12"];
        check(of(16, json!({})), of(12, both), &expected);
    }

    #[test]
    fn values_of_the_environment_are_told_by_their_names() {
        let of = |limit: Value| json!({"settings": {"load_prompts": {"limit": limit}}});
        let env = |hash: &str| json!({"written": "${env:N}", "env": {"N": hash}});
        check(
            of(env("a")),
            of(env("b")),
            &["`limit` is `${env:N}`, whose value changed"],
        );
        check(of(json!(5)), of(env("b")), &["`limit` 5 → \"${env:N}\""]);
        check(of(Value::Null), of(json!(5)), &["`limit` was added"]);
    }
}
