//! Warnings about tables that are never read.

use std::collections::HashSet;

use super::diagnostic::{At, Diagnostic};
use super::guard::Condition;
use super::lineage::{Lineage, StageDraft};
use super::pipeline::PipelineSpec;
use ovchat_data::tables::{Candidate, Comparison, Pair, Prompt, Reward, Row};
use ovchat_query as query;

impl Lineage {
    /// Warns of tables that no stage and no query of the pipeline reads and that are not a result.
    pub(super) fn unused(&mut self, written: &PipelineSpec) {
        if self.drafts.iter().any(|draft| draft.spec.is_none()) {
            return;
        }
        let inputs = self.drafts.iter().flat_map(|draft| &draft.inputs);
        let inputs = inputs.map(|(_, input)| self.drafts[*input].name.to_string());
        let mut read: HashSet<String> = inputs.collect();
        let views = written.report.iter().filter_map(|view| view.spec.as_ref());
        let mut queries: Vec<String> = views.map(|view| view.query.clone()).collect();
        queries.extend(written.rounds.stop_when().map(str::to_owned));
        queries.extend(written.rounds.by().map(str::to_owned));
        queries.extend(
            written
                .guard
                .iter()
                .filter_map(|entry| match &entry.guard.condition {
                    Condition::Query(query) => Some(query.clone()),
                    Condition::Defaults | Condition::Bound(_) => None,
                }),
        );
        for expectation in written
            .expect
            .iter()
            .filter_map(|entry| entry.spec.as_ref())
        {
            read.insert(expectation.table.to_string());
            queries.push(expectation.sql());
        }
        for query in queries {
            // A query that cannot be parsed has its own diagnostic, and may refer to any table.
            let Ok(tables) = query::tables(&query) else {
                return;
            };
            read.extend(tables);
        }
        let ways: Vec<Way> = self.drafts.iter().map(Way::of).collect();
        let is_training = ways.contains(&Way::TrainedModel);
        let furthest = ways.iter().max().copied();
        let is_result = |draft: &StageDraft, way: Way| {
            draft.is_evaluation
                || matches!(way, Way::TrainedModel | Way::Verdict)
                || (!is_training && (way == Way::Own || Some(way) == furthest))
        };
        for (draft, way) in self.drafts.iter().zip(&ways) {
            if read.contains(draft.name.as_str()) || is_result(draft, *way) {
                continue;
            }
            let message = format!("table `{}` is never read", draft.name);
            let diagnostic =
                Diagnostic::warning("config::unused", At::key(draft.path.clone()), message);
            let help = "remove it, or add it to the inputs of the stage that should read it";
            self.diagnostics.push(diagnostic.help(help));
        }
    }
}

/// The progress of a table from prompts to a trained model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    /// A table of the user's own query or command.
    Own,
    Prompts,
    Answers,
    Rewards,
    Pairs,
    /// A judge's verdicts on pairs.
    Verdict,
    TrainedModel,
}

impl Way {
    /// Returns how far the table of a stage has come, by its kind.
    fn of(draft: &StageDraft) -> Self {
        let Some(spec) = &draft.spec else {
            return Self::Own;
        };
        let stage = spec.as_stage();
        if stage.uses().iter().any(|model| model.role.learns()) {
            return Self::TrainedModel;
        }
        match stage.kind() {
            Some(Prompt::KIND) => Self::Prompts,
            Some(Candidate::KIND) => Self::Answers,
            Some(Reward::KIND) => Self::Rewards,
            Some(Pair::KIND) => Self::Pairs,
            Some(Comparison::KIND) => Self::Verdict,
            _ => Self::Own,
        }
    }
}
