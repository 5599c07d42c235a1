//! Checks that the columns which judge prompts use are kept by the stages that load the prompts.

use super::diagnostic::{At, Diagnostic};
use super::pipeline::{Entry, PipelineSpec};
use crate::stages::{StageSpec, TableName};
use ovchat_models::JudgePrompt;

type Stage = Entry<TableName, StageSpec>;

/// Reports judge prompts that use a column as `row.NAME` which the loading stage does not keep. The
/// columns of tables of the user's own queries are only known in the run.
pub fn not_kept(written: &PipelineSpec) -> Vec<Diagnostic> {
    let stages = written.all_stages();
    let found = stages.filter_map(|(stage, _)| of_stage(written, stage));
    found.collect()
}

fn of_stage(written: &PipelineSpec, stage: &Stage) -> Option<Diagnostic> {
    let stage_of = |table: &TableName| {
        let mut stages = written.all_stages().map(|(stage, _)| stage);
        stages.find(|stage| stage.name == *table)
    };
    let (judge, loading) = match stage.spec.as_ref()? {
        StageSpec::Score(score) => {
            let prompts = match (&score.prompts, stage_of(&score.candidates)?.spec.as_ref()?) {
                (Some(prompts), _) => prompts,
                (None, StageSpec::Sample(sample)) => &sample.prompts,
                (None, StageSpec::LoadAnswers(load)) => &load.prompts,
                _ => return None,
            };
            (&score.judge, stage_of(prompts)?)
        }
        StageSpec::Compare(compare) => (&compare.judge, stage_of(&compare.pairs)?),
        _ => return None,
    };
    let kept = loading.spec.as_ref()?.kept_columns()?;
    let mut models = written.models.iter();
    let model = models.find(|entry| entry.name == *judge)?;
    // A judge prompt that cannot be opened has a diagnostic of its own.
    let judge_prompt = JudgePrompt::open(model.spec.as_ref()?.prompt_settings()?).ok()?;
    let missing = judge_prompt
        .row_names()
        .iter()
        .find(|name| !kept.contains(name))?;
    let message = format!(
        "judge `{judge}` uses `row.{missing}`, but `{}` does not keep the column `{missing}`",
        loading.name
    );
    let at = At::value(stage.settings.key("judge"));
    let help = format!(
        "add it to `keep` of `{}`, or change the judge prompt",
        loading.name
    );
    Some(Diagnostic::new("config::not_kept", at, message).help(help))
}
