//! Parsing and checking of pipeline files: from YAML text to a [`Plan`].
//!
//! The whole file is checked before anything runs, and all problems are reported at once, each as a
//! [`Diagnostic`] with its place underlined.
//!
//! The text is parsed into a tree ([`node`]) and merged with the files that it extends
//! ([`extends`]). `--set` changes the tree ([`overrides`]), references are replaced
//! ([`reference`]), and the tree is deserialized ([`reader`]) into the types of a pipeline file
//! ([`pipeline`]). Then names and roles ([`check`]) and tables ([`lineage`]) are checked across the
//! whole file, and the result is the resolved pipeline ([`plan`]).
//!
//! The modules below are declared in layers, and none uses a later layer: texts, trees and
//! positions; diagnostics; the texts of a pipeline with its `--set`; the types of a pipeline file;
//! reading; checks; the plan. Within a layer, too, no modules use each other in a cycle.

mod key_text;
mod node;
mod piece;
mod secrets;
mod source;

mod diagnostic;
mod render;
mod suggest;
mod syntax;

mod overrides;
mod reference;
mod source_texts;

mod expectation;
mod guard;
mod metrics;
mod pipeline;
mod schema;

mod extends;
mod kept_columns;
mod reader;
mod serde_messages;

mod answer_counts;
mod check;
mod exam;
mod lineage;
mod paths;
mod probe;
mod programs;
mod queries;
mod sql;
mod unused;

mod plan;
mod rounds;

pub use diagnostic::{At, Diagnostic, Diagnostics, Severity};
pub use expectation::{Expectation, Otherwise};
pub use guard::{Action, Condition, Guard};
pub use metrics::{METRICS, Metric, metric};
pub use paths::{BENCHMARK_TEXTS, NOT_FETCHED};
pub use pipeline::{BarChart, Chart, KeepImages, LineChart, PipelineName, Rounds, View};
pub use plan::{LoadError, Plan, PlannedStage};
pub use probe::NO_KEY;
pub use render::RenderStyle;
pub use schema::{pipeline_schema, table_schema};
pub use secrets::{EnvReference, Secrets};
pub use source::{KeyPath, Side, SourceText, Span};
pub use sql::tables_there;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use lineage::Lineage;
use overrides::Override;
use pipeline::PipelineSpec;
use source_texts::SourceTexts;

use ovchat_io::files;
use ovchat_models::ModelSpec;

/// Reads and checks a pipeline file.
///
/// `sets` are the overrides from the command line, each `path=value`. With `offline`, the files and
/// folders that the pipeline names need not exist.
pub fn load(path: &Path, sets: &[String], offline: bool) -> Result<Plan, LoadError> {
    let unreadable = |problem| LoadError::Unreadable {
        path: path.to_owned(),
        problem,
    };
    let bytes = files::read_at_most(path, files::TEXT_MAX).map_err(unreadable)?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let before = String::from_utf8_lossy(&error.as_bytes()[..at]);
        let line = 1 + before.matches('\n').count();
        let problem = format!("line {line} is not valid UTF-8");
        unreadable(io::Error::new(io::ErrorKind::InvalidData, problem))
    })?;
    let absolute = std::path::absolute(path).map_err(unreadable)?;
    let name = path.display().to_string();
    let file = Arc::new(SourceText::new(name, &text));
    let surroundings = Surroundings {
        environment: &|name| std::env::var(name),
        texts: &|path| files::read_to_string(path),
    };
    parse(file, absolute, sets, offline, surroundings).map_err(LoadError::Refused)
}

/// The texts of a plan, from which another process loads the same plan even if its files have changed
/// since.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanTexts {
    /// The pipeline file as the user named it, and its absolute path.
    name: String,
    path: PathBuf,
    /// The texts of the pipeline file and of those that it extends, by absolute path.
    files: BTreeMap<PathBuf, String>,
    /// The `--set` arguments.
    sets: Vec<String>,
}

impl PlanTexts {
    /// Returns the texts of a plan that was loaded with these `--set` arguments.
    pub fn of(plan: &Plan, sets: &[String]) -> Self {
        let layers = plan.sources.layers.iter();
        let first = plan.sources.layers.first();
        Self {
            name: first.map_or_else(String::new, |layer| layer.source.name.clone()),
            path: plan.path.clone(),
            files: layers
                .map(|layer| (layer.path.clone(), layer.source.text.clone()))
                .collect(),
            sets: sets.to_vec(),
        }
    }

    /// Loads the plan, without a look at the files that it names.
    pub fn load(&self) -> Result<Plan, LoadError> {
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let text = |path: &Path| self.files.get(&extends::plain(path)).cloned();
        let own = text(&self.path).ok_or_else(|| LoadError::Unreadable {
            path: self.path.clone(),
            problem: missing(),
        })?;
        let file = Arc::new(SourceText::new(self.name.clone(), &own));
        let surroundings = Surroundings {
            environment: &|name| std::env::var(name),
            texts: &|path| text(path).ok_or_else(missing),
        };
        parse(file, self.path.clone(), &self.sets, true, surroundings).map_err(LoadError::Refused)
    }
}

/// The sources of the values of variables and of the texts of further files.
#[derive(Clone, Copy)]
struct Surroundings<'a> {
    environment: reference::Environment<'a>,
    texts: extends::Texts<'a>,
}

/// Returns the plan of the pipeline file at `path` with the text `file`.
fn parse(
    file: Arc<SourceText>,
    path: PathBuf,
    sets: &[String],
    offline: bool,
    surroundings: Surroundings<'_>,
) -> Result<Plan, Diagnostics> {
    let Surroundings { environment, texts } = surroundings;
    let (layers, tree, mut diagnostics) = extends::read(file, &path, texts);
    let mut sources = SourceTexts::of(layers);
    let refuse = |sources: &SourceTexts, diagnostics| Err(Diagnostics(sources.place(diagnostics)));
    let Some(mut tree) = tree else {
        return refuse(&sources, diagnostics);
    };
    for text in sets {
        let applied = Override::parse(text).and_then(|(change, value)| {
            change.apply(value, &mut tree)?;
            Ok(change)
        });
        match applied {
            Ok(change) => sources.overrides.push(change),
            Err(diagnostic) => diagnostics.push(*diagnostic),
        }
    }
    let read = reader::read(tree, environment);
    let (mut written, mut secrets) = (read.written, read.secrets);
    sources.begins_with = read.begins_with;
    for entry in &written.models {
        if let Some(http) = entry.spec.as_ref().and_then(ModelSpec::endpoint)
            && let Some(name) = &http.key_env
            && let Ok(key) = environment(name)
        {
            secrets.add_key(name, &key);
        }
    }
    diagnostics.extend(read.diagnostics);
    if read.is_partial {
        // References to anything in the skipped fields would be reported as unknown.
        for diagnostic in &mut diagnostics {
            diagnostic.hide(&secrets);
        }
        return refuse(&sources, diagnostics);
    }
    diagnostics.extend(exam::add(&mut written));
    resolve(&mut written, &sources);
    secrets.show_paths(&paths::settings(&written));
    diagnostics.extend(check::names_and_roles(&written));
    if !offline {
        diagnostics.extend(paths::missing_files(&written, &sources, &secrets));
        diagnostics.extend(paths::records(&written, &secrets));
        diagnostics.extend(paths::probe_models(&written, &secrets));
        diagnostics.extend(kept_columns::not_kept(&written));
        diagnostics.extend(programs::unstartable(&written, &secrets));
        diagnostics.extend(probe::contexts(&written));
        diagnostics.extend(probe::trainings(&written));
        diagnostics.extend(probe::keys(&written));
    }
    let mut lineage = Lineage::trace(&written);
    lineage.check_queries(&written);
    lineage.unused(&written);
    // Only one diagnostic is kept per setting: a query whose file is missing cannot be planned
    // either.
    let is_news = |new: &Diagnostic| !diagnostics.iter().any(|told| told.at == new.at);
    lineage.diagnostics.retain(is_news);
    diagnostics.append(&mut lineage.diagnostics);
    for diagnostic in &mut diagnostics {
        diagnostic.hide(&secrets);
    }
    let mut diagnostics = sources.place(SourceTexts::once(diagnostics));
    if diagnostics
        .iter()
        .any(|diagnostic| diagnostic.severity == Severity::Error)
    {
        diagnostics.retain(|diagnostic| diagnostic.severity == Severity::Error);
        return Err(Diagnostics(diagnostics));
    }
    Ok(plan::assemble(
        written,
        lineage,
        &sources,
        secrets,
        diagnostics,
        path,
    ))
}

/// Resolves the relative paths of models and stages against the folder of the file that contains
/// them.
fn resolve(written: &mut PipelineSpec, sources: &SourceTexts) {
    for model in &mut written.models {
        let folder = |field: &str| sources.folder(&model.settings.below(field));
        if let Some(spec) = &mut model.spec {
            spec.resolve(&folder);
        }
    }
    let stages = written.stages.iter_mut().chain(&mut written.evaluate);
    for stage in stages {
        let folder = |field: &str| sources.folder(&stage.settings.key(field));
        if let Some(spec) = &mut stage.spec {
            spec.as_stage_mut().resolve(&folder);
        }
    }
}
