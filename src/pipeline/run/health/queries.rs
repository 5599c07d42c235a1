//! The queries of a plan's health metrics: which tables have which part in a round, and the SQL over
//! them.

use std::collections::VecDeque;

use crate::config::{Plan, PlannedStage};
use crate::stages::{ModelState, StageSpec, TableName};
use ovchat_data::store::LABELS;
use ovchat_data::tables::{Candidate, DpoStep, Prompt, Reward, Row};
use ovchat_query::identifier;

const ANSWERS: &str = include_str!("answers.sql");
const REWARDS: &str = include_str!("rewards.sql");
const KNOWN_ANSWERS: &str = include_str!("known_answers.sql");
const PAIRS: &str = include_str!("pairs.sql");
const TRAINING: &str = include_str!("training.sql");
const HELDOUT_ANSWERS: &str = include_str!("heldout_answers.sql");
const HELDOUT_REWARDS: &str = include_str!("heldout_rewards.sql");
const OF_LABELS: &str = include_str!("labels.sql");

/// A query that computes metrics of a round: the columns `metric`, `value` and `n`, and possibly `low`
/// and `high`. Its parameter is `$round`.
#[derive(Debug, Clone, PartialEq)]
pub struct MetricQuery {
    /// The table that the metrics describe.
    pub source: String,
    pub sql: String,
    /// The tables that must be there in the round; the others may be static.
    pub of_round: Vec<TableName>,
}

/// Returns the queries of a plan: of the tables that lead to the pairs of its DPO trainings, and of the
/// rewards of its evaluation.
pub fn queries(plan: &Plan) -> Vec<MetricQuery> {
    let mut found = Vec::new();
    for stage in &plan.stages {
        if let StageSpec::TrainDpo(train) = &stage.spec {
            of_pairs(plan, &train.pairs, &mut found);
            let reference = train.reference_model();
            if let Some((_, state)) = reference.filter(|(model, _)| **model == train.model) {
                let rounds = match state {
                    ModelState::Now => "s.round <= $round",
                    ModelState::Initial => "s.round = $round",
                };
                let beta = train.beta.get().to_string();
                let values = [("beta", beta), ("rounds", rounds.to_owned())];
                found.push(filled(TRAINING, &[("steps", stage)], &values));
            }
        }
    }
    let is_trained = plan
        .stages
        .iter()
        .any(|stage| stage.kind == Some(DpoStep::KIND));
    let evaluation = plan.evaluate.iter().filter(|_| is_trained);
    for rewards in evaluation.filter(|stage| is_reward(stage) && !stage.is_static) {
        let answers = nearest(plan, rewards, is_candidate);
        let prompts = answers.and_then(|answers| nearest(plan, answers, is_prompt));
        if let (Some(answers), Some(prompts)) = (answers, prompts) {
            let tables = [("answers", answers), ("prompts", prompts)];
            found.push(filled(HELDOUT_ANSWERS, &tables, &[]));
            let tables = [("rewards", rewards), ("prompts", prompts)];
            found.push(filled(HELDOUT_REWARDS, &tables, &[]));
        }
    }
    if plan
        .all()
        .any(|stage| matches!(stage.spec, StageSpec::AskPeople(_)))
    {
        found.push(MetricQuery {
            source: LABELS.to_owned(),
            sql: OF_LABELS.replace("{labels}", LABELS),
            of_round: Vec::new(),
        });
    }
    let mut queries: Vec<MetricQuery> = Vec::new();
    for query in found {
        // Two trainings may learn from the same pairs.
        if !queries.contains(&query) {
            queries.push(query);
        }
    }
    queries
}

/// Adds the queries of a table of pairs, and of the rewards and answers that it was made from.
fn of_pairs(plan: &Plan, pairs: &TableName, found: &mut Vec<MetricQuery>) {
    let Some(pairs) = plan.stage(pairs).filter(|pairs| !pairs.is_static) else {
        return;
    };
    let rewards = nearest(plan, pairs, is_reward);
    let answers = nearest(plan, rewards.unwrap_or(pairs), is_candidate);
    if let Some(answers) = answers.filter(|answers| !answers.is_static) {
        found.push(filled(ANSWERS, &[("answers", answers)], &[]));
        if let Some(rewards) = rewards.filter(|rewards| !rewards.is_static) {
            let tables = [("rewards", rewards), ("answers", answers)];
            found.push(filled(REWARDS, &tables, &[]));
            if let Some(prompts) = nearest(plan, answers, is_prompt) {
                let tables = [
                    ("rewards", rewards),
                    ("answers", answers),
                    ("prompts", prompts),
                ];
                found.push(filled(KNOWN_ANSWERS, &tables, &[]));
            }
        }
    }
    found.push(filled(PAIRS, &[("pairs", pairs)], &[]));
}

/// Returns the query of a template: the tables and values in place of their names in braces. The first
/// table is the one that the metrics describe.
fn filled(
    template: &str,
    tables: &[(&str, &PlannedStage)],
    values: &[(&str, String)],
) -> MetricQuery {
    let mut sql = template.to_owned();
    for (part, stage) in tables {
        let name = identifier(stage.name.as_str());
        let is_of_round = *part == "prompts" && !stage.is_static;
        let table = if is_of_round {
            format!("(select * from {name} where round = $round)")
        } else {
            name
        };
        sql = sql.replace(&format!("{{{part}}}"), &table);
    }
    for (name, value) in values {
        sql = sql.replace(&format!("{{{name}}}"), value);
    }
    let of_round = tables.iter().filter(|(_, stage)| !stage.is_static);
    MetricQuery {
        source: tables[0].1.name.to_string(),
        sql,
        of_round: of_round.map(|(_, stage)| stage.name.clone()).collect(),
    }
}

/// Returns the nearest table that a table is made from, directly or through others, that passes a test.
fn nearest<'p>(
    plan: &'p Plan,
    from: &PlannedStage,
    is_wanted: fn(&PlannedStage) -> bool,
) -> Option<&'p PlannedStage> {
    let inputs = |stage: &PlannedStage| -> Vec<&'p PlannedStage> {
        let names = stage.inputs.iter();
        names.filter_map(|(_, table)| plan.stage(table)).collect()
    };
    let mut next = VecDeque::from(inputs(from));
    while let Some(stage) = next.pop_front() {
        if is_wanted(stage) {
            return Some(stage);
        }
        next.extend(inputs(stage));
    }
    None
}

fn is_prompt(stage: &PlannedStage) -> bool {
    stage.kind == Some(Prompt::KIND)
}

fn is_candidate(stage: &PlannedStage) -> bool {
    stage.kind == Some(Candidate::KIND)
}

/// True for rewards, also those that a query makes.
fn is_reward(stage: &PlannedStage) -> bool {
    let has = |column| stage.schema.field_with_name(column).is_ok();
    stage.kind == Some(Reward::KIND)
        || (stage.kind.is_none() && ["prompt_id", "candidate", "reward"].into_iter().all(has))
}
