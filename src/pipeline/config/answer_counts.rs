//! How many answers a prompt has, and who needs more of them.

use super::check::all_stages;
use super::diagnostic::{At, Diagnostic};
use super::pipeline::{Entry, PipelineSpec};
use crate::stages::{Sample, StageSpec, TableName};
use ovchat_models::Mode;

/// Judges and pairs that need two answers to a prompt, or two that differ, and get one. What a query or
/// a command leaves of answers is not known before the run, which rejects such prompts.
pub fn too_few(written: &PipelineSpec) -> Vec<Diagnostic> {
    let mut diagnostics = Vec::new();
    for (stage, _) in all_stages(written) {
        diagnostics.extend(compared(stage, written));
        diagnostics.extend(paired(stage, written));
    }
    diagnostics
}

type Stage = Entry<TableName, StageSpec>;

fn stage_of<'a>(written: &'a PipelineSpec, table: &TableName) -> Option<&'a Stage> {
    let mut stages = all_stages(written).map(|(stage, _)| stage);
    stages.find(|stage| stage.name == *table)
}

/// The sampling that makes a table.
fn sampling<'a>(written: &'a PipelineSpec, table: &TableName) -> Option<(&'a Stage, &'a Sample)> {
    let stage = stage_of(written, table)?;
    match &stage.spec {
        Some(StageSpec::Sample(sample)) => Some((stage, sample)),
        _ => None,
    }
}

/// The table of answers that a table of rewards is about.
fn answers_of<'a>(written: &'a PipelineSpec, rewards: &'a TableName) -> Option<&'a TableName> {
    let mut rewards = rewards;
    // As many steps at most as there are stages: `combine` may stand in a loop.
    for _ in all_stages(written) {
        match &stage_of(written, rewards)?.spec {
            Some(StageSpec::Score(score)) => return Some(&score.candidates),
            Some(StageSpec::Combine(combine)) => rewards = combine.rewards.first()?,
            _ => return None,
        }
    }
    None
}

/// A judge that compares answers needs two of them.
fn compared(stage: &Stage, written: &PipelineSpec) -> Option<Diagnostic> {
    let Some(StageSpec::Score(score)) = &stage.spec else {
        return None;
    };
    let mut models = written.models.iter();
    let judge = models.find(|entry| entry.name == score.judge)?;
    let asking = judge.spec.as_ref()?.asking()?;
    let (candidates, sample) = sampling(written, &score.candidates)?;
    if asking.mode != Mode::Pairwise || sample.count.get() > 1 {
        return None;
    }
    let message = format!(
        "`{}` compares the answers to a prompt with each other, and `{}` has one answer to each",
        score.judge, score.candidates
    );
    let at = At::value(stage.settings.key("judge"));
    let diagnostic = Diagnostic::new("config::one_answer", at, message)
        .also(At::value(candidates.settings.key("count")), "one answer");
    Some(diagnostic.help(
        "name a judge that scores each answer by itself (`ask: { mode: pointwise }`), or sample at \
         least two answers",
    ))
}

/// A pair needs two answers that differ.
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
            format!("`{candidates}` has one answer to each"),
            "sample at least two answers: `count: 2`",
        )
    } else if sample.temperature.get() == 0.0 {
        (
            "temperature",
            format!("all answers of `{candidates}` to a prompt are the same"),
            "set a `temperature` above 0, such as 0.7: at 0 nothing is drawn at random",
        )
    } else {
        return None;
    };
    let message = format!("`{}` pairs two answers to a prompt, and {why}", stage.name);
    let at = At::value(stage.settings.key(field));
    let diagnostic = Diagnostic::new("config::one_answer", at, message);
    let label = format!("`{candidates}` is sampled here");
    Some(
        diagnostic
            .also(At::key(sampled.settings.key(setting)), label)
            .help(help),
    )
}
