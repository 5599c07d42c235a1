//! Scoring of answers with a judge, shared by the `score` and `compare` stages.

use std::ops::ControlFlow;

use super::{Failure, ModelName, StageContext};
use ovchat_models::{AnswerGroup, JudgeScore, Listener, RowFault};

/// The scores of a group's answers, or the fault of its row.
pub type Scored = Result<Vec<JudgeScore>, RowFault>;

/// Scores groups of answers with a judge, and returns the results in the order of the groups.
/// `rows` returns the number of input rows that a group stands for, for the progress bar.
pub fn scored(
    ctx: &mut StageContext<'_>,
    name: &ModelName,
    groups: &[AnswerGroup<'_>],
    rows: impl Fn(usize) -> u64,
) -> Result<Vec<Scored>, Failure> {
    let mut results: Vec<Option<Scored>> = vec![None; groups.len()];
    let stopping = ctx.stopping;
    let progress = &mut *ctx.progress;
    let say = &mut *ctx.say;
    let mut done = 0;
    let judge = ctx.models.judge(name)?;
    if let Some(plan) = judge.plan() {
        say(&format!("{name}: {plan}"));
    }
    let mut emit = |group: usize, result: Scored| {
        results[group] = Some(result);
        done += rows(group);
        progress(done);
        if stopping() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    };
    let mut listener = Listener {
        say: &mut |text| say(&format!("{name}: {text}")),
        stopping,
    };
    let telemetry = judge.score_for(groups, &mut emit, &mut listener);
    *ctx.telemetry = telemetry.map_err(Failure::of(name))?;
    // An interrupted judge leaves groups without scores.
    let results = results.into_iter();
    results
        .map(|result| result.ok_or(Failure::Interrupted))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::test_pipeline::TestPipeline;
    use super::*;
    use ovchat_models::ChatPrompt;

    /// Scores two answers to each of two prompts.
    fn scored_twice(pipeline: &mut TestPipeline) -> Result<Vec<Scored>, Failure> {
        let prompt = |id: &str| ChatPrompt {
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
