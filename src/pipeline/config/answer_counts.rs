//! Checks that prompts have enough answers for judges and pairs.

use super::diagnostic::{At, Diagnostic};
use super::pipeline::{Entry, PipelineSpec};
use crate::stages::{Sample, StageSpec, TableName};
use ovchat_models::Mode;

/// Reports judges and pairs that need two answers to a prompt, or two different ones, but get one.
/// The answers that a query or a command keeps are only known in the run, which rejects such
/// prompts.
pub fn too_few(written: &PipelineSpec) -> Vec<Diagnostic> {
    let mut diagnostics = Vec::new();
    for (stage, _) in written.all_stages() {
        diagnostics.extend(compared(stage, written));
        diagnostics.extend(paired(stage, written));
    }
    diagnostics
}

type Stage = Entry<TableName, StageSpec>;

fn stage_of<'a>(written: &'a PipelineSpec, table: &TableName) -> Option<&'a Stage> {
    let mut stages = written.all_stages().map(|(stage, _)| stage);
    stages.find(|stage| stage.name == *table)
}

/// Returns the `sample` stage that builds a table.
fn sampling<'a>(written: &'a PipelineSpec, table: &TableName) -> Option<(&'a Stage, &'a Sample)> {
    let stage = stage_of(written, table)?;
    match &stage.spec {
        Some(StageSpec::Sample(sample)) => Some((stage, sample)),
        _ => None,
    }
}

/// Returns the table of answers that a table of rewards scores.
fn answers_of<'a>(written: &'a PipelineSpec, rewards: &'a TableName) -> Option<&'a TableName> {
    let mut rewards = rewards;
    // At most as many steps as there are stages: `combine` may be part of a cycle.
    for _ in written.all_stages() {
        match &stage_of(written, rewards)?.spec {
            Some(StageSpec::Score(score)) => return Some(&score.candidates),
            Some(StageSpec::Combine(combine)) => rewards = combine.rewards.first()?,
            _ => return None,
        }
    }
    None
}

/// Reports a pairwise judge that gets only one answer per prompt.
fn compared(stage: &Stage, written: &PipelineSpec) -> Option<Diagnostic> {
    let Some(StageSpec::Score(score)) = &stage.spec else {
        return None;
    };
    let mut models = written.models.iter();
    let judge = models.find(|entry| entry.name == score.judge)?;
    let prompt_settings = judge.spec.as_ref()?.prompt_settings()?;
    let (candidates, sample) = sampling(written, &score.candidates)?;
    if prompt_settings.mode != Mode::Pairwise || sample.count.get() > 1 {
        return None;
    }
    let message = format!(
        "judge `{}` compares answers pairwise, but `{}` has only one answer per prompt",
        score.judge, score.candidates
    );
    let at = At::value(stage.settings.key("judge"));
    let diagnostic = Diagnostic::new("config::one_answer", at, message).also(
        At::value(candidates.settings.key("count")),
        "one answer per prompt",
    );
    Some(diagnostic.help(
        "use a judge that scores each answer separately (`ask: { mode: pointwise }`), or sample at \
         least two answers",
    ))
}

/// Reports a stage that pairs answers of which there is only one, or which are all identical.
fn paired(stage: &Stage, written: &PipelineSpec) -> Option<Diagnostic> {
    let (field, candidates) = match stage.spec.as_ref()? {
        StageSpec::SelectExtremes(pairs) => ("rewards", answers_of(written, &pairs.rewards)?),
        StageSpec::SelectPairs(pairs) => ("rewards", answers_of(written, &pairs.rewards)?),
        StageSpec::AskPeople(pairs) => ("candidates", &pairs.candidates),
        _ => return None,
    };
    let (sampled, sample) = sampling(written, candidates)?;
    let (setting, why, help) = if sample.count.get() == 1 {
        (
            "count",
            format!("`{candidates}` has only one answer per prompt"),
            "sample at least two answers: `count: 2`",
        )
    } else if sample.temperature.get() == 0.0 {
        (
            "temperature",
            format!("all answers to a prompt in `{candidates}` are identical"),
            "set `temperature` above 0, such as 0.7: at 0, decoding is greedy",
        )
    } else {
        return None;
    };
    let message = format!("`{}` pairs two answers to a prompt, but {why}", stage.name);
    let at = At::value(stage.settings.key(field));
    let diagnostic = Diagnostic::new("config::one_answer", at, message);
    let label = format!("`{candidates}` is sampled here");
    Some(
        diagnostic
            .also(At::key(sampled.settings.key(setting)), label)
            .help(help),
    )
}
