//! The table graph of a pipeline: the inputs of each stage, the execution order, and the columns of
//! every table.

use std::collections::VecDeque;

use arrow::datatypes::SchemaRef;

use super::diagnostic::{At, Diagnostic};
use super::pipeline::PipelineSpec;
use super::source::KeyPath;
use super::sql;
use super::suggest::{listed, suggest};
use crate::stages::{Input, ModelName, StageError, StageSpec, TableName};
use ovchat_data::tables::{Misfit, fits, schema_of};
use ovchat_models::ModelSpec;

/// A stage that is being resolved for the plan.
pub struct StageDraft {
    pub name: TableName,
    /// True if the stage is listed under `evaluate`.
    pub is_evaluation: bool,
    pub path: KeyPath,
    pub settings: KeyPath,
    /// The parsed stage; `None` if its text is invalid.
    pub spec: Option<StageSpec>,
    /// The tables that the stage reads: the setting that names each, and its position in
    /// [`Lineage::drafts`].
    pub inputs: Vec<(&'static str, usize)>,
    /// The columns of the table that the stage builds, once they are known.
    pub schema: Option<SchemaRef>,
    /// The first round in which the stage runs; `None` if its table is the same in every round and
    /// is built once.
    pub round_first: Option<u32>,
    /// True if the settings of the stage, or of a stage that it depends on, are invalid.
    pub is_doubtful: bool,
}

/// All stages, and the order in which they run.
pub struct Lineage {
    /// The stages in file order, those of `evaluate` last.
    pub drafts: Vec<StageDraft>,
    /// Positions in `drafts` in topological order: each stage after those that it reads, otherwise
    /// in file order.
    /// `[tag:plan_is_ordered]`
    pub order: Vec<usize>,
    pub diagnostics: Vec<Diagnostic>,
}

impl Lineage {
    /// Resolves and checks the table graph of a pipeline.
    pub fn trace(written: &PipelineSpec) -> Self {
        let drafts = written
            .all_stages()
            .map(|(stage, is_evaluation)| StageDraft {
                name: stage.name.clone(),
                is_evaluation,
                path: stage.path.clone(),
                settings: stage.settings.clone(),
                spec: stage.spec.clone(),
                inputs: Vec::new(),
                schema: None,
                round_first: None,
                is_doubtful: false,
            });
        let mut lineage = Self {
            drafts: drafts.collect(),
            order: Vec::new(),
            diagnostics: Vec::new(),
        };
        let models: Vec<&str> = written
            .models
            .iter()
            .map(|entry| entry.name.as_str())
            .collect();
        for position in 0..lineage.drafts.len() {
            lineage.connect(position, &models);
        }
        lineage.sort();
        let mut trained = trained(written);
        // Training a backing model also changes the models that it backs.
        let spoken_for = written.models.iter().filter(|entry| {
            let backing_model = entry.spec.as_ref().and_then(ModelSpec::backing_model);
            backing_model.is_some_and(|backing_model| {
                trained.iter().any(|model| model.as_str() == backing_model)
            })
        });
        let spoken_for: Vec<ModelName> = spoken_for.map(|entry| entry.name.clone()).collect();
        trained.extend(spoken_for);
        let unfinished: Vec<ModelName> = written
            .models
            .iter()
            .filter(|entry| entry.spec.as_ref().is_some_and(ModelSpec::is_unfinished))
            .map(|entry| entry.name.clone())
            .collect();
        for position in lineage.order.clone() {
            lineage.doubt(position);
            if lineage.inputs_fit(position) {
                lineage.find_inputs(position);
            }
            lineage.make_schema(position);
            lineage.settle(position, &trained, &unfinished);
        }
        lineage
    }

    /// Resolves the tables that a stage names.
    fn connect(&mut self, position: usize, models: &[&str]) {
        let draft = &self.drafts[position];
        let mut inputs = Vec::new();
        let mut diagnostics = Vec::new();
        for (nth, field, table) in named_inputs(draft) {
            let at = At::value(input_path(draft, field, nth));
            // Of two tables with the same name, the first is used; the second has a diagnostic.
            let Some(found) = self.drafts.iter().position(|other| other.name == *table) else {
                diagnostics.push(self.unknown_table(draft, table, at, models));
                continue;
            };
            if self.drafts[found].is_evaluation && !draft.is_evaluation {
                let message = format!(
                    "`{}` cannot read `{table}`, which is built under `evaluate`",
                    draft.name
                );
                let diagnostic = Diagnostic::new("config::reads_evaluate", at, message)
                    .also(At::key(self.drafts[found].path.clone()), "built here");
                diagnostics.push(diagnostic.help(
                    "move the table to `stages`: evaluations run after the stages of a round",
                ));
                continue;
            }
            inputs.push((field, found));
        }
        self.drafts[position].inputs = inputs;
        self.diagnostics.append(&mut diagnostics);
    }

    fn unknown_table(
        &self,
        reader: &StageDraft,
        table: &TableName,
        at: At,
        models: &[&str],
    ) -> Diagnostic {
        let readable = self.drafts.iter().filter(|draft| {
            draft.name != reader.name && (reader.is_evaluation || !draft.is_evaluation)
        });
        let known: Vec<&str> = readable.map(|draft| draft.name.as_str()).collect();
        let diagnostic = Diagnostic::new(
            "config::unknown_table",
            at,
            format!("there is no table `{table}`"),
        )
        .suggest(suggest(table.as_str(), known.iter().copied()));
        if models.contains(&table.as_str()) {
            diagnostic.help(format!("name a table: `{table}` is a model"))
        } else if known.is_empty() {
            diagnostic.help("add it under `stages`: there are no other tables")
        } else {
            diagnostic.help(format!("available tables: {}", listed(known)))
        }
    }

    /// Computes the execution order, and reports every cycle. Stages that load files run first, so that
    /// a faulty file stops a run before hours of sampling.
    fn sort(&mut self) {
        let mut is_done = vec![false; self.drafts.len()];
        let is_ready = |draft: &StageDraft, is_done: &[bool]| {
            draft.inputs.iter().all(|(_, input)| is_done[*input])
        };
        let is_loading = |draft: &StageDraft| draft.spec.as_ref().is_some_and(StageSpec::is_source);
        for (at, draft) in self.drafts.iter().enumerate() {
            if is_loading(draft) {
                is_done[at] = true;
                self.order.push(at);
            }
        }
        while let Some(next) =
            (0..self.drafts.len()).find(|at| !is_done[*at] && is_ready(&self.drafts[*at], &is_done))
        {
            is_done[next] = true;
            self.order.push(next);
        }
        // The remaining stages are part of a cycle or downstream of one. From any of them,
        // following the remaining inputs must return to a stage that was visited.
        let mut is_seen = is_done.clone();
        for start in 0..self.drafts.len() {
            let mut way: Vec<usize> = Vec::new();
            let mut at = start;
            while !is_seen[at] {
                is_seen[at] = true;
                way.push(at);
                let left = self.drafts[at]
                    .inputs
                    .iter()
                    .find(|(_, input)| !is_done[*input]);
                at = left.map_or(at, |(_, input)| *input);
            }
            if let Some(from) = way.iter().position(|met| *met == at) {
                self.complain_of_loop(&way[from..]);
            }
        }
    }

    fn complain_of_loop(&mut self, members: &[usize]) {
        let names = members
            .iter()
            .map(|member| format!("`{}`", self.drafts[*member].name));
        let first = &self.drafts[members[0]];
        let message = if members.len() == 1 {
            format!("`{}` reads itself", first.name)
        } else {
            let names: Vec<_> = names.collect();
            format!(
                "dependency cycle: {} reads {}",
                names.join(" reads "),
                names[0]
            )
        };
        let next = members.get(1).unwrap_or(&members[0]);
        let link = |from: &StageDraft, to: usize| {
            let (field, _) = from.inputs.iter().find(|(_, input)| *input == to)?;
            let table = &self.drafts[to].name;
            let nth = named_inputs(from)
                .iter()
                .find(|(_, f, t)| f == field && *t == table)?
                .0;
            Some(At::value(input_path(from, field, nth)))
        };
        let at = link(first, *next).unwrap_or_else(|| At::key(first.path.clone()));
        let diagnostic = Diagnostic::new("config::loop", at, message);
        self.diagnostics.push(
            diagnostic
                .help("remove one of these inputs: a table must be built before it can be read"),
        );
    }

    /// Marks a stage as doubtful if its diagnostics may only be consequences of earlier ones.
    fn doubt(&mut self, position: usize) {
        let draft = &self.drafts[position];
        let named = inputs_of(draft)
            .iter()
            .filter(|input| input.table.is_some())
            .count();
        let is_doubtful = draft.spec.is_none()
            || draft.inputs.len() < named
            || draft
                .inputs
                .iter()
                .any(|(_, input)| self.drafts[*input].is_doubtful);
        self.drafts[position].is_doubtful = is_doubtful;
    }

    /// Resolves the inputs that a stage needs but does not name: each is the nearest ancestor of
    /// its kind.
    fn find_inputs(&mut self, position: usize) {
        let Some(mut spec) = self.drafts[position].spec.clone() else {
            return;
        };
        let inputs = spec.as_stage().inputs();
        let wanted: Vec<_> = inputs
            .iter()
            .filter(|input| input.table.is_none())
            .map(|input| (input.field, input.kind))
            .collect();
        for (field, kind) in wanted {
            let found = self.nearest(position, kind);
            let draft = &self.drafts[position];
            let at = At::key(draft.settings.clone());
            let named = listed(found.iter().map(|at| self.drafts[*at].name.as_str()));
            let diagnostic = match found[..] {
                [one] => {
                    spec.as_stage_mut()
                        .find(field, self.drafts[one].name.clone());
                    self.drafts[position].inputs.push((field, one));
                    continue;
                }
                [] if draft.is_doubtful => continue,
                [] => Diagnostic::new(
                    "config::no_ancestor",
                    at,
                    format!(
                        "`{}` needs `{field}`, but no upstream table can be used as one",
                        draft.name
                    ),
                ),
                _ => Diagnostic::new(
                    "config::ambiguous",
                    at,
                    format!(
                        "`{field}` of `{}` is ambiguous: it could be any of {named}",
                        draft.name
                    ),
                ),
            };
            self.diagnostics
                .push(diagnostic.label(format!("add `{field}: …`")));
        }
        self.drafts[position].spec = Some(spec);
    }

    /// Returns the nearest tables of a kind upstream of the tables that a stage names.
    fn nearest(&self, position: usize, kind: &str) -> Vec<usize> {
        let named = self.drafts[position].inputs.iter().map(|(_, input)| *input);
        let mut layer: VecDeque<usize> = named.collect();
        let mut is_seen = vec![false; self.drafts.len()];
        while !layer.is_empty() {
            let mut next: Vec<usize> = Vec::new();
            for at in layer.drain(..) {
                for (_, input) in &self.drafts[at].inputs {
                    if !std::mem::replace(&mut is_seen[*input], true) {
                        next.push(*input);
                    }
                }
            }
            let found: Vec<usize> = next
                .iter()
                .copied()
                .filter(|at| is_of_kind(&self.drafts[*at], kind))
                .collect();
            if !found.is_empty() {
                return found;
            }
            layer.extend(next);
        }
        Vec::new()
    }

    /// Checks that the tables that a stage names have the columns that it needs.
    fn inputs_fit(&mut self, position: usize) -> bool {
        let draft = &self.drafts[position];
        let needed: Vec<Input<'_>> = inputs_of(draft);
        let mut diagnostics = Vec::new();
        for (field, input) in &draft.inputs {
            let given = &self.drafts[*input];
            let needs = needed
                .iter()
                .find(|needs| needs.field == *field && needs.table == Some(&given.name));
            let (Some(schema), Some(needs)) = (&given.schema, needs) else {
                continue;
            };
            let misfits = fits(&needs.needs, schema);
            if !misfits.is_empty() {
                diagnostics.push(self.misfit(draft, given, needs, &misfits));
            }
        }
        let fit = diagnostics.is_empty();
        self.diagnostics.append(&mut diagnostics);
        fit
    }

    fn misfit(
        &self,
        draft: &StageDraft,
        given: &StageDraft,
        needs: &Input<'_>,
        misfits: &[Misfit],
    ) -> Diagnostic {
        let (field, kind) = (needs.field, needs.kind);
        let made = given.spec.as_ref().and_then(|spec| spec.as_stage().kind());
        let message = match made {
            Some(made) => format!(
                "`{field}` must be a table of {kind}s, but `{}` is a table of {made}s",
                given.name
            ),
            None => format!(
                "`{}` cannot be used as a table of {kind}s: {}",
                given.name, misfits[0]
            ),
        };
        let fitting = self.order.iter().map(|at| &self.drafts[*at]);
        let fitting = fitting.filter(|other| other.name != draft.name && is_of_kind(other, kind));
        let fitting: Vec<&str> = fitting.map(|other| other.name.as_str()).collect();
        let others: Vec<_> = misfits[1..].iter().map(ToString::to_string).collect();
        let help = if !fitting.is_empty() {
            Some(format!("use a table of {kind}s: {}", listed(fitting)))
        } else if made.is_none() && !others.is_empty() {
            Some(format!("fix these columns as well: {}", others.join("; ")))
        } else {
            None
        };
        let at = At::value(draft.settings.key(field));
        Diagnostic::new("config::misfit", at, message).maybe_help(help)
    }

    /// Determines the columns of the table that a stage builds.
    fn make_schema(&mut self, position: usize) {
        let draft = &self.drafts[position];
        let Some(spec) = &draft.spec else {
            return;
        };
        let stage = spec.as_stage();
        // A stage with invalid inputs is given the usual columns of its stage type, so that its
        // readers are still checked without follow-up diagnostics.
        let usual = stage.kind().and_then(schema_of);
        let is_connected = draft.inputs.len() == stage.inputs().len()
            && draft
                .inputs
                .iter()
                .all(|(_, input)| self.drafts[*input].schema.is_some());
        if !is_connected {
            self.drafts[position].schema = usual;
            return;
        }
        let known = self.order.iter().map(|at| &self.drafts[*at]);
        let given: Vec<_> = known
            .filter_map(|draft| Some((draft.name.clone(), draft.schema.clone()?)))
            .collect();
        match stage.output(&given) {
            Ok(made) => self.drafts[position].schema = Some(made),
            Err(error) => {
                let diagnostic = wrong_stage(draft, error);
                self.diagnostics.push(diagnostic);
                // Any problem further downstream may be a consequence of this one.
                self.drafts[position].schema = usual;
                self.drafts[position].is_doubtful = true;
            }
        }
    }

    /// Decides in which rounds a stage runs. Its table is the same in every round if the stage
    /// draws no random numbers, uses no trained model, and all of its inputs are the same in every
    /// round.
    fn settle(&mut self, position: usize, trained: &[ModelName], unfinished: &[ModelName]) {
        let draft = &self.drafts[position];
        let varies = draft.spec.as_ref().is_some_and(|spec| {
            let stage = spec.as_stage();
            stage.draws() || stage.uses().iter().any(|used| trained.contains(used.model))
        });
        let inputs = draft.inputs.iter();
        let latest = inputs
            .filter_map(|(_, input)| self.drafts[*input].round_first)
            .max();
        // A judge without an adapter cannot score before it has been trained.
        let waits = draft.spec.as_ref().is_some_and(|spec| {
            let uses = spec.as_stage().uses();
            uses.iter().any(|used| unfinished.contains(used.model))
        });
        let own = u32::from(!draft.is_evaluation || waits);
        let round_first = match latest {
            Some(latest) => Some(latest.max(own)),
            None => varies.then_some(own),
        };
        self.drafts[position].round_first = round_first;
    }
}

/// The diagnostic for a stage that cannot build its table.
fn wrong_stage(draft: &StageDraft, error: StageError) -> Diagnostic {
    const CODE: &str = "config::stage";
    let at = match error.field {
        Some(field) => At::value(draft.settings.key(field)),
        None => At::key(draft.settings.clone()),
    };
    let diagnostic = match &draft.spec {
        Some(StageSpec::Sql(stage))
            if let (Some(query), Some(unplannable)) = (&stage.query, &error.query) =>
        {
            let tables = stage.tables.iter().map(TableName::as_str);
            sql::unplanned(CODE, at, unplannable, query, query, tables)
        }
        _ => Diagnostic::new(CODE, at, error.message),
    };
    match error.help {
        Some(help) => diagnostic.help(help),
        None => diagnostic,
    }
}

/// True if a table holds rows of a kind. The table of a query is of every kind that its columns
/// fit.
fn is_of_kind(draft: &StageDraft, kind: &str) -> bool {
    let made = draft.spec.as_ref().map(|spec| spec.as_stage().kind());
    match (made, &draft.schema) {
        (Some(Some(made)), _) => made == kind,
        (Some(None), Some(schema)) => {
            schema_of(kind).is_some_and(|needed| fits(&needed, schema).is_empty())
        }
        _ => false,
    }
}

/// The inputs of a stage; none if its text is invalid.
fn inputs_of(draft: &StageDraft) -> Vec<Input<'_>> {
    let spec = draft.spec.as_ref();
    spec.map(|spec| spec.as_stage().inputs())
        .unwrap_or_default()
}

/// The models that are trained in the rounds.
fn trained(written: &PipelineSpec) -> Vec<ModelName> {
    let specs = written
        .stages
        .iter()
        .filter_map(|stage| stage.spec.as_ref());
    let uses = specs.flat_map(|spec| spec.as_stage().uses());
    let trainers = uses.filter(|used| used.role.learns());
    trainers.map(|used| used.model.clone()).collect()
}

/// The tables that a stage names: the index among those of the same setting, the setting, and the
/// table.
fn named_inputs(draft: &StageDraft) -> Vec<(usize, &'static str, &TableName)> {
    let mut named: Vec<(usize, &'static str, &TableName)> = Vec::new();
    for input in draft.spec.iter().flat_map(|spec| spec.as_stage().inputs()) {
        if let Some(table) = input.table {
            let nth = named
                .iter()
                .filter(|(_, field, _)| *field == input.field)
                .count();
            named.push((nth, input.field, table));
        }
    }
    named
}

/// The path of the setting that names a table: `stages.x.score.candidates`,
/// `stages.y.sql.tables[1]`.
fn input_path(draft: &StageDraft, field: &str, nth: usize) -> KeyPath {
    let path = draft.settings.key(field);
    let is_list = draft.spec.as_ref().is_some_and(|spec| match spec {
        StageSpec::Sql(_) => field == "tables",
        StageSpec::Combine(_) | StageSpec::AskPeople(_) => field == "rewards",
        // A map of models to tables.
        StageSpec::Measure(_) => false,
        _ => false,
    });
    if is_list { path.index(nth) } else { path }
}
