//! Checks across the whole pipeline file: undefined names, and models in the wrong role.
//!
//! Tables and their columns are checked in [`super::lineage`], files in [`super::paths`].

use super::answer_counts;
use super::diagnostic::{At, Diagnostic};
use super::pipeline::{Entry, PipelineSpec};
use super::queries::no_number;
use super::source::KeyPath;
use super::sql;
use super::suggest::{listed, suggest};
use crate::stages::{AFTER, ModelName, ModelRole, NAME_MAX, REFERENCE, StageSpec, TableName};
use ovchat_data::tables::{Judged, Row as _};
use ovchat_models::{ModelSpec, Role, SqlReward};
use ovchat_query as query;

/// Names that are reserved in a run folder or in its SQL.
const SIDE_TABLES: [&str; 11] = [
    "images",
    "videos",
    "rejects",
    "telemetry",
    "references",
    "checkpoints",
    "calls",
    "human_labels",
    "report",
    "spoiled",
    "manifest",
];

/// SQL keywords that cannot name a table in a query without quotes.
const SQL_WORDS: [&str; 62] = [
    "all",
    "and",
    "any",
    "array",
    "as",
    "asc",
    "between",
    "by",
    "case",
    "cast",
    "check",
    "column",
    "create",
    "cross",
    "current_date",
    "default",
    "desc",
    "distinct",
    "drop",
    "else",
    "end",
    "except",
    "exists",
    "false",
    "fetch",
    "for",
    "from",
    "full",
    "grant",
    "group",
    "having",
    "in",
    "inner",
    "insert",
    "intersect",
    "into",
    "is",
    "join",
    "lateral",
    "left",
    "like",
    "limit",
    "natural",
    "not",
    "null",
    "offset",
    "on",
    "or",
    "order",
    "outer",
    "right",
    "select",
    "set",
    "table",
    "then",
    "true",
    "union",
    "unique",
    "using",
    "values",
    "when",
    "where",
];

/// Returns all errors and warnings about names, roles and training.
pub fn names_and_roles(written: &PipelineSpec) -> Vec<Diagnostic> {
    let mut diagnostics = Vec::new();
    long_names(written, &mut diagnostics);
    table_names(written, &mut diagnostics);
    for (stage, is_evaluation) in written.all_stages() {
        roles(stage, written, &mut diagnostics);
        if is_evaluation {
            no_training(stage, &mut diagnostics);
        }
    }
    trained_once(written, &mut diagnostics);
    compared_answers(written, &mut diagnostics);
    backing_models(written, &mut diagnostics);
    expressions(written, &mut diagnostics);
    finished(written, &mut diagnostics);
    diagnostics.extend(answer_counts::too_few(written));
    unused(written, &mut diagnostics);
    diagnostics
}

/// Reports names that are too long for a folder, or leave no room for the names derived from them.
fn long_names(written: &PipelineSpec, diagnostics: &mut Vec<Diagnostic>) {
    let stages = written
        .all_stages()
        .map(|(stage, _)| (stage.name.as_str(), &stage.path));
    let models = written.models.iter();
    let models = models.map(|model| (model.name.as_str(), &model.path));
    let views = written.report.iter();
    let views = views.map(|view| (view.name.as_str(), &view.path));
    for (name, path) in stages.chain(models).chain(views) {
        if name.len() > NAME_MAX {
            let length = name.len();
            let message = format!(
                "the name is too long: {length} characters, at most {NAME_MAX} are allowed"
            );
            let diagnostic = Diagnostic::new("config::name", At::key(path.clone()), message);
            diagnostics.push(
                diagnostic.help("choose a shorter name: folders and files are named after it"),
            );
        }
    }
}

fn table_names(written: &PipelineSpec, diagnostics: &mut Vec<Diagnostic>) {
    for (stage, is_evaluation) in written.all_stages() {
        let name = stage.name.as_str();
        let at = At::key(stage.path.clone());
        if let Some(diagnostic) = reserved(written, &stage.name, &at) {
            diagnostics.push(diagnostic);
        } else if is_evaluation
            && let Some(first) = written.stages.iter().find(|first| first.name == stage.name)
        {
            let message = format!("`{name}` is defined in both `stages` and `evaluate`");
            let diagnostic = Diagnostic::new("config::duplicate", at, message)
                .label("redefined here")
                .also(At::key(first.path.clone()), "first defined here")
                .help("rename one of them: both tables belong to the same run");
            diagnostics.push(diagnostic);
        }
    }
    // Queries refer to views by name, as they do to tables.
    for view in &written.report {
        diagnostics.extend(reserved(written, &view.name, &At::key(view.path.clone())));
    }
}

/// The diagnostic for a reserved name.
fn reserved(written: &PipelineSpec, name: &TableName, at: &At) -> Option<Diagnostic> {
    let diagnostic =
        |message: String| Diagnostic::new("config::reserved_name", at.clone(), message);
    let diagnostic = if SIDE_TABLES.contains(&name.as_str()) {
        diagnostic(format!(
            "the name `{name}` is reserved: every run creates a table or file with this name"
        ))
    } else if SQL_WORDS.contains(&name.as_str()) {
        diagnostic(format!(
            "the name `{name}` is reserved: it is an SQL keyword, so queries could not refer to it"
        ))
    } else {
        let training = training_of_reference(written, name.as_str())?;
        let message = format!(
            "the training stage `{}` already builds a table `{name}`",
            training.name
        );
        diagnostic(message).also(At::key(training.path.clone()), "the training stage")
    };
    Some(diagnostic.help("choose another name"))
}

/// Returns the training stage whose table of reference log-probabilities has this name.
fn training_of_reference<'a>(
    written: &'a PipelineSpec,
    name: &str,
) -> Option<&'a Entry<TableName, StageSpec>> {
    let training = name.strip_suffix(REFERENCE)?;
    let mut stages = written.stages.iter();
    stages.find(|stage| {
        stage.name.as_str() == training && matches!(stage.spec, Some(StageSpec::TrainDpo(_)))
    })
}

fn roles(
    stage: &Entry<TableName, StageSpec>,
    written: &PipelineSpec,
    diagnostics: &mut Vec<Diagnostic>,
) {
    for used in stage.spec.iter().flat_map(|spec| spec.as_stage().uses()) {
        let at = At::value(stage.settings.key(used.field));
        let model = used.model.as_str();
        let Some(entry) = written
            .models
            .iter()
            .find(|entry| entry.name == *used.model)
        else {
            diagnostics.push(unknown_model(used.model, at, written));
            continue;
        };
        let Some(spec) = &entry.spec else {
            continue;
        };
        if plays(spec, used.role) {
            continue;
        }
        let deed = deed(used.role);
        let able = written.models.iter().filter(|other| {
            other
                .spec
                .as_ref()
                .is_some_and(|spec| plays(spec, used.role))
        });
        let able: Vec<&str> = able.map(|other| other.name.as_str()).collect();
        let networks = listed(ModelSpec::kinds_for(ability(used.role)));
        let help = if able.is_empty() {
            format!("use a network that can {deed}: {networks}")
        } else {
            format!("use a model that can {deed}: {}", listed(able))
        };
        let message = format!(
            "`{model}` is a `{}` model, which cannot {deed}",
            spec.network()
        );
        let diagnostic = Diagnostic::new("config::wrong_role", at, message)
            .also(At::key(entry.settings.clone()), "the network is set here");
        diagnostics.push(diagnostic.help(help));
    }
}

fn unknown_model(model: &ModelName, at: At, written: &PipelineSpec) -> Diagnostic {
    let known: Vec<&str> = written
        .models
        .iter()
        .map(|entry| entry.name.as_str())
        .collect();
    let is_table = written
        .all_stages()
        .any(|(stage, _)| stage.name.as_str() == model.as_str());
    let diagnostic = Diagnostic::new(
        "config::unknown_model",
        at,
        format!("there is no model `{model}`"),
    )
    .suggest(suggest(model.as_str(), known.iter().copied()));
    match (is_table, known.is_empty()) {
        (true, _) => diagnostic.help(format!("name a model: `{model}` is a table")),
        (false, true) => diagnostic.help("define it under `models`: the pipeline has no models"),
        (false, false) => diagnostic.help(format!("available models: {}", listed(known))),
    }
}

fn no_training(stage: &Entry<TableName, StageSpec>, diagnostics: &mut Vec<Diagnostic>) {
    let uses = stage.spec.iter().flat_map(|spec| spec.as_stage().uses());
    for used in uses.filter(|used| used.role.learns()) {
        let message = format!(
            "`{}` trains `{}`, but stages under `evaluate` cannot train models",
            stage.name, used.model
        );
        let diagnostic = Diagnostic::new(
            "config::training_in_evaluate",
            At::key(stage.settings.clone()),
            message,
        );
        diagnostics.push(diagnostic.help("move it to `stages`"));
    }
}

/// Checks that the training stages of one model in a round form a chain: all but the first continue
/// from another, and no two from the same; otherwise its name would refer to two checkpoints. Also
/// warns of several rounds without training, which are all the same.
/// Reports scores of different judges in one `measure` stage, and judges with two answers to compare with.
fn compared_answers(written: &PipelineSpec, diagnostics: &mut Vec<Diagnostic>) {
    let judge_of = |table: &TableName| {
        let mut stages = written.all_stages().map(|(stage, _)| stage);
        match stages.find(|stage| stage.name == *table)?.spec.as_ref()? {
            StageSpec::Score(score) => Some(&score.judge),
            _ => None,
        }
    };
    for (stage, _) in written.all_stages() {
        if let Some(StageSpec::Score(score)) = &stage.spec
            && score.against.is_some()
            && let Some(judge) = written
                .models
                .iter()
                .find(|model| model.name == score.judge)
            && let Some(ask) = judge.spec.as_ref().and_then(ModelSpec::prompt_settings)
            && ask.other.is_some()
        {
            let message = format!(
                "`against` takes the place of `other` of judge `{}`, which would not be used",
                score.judge
            );
            let at = At::value(stage.settings.key("against"));
            let diagnostic = Diagnostic::new("config::judges", at, message);
            diagnostics.push(diagnostic.help("remove one of them"));
        }
        let Some(StageSpec::Measure(measure)) = &stage.spec else {
            continue;
        };
        let Some(base) = measure.rewards.get(&measure.base).and_then(judge_of) else {
            continue;
        };
        for (name, table) in &measure.rewards {
            if let Some(judge) = judge_of(table).filter(|judge| *judge != base) {
                let message = format!(
                    "`{name}` is scored by judge `{judge}`, `{}` by `{base}`: their scores cannot be \
                     compared",
                    measure.base
                );
                let at = At::value(stage.settings.key("rewards").key(name));
                let diagnostic = Diagnostic::new("config::judges", at, message);
                diagnostics.push(diagnostic.help("score the answers of both with one judge"));
            }
        }
    }
}

fn trained_once(written: &PipelineSpec, diagnostics: &mut Vec<Diagnostic>) {
    struct TrainedModel<'a> {
        table: &'a TableName,
        model: &'a ModelName,
        after: Option<&'a TableName>,
        /// The place that names the model.
        at: At,
        /// The place of `after`.
        at_after: At,
    }
    let mut trainings: Vec<TrainedModel> = Vec::new();
    for stage in &written.stages {
        let Some(spec) = stage.spec.as_ref().map(StageSpec::as_stage) else {
            continue;
        };
        let after = spec.inputs().into_iter().find(|input| input.field == AFTER);
        for used in spec.uses().into_iter().filter(|used| used.role.learns()) {
            trainings.push(TrainedModel {
                table: &stage.name,
                model: used.model,
                after: after.as_ref().and_then(|input| input.table),
                at: At::value(stage.settings.key(used.field)),
                at_after: At::value(stage.settings.key(AFTER)),
            });
        }
    }
    for (number, training) in trainings.iter().enumerate() {
        if let Some(after) = training.after
            && !trainings
                .iter()
                .any(|other| other.table == after && other.model == training.model)
        {
            // An unknown table already has a diagnostic.
            let Some(stage) = written.stages.iter().find(|stage| stage.name == *after) else {
                continue;
            };
            let message = format!(
                "`{}` continues from `{after}`, which does not train `{}`",
                training.table, training.model
            );
            let diagnostic = Diagnostic::new("config::after", training.at_after.clone(), message)
                .also(At::key(stage.settings.clone()), "does not train this model");
            diagnostics.push(diagnostic.help("set `after` to a `train_…` stage of the same model"));
            continue;
        }
        let rival = trainings[..number]
            .iter()
            .find(|other| other.model == training.model && other.after == training.after);
        if let Some(rival) = rival {
            let message = format!(
                "`{}` is trained from the same weights by two stages of a round",
                training.model
            );
            let diagnostic = Diagnostic::new("config::trained_twice", training.at.clone(), message)
                .label("second training stage")
                .also(rival.at.clone(), "first training stage");
            diagnostics.push(diagnostic.help(format!(
                "continue from the first stage with `after: {}`, or combine the rows of both into one \
                 table with `sql`",
                rival.table
            )));
        }
    }
    let any_training = !trainings.is_empty();
    let is_readable = written.stages.iter().all(|stage| stage.spec.is_some());
    if written.rounds.max().get() > 1 && !any_training && is_readable {
        let at = At::value(KeyPath::root().key("rounds"));
        let message = format!(
            "the pipeline has {} rounds, but no stage trains a model",
            written.rounds.max()
        );
        let warning = Diagnostic::warning("config::nothing_trained", at, message);
        diagnostics.push(warning.help("set `rounds: 1`, or add a `train_…` stage: without training, rounds differ only in their random numbers"));
    }
}

/// Checks that a reward given as SQL is a single numeric expression.
fn expressions(written: &PipelineSpec, diagnostics: &mut Vec<Diagnostic>) {
    for entry in &written.models {
        let Some(ModelSpec::Sql(reward)) = &entry.spec else {
            continue;
        };
        let tables = [(SqlReward::TABLE.to_owned(), Judged::schema())];
        let at = At::value(entry.settings.key("reward"));
        if let Some(problem) = query::reach_beyond(&reward.sql_as_it_is(), "prompt_id") {
            let diagnostic = Diagnostic::new("config::sql", at, problem);
            diagnostics.push(diagnostic.help(
                "use only the answer itself and the other answers to its prompt: rewards are computed one part at a time",
            ));
            continue;
        }
        let of_kind = query::plan(&reward.sql_as_it_is(), &tables, &[]);
        let diagnostic = match of_kind.ok().and_then(|schema| no_number(&schema)) {
            Some(kind) => {
                let message = format!("`reward` must be a number, but is {kind}");
                Diagnostic::new("config::sql", at, message).help(
                    "write a numeric expression, such as: case when text = answer then 1 else 0 end",
                )
            }
            None => match query::plan(&reward.sql(), &tables, &[]) {
                Ok(_) => continue,
                Err(error) => {
                    let (written, planned) = (&reward.reward, reward.sql());
                    let none = std::iter::empty();
                    sql::unplanned("config::sql", at, &error, written, &planned, none).help(
                        "write an expression over the columns text, question, answer, captions, candidate and prompt_id",
                    )
                }
            },
        };
        diagnostics.push(diagnostic);
    }
}

/// Checks that the backing model of a judge exists and can answer prompts, or is an endpoint.
fn backing_models(written: &PipelineSpec, diagnostics: &mut Vec<Diagnostic>) {
    for entry in &written.models {
        let Some(named) = entry.spec.as_ref().and_then(ModelSpec::backing_model) else {
            continue;
        };
        let at = At::value(entry.settings.key("model"));
        let known = written.models.iter();
        let able = known.filter(|other| {
            other
                .spec
                .as_ref()
                .is_some_and(|spec| spec.can(Role::Answers) || spec.endpoint().is_some())
        });
        let able: Vec<&str> = able.map(|other| other.name.as_str()).collect();
        if able.contains(&named) {
            continue;
        }
        let is_model = written
            .models
            .iter()
            .any(|other| other.name.as_str() == named);
        let message = if is_model {
            format!("`{named}` cannot be a backing model: it cannot answer prompts")
        } else {
            format!("there is no model `{named}`")
        };
        let diagnostic = Diagnostic::new("config::unknown_model", at, message);
        let diagnostic = diagnostic.suggest(suggest(named, able.iter().copied()));
        diagnostics.push(match &able[..] {
            [] => diagnostic.help("add a `llava_onevision` or `http` model under `models`"),
            able => diagnostic.help(format!(
                "use a model that answers prompts, or an endpoint: {}",
                listed(able.iter().copied())
            )),
        });
    }
}

/// Checks that a model without a reward adapter scores only after it has been trained: in an
/// evaluation.
fn finished(written: &PipelineSpec, diagnostics: &mut Vec<Diagnostic>) {
    let is_trained = |model: &ModelName| {
        let specs = written
            .stages
            .iter()
            .filter_map(|stage| stage.spec.as_ref());
        let mut uses = specs.flat_map(|spec| spec.as_stage().uses());
        uses.any(|used| used.role == ModelRole::LearnsRewards && used.model == model)
    };
    for (stage, is_evaluation) in written.all_stages() {
        for used in stage.spec.iter().flat_map(|spec| spec.as_stage().uses()) {
            let entry = written
                .models
                .iter()
                .find(|entry| entry.name == *used.model);
            let Some((entry, spec)) = entry.and_then(|entry| Some((entry, entry.spec.as_ref()?)))
            else {
                continue;
            };
            if used.role != ModelRole::Scores
                || !spec.is_unfinished()
                || (is_evaluation && is_trained(used.model))
            {
                continue;
            }
            let message = format!("`{}` cannot score answers: it has no adapter", used.model);
            let at = At::value(stage.settings.key(used.field));
            let diagnostic = Diagnostic::new("config::no_adapter", at, message)
                .also(At::key(entry.settings.clone()), "no `adapter` is set here");
            let help = if is_trained(used.model) {
                "score with it under `evaluate`, as it is trained in the same round, or in a separate \
                 pipeline that sets its `adapter`"
            } else {
                "set its `adapter`, or train one with `train_reward`"
            };
            diagnostics.push(diagnostic.help(help));
        }
    }
}

fn unused(written: &PipelineSpec, diagnostics: &mut Vec<Diagnostic>) {
    for entry in &written.models {
        let is_used = written.all_stages().any(|(stage, _)| match &stage.spec {
            Some(spec) => spec
                .as_stage()
                .uses()
                .iter()
                .any(|used| *used.model == entry.name),
            None => true,
        }) || written.models.iter().any(|other| {
            other.spec.as_ref().and_then(ModelSpec::backing_model) == Some(entry.name.as_str())
        });
        if !is_used {
            let message = format!("model `{}` is never used", entry.name);
            let at = At::key(entry.path.clone());
            diagnostics.push(Diagnostic::warning("config::unused", at, message));
        }
    }
    for variable in written.vars.iter().filter(|variable| !variable.is_used) {
        let message = format!("variable `{}` is never used", variable.name);
        let at = At::key(KeyPath::root().key("vars").key(&variable.name));
        diagnostics.push(Diagnostic::warning("config::unused", at, message));
    }
}

fn plays(spec: &ModelSpec, role: ModelRole) -> bool {
    spec.can(ability(role))
}

/// The ability that a role in a stage requires.
fn ability(role: ModelRole) -> Role {
    match role {
        ModelRole::Answers => Role::Answers,
        ModelRole::Scores => Role::Scores,
        ModelRole::LearnsPairs | ModelRole::Reads => Role::LearnsPairs,
        ModelRole::LearnsAnswers => Role::LearnsAnswers,
        ModelRole::LearnsRewards => Role::LearnsRewards,
    }
}

fn deed(role: ModelRole) -> &'static str {
    match role {
        ModelRole::Answers => "answer prompts",
        ModelRole::Scores => "score answers",
        ModelRole::LearnsPairs => "be trained with DPO",
        ModelRole::LearnsAnswers => "be trained with SFT",
        ModelRole::LearnsRewards => "be trained as a reward model",
        ModelRole::Reads => "compute log-probabilities of answers",
    }
}
