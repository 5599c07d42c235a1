//! Calls of models by stages: progress, notes and interrupts are the same for all of them.

use std::ops::ControlFlow;

use super::{Failure, ModelName, StageContext};
use ovchat_models::{
    AnswerGroup, ChatPrompt, Emit, Generation, JudgeScore, Listener, ModelError, ModelTelemetry,
    RowFault, Sampling,
};

/// The scores of a group's answers, or the fault of its row.
pub type Scored = Result<Vec<JudgeScore>, RowFault>;

/// Samples answers to prompts, and returns the results in the order of the prompts.
pub fn sampled(
    ctx: &mut StageContext<'_>,
    name: &ModelName,
    prompts: &[ChatPrompt],
    sampling: &Sampling,
) -> Result<Vec<Result<Vec<Generation>, RowFault>>, Failure> {
    let policy = ctx.models.policy(name)?;
    if let Some(plan) = policy.plan() {
        (ctx.say)(&format!("{name}: {plan}"));
    }
    let call = |emit: Emit<'_, _>| policy.sample(prompts, sampling, emit);
    let (count, stopping) = (prompts.len(), ctx.stopping);
    let (results, telemetry) = collected(name, count, |_| 1, stopping, ctx.progress, call)?;
    *ctx.telemetry = telemetry;
    Ok(results)
}

/// Scores groups of answers with a judge, and returns the results in the order of the groups.
/// `rows` returns the number of input rows that a group stands for, for the progress bar.
pub fn scored(
    ctx: &mut StageContext<'_>,
    name: &ModelName,
    groups: &[AnswerGroup<'_>],
    rows: impl Fn(usize) -> u64,
) -> Result<Vec<Scored>, Failure> {
    let judge = ctx.models.judge(name)?;
    let say = &mut *ctx.say;
    if let Some(plan) = judge.plan() {
        say(&format!("{name}: {plan}"));
    }
    let stopping = ctx.stopping;
    let mut listener = Listener {
        say: &mut |text| say(&format!("{name}: {text}")),
        stopping,
    };
    let call = |emit: Emit<'_, _>| judge.score_for(groups, emit, &mut listener);
    let count = groups.len();
    let (results, telemetry) = collected(name, count, rows, stopping, ctx.progress, call)?;
    *ctx.telemetry = telemetry;
    Ok(results)
}

/// Calls a model on `count` inputs and returns what it emits for each, in order. Reports the
/// finished rows, and stops the model once the run has been interrupted.
fn collected<T>(
    name: &ModelName,
    count: usize,
    rows: impl Fn(usize) -> u64,
    stopping: &dyn Fn() -> bool,
    progress: &mut dyn FnMut(u64),
    call: impl FnOnce(Emit<'_, T>) -> Result<ModelTelemetry, ModelError>,
) -> Result<(Vec<Result<T, RowFault>>, ModelTelemetry), Failure> {
    let mut results: Vec<Option<Result<T, RowFault>>> = (0..count).map(|_| None).collect();
    let mut done = 0;
    let telemetry = call(&mut |index, result| {
        results[index] = Some(result);
        done += rows(index);
        progress(done);
        if stopping() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    let telemetry = telemetry.map_err(Failure::of(name))?;
    // An interrupted model leaves inputs without results.
    let results = results.into_iter();
    let results = results.map(|result| result.ok_or(Failure::Interrupted));
    Ok((results.collect::<Result<_, _>>()?, telemetry))
}

#[cfg(test)]
mod tests {
    use super::super::test_pipeline::TestPipeline;
    use super::*;

    /// Scores two answers to each of two prompts.
    fn scored_twice(pipeline: &mut TestPipeline) -> Result<Vec<Scored>, Failure> {
        let prompt = |id: &str| ChatPrompt {
            places: Vec::new(),
            id: id.to_owned(),
            images: Vec::new(),
            system: None,
            turns: Vec::new(),
            question: "Why?".to_owned(),
            captions: None,
            answer: None,
            seed: 0,
        };
        let prompts = [prompt("a"), prompt("b")];
        let groups: Vec<AnswerGroup<'_>> = prompts
            .iter()
            .map(|prompt| AnswerGroup {
                prompt,
                answers: vec!["So.", "No."],
                numbers: vec![0, 1],
                ..AnswerGroup::new(prompt, Vec::new())
            })
            .collect();
        let judge = "judge".to_owned().try_into().unwrap();
        pipeline.with_context(|ctx| scored(ctx, &judge, &groups, |group| group as u64 + 1))
    }

    #[test]
    fn results_keep_the_order_of_the_groups_and_report_progress() {
        let mut pipeline = TestPipeline::new();
        pipeline.models.unscored = Some("a");
        let results = scored_twice(&mut pipeline).unwrap();
        assert!(results[0].is_err());
        assert_eq!(results[1].as_ref().unwrap().len(), 2);
        assert_eq!(pipeline.progress, [1, 3]);
    }

    #[test]
    fn an_interrupted_judge_ends_the_stage() {
        let mut pipeline = TestPipeline::new();
        pipeline.is_interrupted = true;
        let failure = scored_twice(&mut pipeline).unwrap_err();
        assert!(matches!(failure, Failure::Interrupted));
        assert_eq!(pipeline.progress, [1]);
    }
}
