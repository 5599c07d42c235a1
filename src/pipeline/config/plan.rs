//! The plan of a pipeline: resolved names, absolute paths, stages in execution order.
//!
//! Only a pipeline without errors has a plan. Later steps use the text only to underline a stage
//! that failed.

mod render;

use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use serde_json::{Value, json};

use super::diagnostic::{At, Diagnostic, Diagnostics};
use super::expectation::Expectation;
use super::guard::{Guard, with_defaults};
use super::lineage::{Lineage, StageDraft};
use super::paths::NOT_FETCHED;
use super::pipeline::{KeepImages, PipelineName, PipelineSpec, View};
use super::secrets::{EnvReference, Secrets};
use super::source::{KeyPath, Span, Step};
use super::source_texts::SourceTexts;
use crate::stages::{AFTER, ModelName, StageSpec, TableName};
use ovchat_models::{ModelSpec, Share};

/// The reasons why a pipeline has no plan.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file cannot be read.
    #[error("cannot read the pipeline file `{}`: {problem}", path.display())]
    Unreadable { path: PathBuf, problem: io::Error },
    /// The file was read, and has errors.
    #[error(transparent)]
    Refused(Diagnostics),
}

/// A resolved pipeline.
#[derive(Debug, Clone)]
pub struct Plan {
    pub pipeline: PipelineName,
    pub seed: u64,
    /// The stages run in rounds 1 to `rounds`.
    pub rounds: NonZeroU32,
    /// The query that decides after every round whether to stop.
    pub stop_when: Option<String>,
    /// The query whose number decides which round is exported; `None`: the last one.
    pub keep_by: Option<String>,
    /// The conditions on the health of a round, with the defaults.
    pub guard: Vec<Guard>,
    /// The models by name, with absolute paths.
    pub models: BTreeMap<ModelName, ModelSpec>,
    /// The stages in topological order: each after those whose tables it reads, otherwise in file
    /// order.
    pub stages: Vec<PlannedStage>,
    /// The stages under `evaluate`, in the same order; they run after the stages of the round.
    pub evaluate: Vec<PlannedStage>,
    /// The views that a run prints when it ends, in file order.
    pub report: Vec<(TableName, View)>,
    /// The expectations on tables, in file order.
    pub expect: Vec<(TableName, Expectation)>,
    /// The warnings and notes, in the order of the text.
    pub warnings: Vec<Diagnostic>,
    pub reject_share_max: Share,
    pub keep_images: KeepImages,
    /// The pipeline file, as an absolute path.
    pub path: PathBuf,
    /// The environment variables that the pipeline references, with the hashes of their values.
    pub environment: Vec<EnvReference>,
    /// The values of these variables. Everything that is shown or stored must pass through
    /// [`Secrets::hide`].
    pub secrets: Secrets,
    /// The texts, to point at settings.
    pub sources: SourceTexts,
}

/// A resolved stage.
#[derive(Debug, Clone)]
pub struct PlannedStage {
    /// The table that the stage builds.
    pub name: TableName,
    /// The stage type with all its settings; omitted input tables are filled in.
    pub spec: StageSpec,
    /// True if the table is the same in every round (no trained model, no random number, only
    /// static inputs): it is built once and belongs to no round.
    pub is_static: bool,
    /// The first round in which the stage runs: 1 for a stage; 0 for an evaluation, or 1 if that
    /// reads tables of the rounds; 0 for a static table.
    pub round_first: u32,
    /// The tables that the stage reads, each with the setting that names it.
    pub inputs: Vec<(&'static str, TableName)>,
    /// The columns of its table.
    pub schema: SchemaRef,
    /// The kind of rows in its table; `None` if a query decides.
    pub kind: Option<&'static str>,
    /// The path of the stage in the text, and the text.
    key: KeyPath,
    sources: Arc<SourceTexts>,
    /// The path of its settings in the text.
    pub path: KeyPath,
    /// The key inputs of the stage: its type and the settings that affect the output, without the
    /// names of tables, models and files (their contents have fingerprints) and without
    /// [`crate::stages::Stage::unkeyed`]. A value from the environment is `{"written", "env"}`: the
    /// text with `${env:NAME}` in it, and the hash of each variable by name.
    pub settings: Value,
    /// Details that explain a change but are not key inputs: `files`, the paths as written, and
    /// `vars`, the settings whose whole value is one variable, with its name.
    pub origins: Value,
}

impl Plan {
    /// Returns the stage under `stages` or `evaluate` that builds a table.
    pub fn stage(&self, name: &TableName) -> Option<&PlannedStage> {
        self.all().find(|stage| stage.name == *name)
    }

    /// Returns the public name of the judge that scores a table of rewards.
    pub fn judge_of(&self, table: &TableName) -> Option<String> {
        let StageSpec::Score(score) = &self.stage(table)?.spec else {
            return None;
        };
        let judge = self.models.get(&score.judge)?;
        let backing = judge.backing_model();
        let backing =
            backing.and_then(|name| self.models.iter().find(|(own, _)| own.as_str() == name));
        backing.map_or(judge, |(_, model)| model).public_name()
    }

    /// Returns an error if weights on the Hugging Face Hub are not in the cache; only `pipeline
    /// run` downloads them.
    pub fn fetched(self) -> Result<Self, LoadError> {
        let missing = self.warnings.iter().filter(|one| one.code == NOT_FETCHED);
        let missing: Vec<Diagnostic> = missing.cloned().map(Diagnostic::as_error).collect();
        if missing.is_empty() {
            Ok(self)
        } else {
            Err(LoadError::Refused(Diagnostics(missing)))
        }
    }

    /// All stages: those of the rounds, then those of the evaluation.
    pub fn all(&self) -> impl Iterator<Item = &PlannedStage> {
        self.stages.iter().chain(&self.evaluate)
    }

    /// The stages that train a model, in execution order.
    pub fn trainings(&self) -> impl Iterator<Item = &PlannedStage> {
        let trains = |stage: &&PlannedStage| stage.trained().is_some();
        self.stages.iter().filter(trains)
    }

    /// Returns the last stage of a round that trains a model, if any.
    pub fn trained_by(&self, model: &ModelName) -> Option<&TableName> {
        let trainers = self
            .trainings()
            .filter(|stage| stage.trained() == Some(model));
        // Each continues from the previous one, and so comes after it. [ref:plan_is_ordered]
        trainers.last().map(|stage| &stage.name)
    }

    /// Returns the backing model of a model, which may be the model itself.
    pub fn backing_model<'a>(&'a self, model: &'a ModelName) -> &'a ModelName {
        let named = self.models[model].backing_model();
        let mut models = self.models.keys();
        named
            .and_then(|named| models.find(|model| model.as_str() == named))
            .unwrap_or(model)
    }

    /// Returns the span of a setting of a stage, or that of the stage if the setting is not in the
    /// text.
    pub fn place_of(&self, stage: &PlannedStage, setting: &str) -> Span {
        self.sources.find(&At::key(stage.path.below(setting)))
    }

    /// Returns the span of a top-level setting: `seed`, `vars.tokens`.
    pub fn place_at_top(&self, setting: &str) -> Span {
        self.sources.find(&At::key(KeyPath::root().below(setting)))
    }
}

impl PlannedStage {
    /// Returns the span of the stage's name in the text, underlined if the stage fails.
    pub fn place(&self) -> Span {
        self.sources.find(&At::key(self.key.clone()))
    }

    /// The stage type: `sample`.
    pub fn stage_type(&self) -> &str {
        let settings = self
            .settings
            .as_object()
            .and_then(|object| object.keys().next());
        settings.map_or("", String::as_str)
    }

    /// The model that the stage trains.
    pub fn trained(&self) -> Option<&ModelName> {
        let mut uses = self.spec.as_stage().uses().into_iter();
        uses.find(|used| used.role.learns()).map(|used| used.model)
    }

    /// The training stage of the same round that this one continues from.
    pub fn after(&self) -> Option<&TableName> {
        let mut inputs = self.inputs.iter();
        inputs
            .find(|(field, _)| *field == AFTER)
            .map(|(_, table)| table)
    }
}

/// Builds the plan of a pipeline without errors.
pub fn assemble(
    written: PipelineSpec,
    lineage: Lineage,
    sources: &SourceTexts,
    secrets: Secrets,
    warnings: Vec<Diagnostic>,
    path: PathBuf,
) -> Plan {
    let names: Vec<TableName> = lineage
        .drafts
        .iter()
        .map(|draft| draft.name.clone())
        .collect();
    let mut drafts: Vec<Option<StageDraft>> = lineage.drafts.into_iter().map(Some).collect();
    let mut stages = Vec::new();
    let mut evaluate = Vec::new();
    let shared_sources = Arc::new(sources.clone());
    // [ref:plan_is_ordered]
    for position in lineage.order {
        let Some(draft) = drafts[position].take() else {
            continue;
        };
        let group = if draft.is_evaluation {
            &mut evaluate
        } else {
            &mut stages
        };
        group.push(planned(
            draft,
            &names,
            &written.uses,
            &shared_sources,
            &secrets,
        ));
    }
    let models = written.models.into_iter();
    Plan {
        pipeline: written.pipeline,
        seed: written.seed,
        rounds: written.rounds.max(),
        stop_when: written.rounds.stop_when().map(str::to_owned),
        keep_by: written.rounds.by().map(str::to_owned),
        guard: with_defaults(written.guard.into_iter().map(|entry| entry.guard).collect()),
        models: models
            .filter_map(|entry| Some((entry.name, entry.spec?)))
            .collect(),
        stages,
        evaluate,
        report: written
            .report
            .into_iter()
            .filter_map(|entry| Some((entry.name, entry.spec?)))
            .collect(),
        expect: written
            .expect
            .into_iter()
            .filter_map(|entry| Some((entry.name, entry.spec?)))
            .collect(),
        warnings,
        reject_share_max: written.reject_share_max,
        keep_images: written.keep_images,
        path,
        environment: secrets.references(),
        secrets,
        sources: sources.clone(),
    }
}

/// Builds the planned form of a stage without errors.
fn planned(
    draft: StageDraft,
    names: &[TableName],
    uses: &[(KeyPath, String)],
    sources: &Arc<SourceTexts>,
    secrets: &Secrets,
) -> PlannedStage {
    let spec = draft
        .spec
        .expect("a stage that cannot be read has a diagnostic");
    PlannedStage {
        is_static: draft.round_first.is_none(),
        round_first: draft.round_first.unwrap_or_default(),
        inputs: draft
            .inputs
            .iter()
            .map(|(field, at)| (*field, names[*at].clone()))
            .collect(),
        schema: draft
            .schema
            .expect("a stage without columns has a diagnostic"),
        kind: spec.as_stage().kind(),
        key: draft.path,
        sources: Arc::clone(sources),
        path: draft.settings.clone(),
        settings: keyed_settings(&spec, &draft.settings, secrets),
        origins: origins(&spec, &draft.settings, uses, sources, secrets),
        name: draft.name,
        spec,
    }
}

/// Returns [`PlannedStage::origins`].
fn origins(
    spec: &StageSpec,
    path: &KeyPath,
    uses: &[(KeyPath, String)],
    sources: &SourceTexts,
    secrets: &Secrets,
) -> Value {
    let mut files = serde_json::Map::new();
    // The stages of an exam are not in the text, and their paths are set elsewhere.
    let is_written = matches!(path.steps().first(), Some(Step::Key { key, .. }) if key != "models");
    let named = spec.as_stage().files().into_iter();
    for (field, file) in named.filter(|_| is_written) {
        let setting = path.key(field);
        let mut from_environment = secrets.uses_in(&setting).peekable();
        let written = match from_environment.peek() {
            None => {
                let folder = sources.folder(&setting);
                let written = file.strip_prefix(folder).unwrap_or(file);
                written.display().to_string()
            }
            Some(used) if used.path == setting => used.written.clone(),
            // The value is used in an element of a list, which may or may not be this file.
            Some(_) => continue,
        };
        let others = files.keys().filter(|name| name.starts_with(field)).count();
        let name = match others {
            0 => field.to_owned(),
            _ => format!("{field}[{others}]"),
        };
        files.insert(name, json!(written));
    }
    let vars = uses.iter().filter(|(setting, _)| setting.is_in(path));
    let vars: serde_json::Map<_, _> = vars
        .map(|(setting, variable)| {
            let below = &setting.steps()[path.steps().len()..];
            let keys = below.iter().map(|step| match step {
                Step::Key { key, .. } => key.clone(),
                Step::Index(index) => index.to_string(),
            });
            (keys.collect::<Vec<_>>().join("."), json!(variable))
        })
        .collect();
    json!({ "files": files, "vars": vars })
}

/// Returns [`PlannedStage::settings`].
fn keyed_settings(spec: &StageSpec, path: &KeyPath, secrets: &Secrets) -> Value {
    let mut settings = serde_json::to_value(spec).expect("settings are plain values");
    let above = path.steps().len() - 1;
    for used in secrets.uses_in(path) {
        let words = used.path.steps()[above..].iter().map(|step| match step {
            Step::Key { key, .. } => format!("/{key}"),
            Step::Index(index) => format!("/{index}"),
        });
        if let Some(value) = settings.pointer_mut(&words.collect::<String>()) {
            let hash = |name: &String| (name.clone(), json!(secrets.hash_of(name)));
            let hashes: serde_json::Map<_, _> = used.names.iter().map(hash).collect();
            *value = json!({ "written": used.written, "env": hashes });
        }
    }
    let stage = spec.as_stage();
    let inputs = stage.inputs().into_iter().map(|input| input.field);
    let models = stage.uses().into_iter().map(|used| used.field);
    let files = stage.files().into_iter().map(|(field, _)| field);
    let unkeyed = stage.unkeyed().iter().copied();
    if let Some(fields) = settings.get_mut(path.name()).and_then(Value::as_object_mut) {
        for field in inputs.chain(models).chain(files).chain(unkeyed) {
            fields.shift_remove(field);
        }
    }
    settings
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::config::{SourceText, Surroundings, parse};

    const PIPELINE: &str = r#"
pipeline: demo
seed: 17
rounds: 3
vars: { k: 5 }
models:
  policy: { scripted: {} }
  judge: { scripted: { words: "${env:WORDS}" } }
stages:
  steps: { train_dpo: { pairs: pairs, model: policy } }
  prompts: { load_prompts: { from: data/prompts.json, limit: "${env:LIMIT}" } }
  candidates: { sample: { prompts: prompts, model: policy, count: "${k}", part: 8 } }
  rewards: { score: { candidates: candidates, judge: judge } }
  pairs: { select_extremes: { rewards: rewards } }
evaluate:
  heldout: { load_prompts: { from: /data/heldout.json } }
  answers: { sample: { prompts: heldout, model: policy, count: 1, temperature: 0 } }
  again: { score: { candidates: candidates, judge: judge } }
"#;

    fn environment(name: &str) -> Result<String, std::env::VarError> {
        match name {
            "WORDS" | "LIMIT" => Ok("4321".to_owned()),
            _ => Err(std::env::VarError::NotPresent),
        }
    }

    fn plan(text: &str, sets: &[&str]) -> Plan {
        let file = Arc::new(SourceText::new("demo.yaml".to_owned(), text));
        let path = Path::new("/home/demo.yaml").to_owned();
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        let surroundings = Surroundings {
            environment: &environment,
            texts: &|_| Err(std::io::ErrorKind::NotFound.into()),
        };
        match parse(file, path, &sets, true, surroundings) {
            Ok(plan) => plan,
            Err(diagnostics) => panic!("{diagnostics}"),
        }
    }

    fn stage<'a>(plan: &'a Plan, name: &str) -> &'a PlannedStage {
        let mut all = plan.all();
        all.find(|stage| stage.name.as_str() == name)
            .expect("the stage is there")
    }

    #[test]
    fn stages_run_after_those_they_read_and_else_as_written() {
        let plan = plan(PIPELINE, &[]);
        let names = |stages: &[PlannedStage]| -> Vec<String> {
            stages.iter().map(|stage| stage.name.to_string()).collect()
        };
        assert_eq!(
            names(&plan.stages),
            ["prompts", "candidates", "rewards", "pairs", "steps"]
        );
        assert_eq!(names(&plan.evaluate), ["heldout", "answers", "again"]);
        let trainer = plan.trained_by(&"policy".to_owned().try_into().unwrap());
        assert_eq!(trainer.map(TableName::as_str), Some("steps"));
        assert_eq!(
            plan.trained_by(&"judge".to_owned().try_into().unwrap()),
            None
        );
    }

    #[test]
    fn inputs_that_are_left_out_are_found_among_the_ancestors() {
        let plan = plan(PIPELINE, &[]);
        let inputs: Vec<_> = stage(&plan, "pairs")
            .inputs
            .iter()
            .map(|(field, table)| (*field, table.as_str()))
            .collect();
        let expected = [
            ("rewards", "rewards"),
            ("candidates", "candidates"),
            ("prompts", "prompts"),
        ];
        assert_eq!(inputs, expected);
        let StageSpec::Score(score) = &stage(&plan, "rewards").spec else {
            panic!("rewards are scored");
        };
        assert_eq!(
            score.prompts.as_ref().map(TableName::as_str),
            Some("prompts")
        );
    }

    #[test]
    fn only_what_can_change_belongs_to_rounds() {
        let plan = plan(PIPELINE, &[]);
        let runs = |name| (stage(&plan, name).is_static, stage(&plan, name).round_first);
        assert_eq!(runs("prompts"), (true, 0));
        assert_eq!(runs("candidates"), (false, 1));
        assert_eq!(runs("rewards"), (false, 1));
        assert_eq!(runs("heldout"), (true, 0));
        assert_eq!(runs("answers"), (false, 0));
        assert_eq!(runs("again"), (false, 1));
    }

    #[test]
    fn keys_hold_the_settings_that_matter_and_no_value_of_the_environment() {
        let changed = plan(PIPELINE, &["stages.candidates.sample.count=3"]);
        let candidates = &stage(&changed, "candidates").settings["sample"];
        assert_eq!(candidates["count"], 3);
        for absent in ["prompts", "model", "part"] {
            assert_eq!(candidates.get(absent), None, "{absent}");
        }
        let prompts = &stage(&changed, "prompts").settings["load_prompts"];
        assert_eq!(prompts.get("from"), None);
        assert_eq!(prompts["limit"]["written"], "${env:LIMIT}");
        let hash = prompts["limit"]["env"]["LIMIT"].as_str().map(str::len);
        assert_eq!(hash, Some(64));
        let settings: Vec<_> = changed.all().map(|stage| &stage.settings).collect();
        assert!(!format!("{settings:?}").contains("4321"));
        let mut rendered = String::new();
        changed.render(&mut rendered).unwrap();
        assert!(!rendered.contains("4321"), "{rendered}");
    }

    #[test]
    fn a_plan_reads_as_equations_in_the_order_of_their_rounds() {
        let text = "pipeline: tiny\nmodels: { policy: { scripted: {} } }\nstages:\n  prompts: { load_prompts: { from: p.json } }\n  candidates: { sample: { prompts: prompts, model: policy } }\n";
        let mut rendered = String::new();
        plan(text, &[]).render(&mut rendered).unwrap();
        let expected = "\
tiny: 1 round, seed 0

models
  policy = scripted()

once
  prompts = load_prompts(from: /home/p.json)
      megapixels_max: 100

in round 1
  candidates = sample(prompts: prompts, model: policy)
      count: 5, temperature: 0.7, top_p: 0.9, top_k: 0, repetition_penalty: 1.0, max_new_tokens: 512
";
        assert_eq!(rendered, expected);
    }

    #[test]
    fn a_stage_knows_its_place_in_the_text() {
        let plan = plan(PIPELINE, &[]);
        let place = &stage(&plan, "rewards").place();
        assert_eq!(place.source.slice(place.span.clone()), "rewards");
    }
}
