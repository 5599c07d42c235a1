//! A judge that averages another judge's scores over several orders of an image's captions.
//!
//! LLaVA-RLHF's training shows the captions in a random order (github llava-rlhf/LLaVA-RLHF,
//! `RLHF/data_utils`), so rewards depend on the order; the mean over several orders depends on it
//! less.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::ops::ControlFlow;

use sha2::{Digest, Sha256};

use super::{
    AnswerGroup, ChatPrompt, Emit, Judge, JudgeScore, ModelError, ModelTelemetry, RowFault,
};

/// A judge that calls another judge once per caption order; the first order is the given one.
pub struct CaptionPermutations {
    judge: Box<dyn Judge>,
    orders: NonZeroU32,
}

impl CaptionPermutations {
    pub fn new(judge: Box<dyn Judge>, orders: NonZeroU32) -> Self {
        Self { judge, orders }
    }
}

impl Judge for CaptionPermutations {
    fn score(
        &mut self,
        groups: &[AnswerGroup<'_>],
        emit: Emit<'_, Vec<JudgeScore>>,
    ) -> Result<ModelTelemetry, ModelError> {
        let mut prompts: Vec<ChatPrompt> = Vec::new();
        let mut of = Vec::new();
        for (index, group) in groups.iter().enumerate() {
            let captions = group.prompt.captions.as_ref().map_or(0, Vec::len);
            let orders = if captions > 1 { self.orders.get() } else { 1 };
            for order in 0..orders {
                prompts.push(in_order(group.prompt, order));
                of.push(index);
            }
        }
        let asked: Vec<AnswerGroup<'_>> = prompts
            .iter()
            .zip(&of)
            .map(|(prompt, &index)| AnswerGroup {
                prompt,
                answers: groups[index].answers.clone(),
                numbers: groups[index].numbers.clone(),
                context: groups[index].context,
            })
            .collect();
        let mut open: HashMap<usize, usize> = HashMap::new();
        for index in &of {
            *open.entry(*index).or_default() += 1;
        }
        let mut heard: HashMap<usize, Vec<Result<Vec<JudgeScore>, RowFault>>> = HashMap::new();
        self.judge.score(&asked, &mut |number, scores| {
            let index = of[number];
            let all = heard.entry(index).or_default();
            all.push(scores);
            if all.len() < open[&index] {
                return ControlFlow::Continue(());
            }
            let all = heard.remove(&index).expect("just heard");
            emit(index, mean(all))
        })
    }

    fn plan(&self) -> Option<String> {
        self.judge.plan()
    }
}

/// Returns the prompt with its captions in order number `order`; 0 is the given order.
fn in_order(prompt: &ChatPrompt, order: u32) -> ChatPrompt {
    let mut prompt = prompt.clone();
    if let Some(captions) = &mut prompt.captions
        && order > 0
    {
        // Sorted by a hash of number and caption, so that an order is the same everywhere.
        captions.sort_by_cached_key(|caption| Sha256::digest(format!("{order} {caption}")));
    }
    prompt
}

fn mean(all: Vec<Result<Vec<JudgeScore>, RowFault>>) -> Result<Vec<JudgeScore>, RowFault> {
    let all: Vec<Vec<JudgeScore>> = all.into_iter().collect::<Result<_, _>>()?;
    let count = all.len() as f64;
    let mut scores = all[0].clone();
    for (number, score) in scores.iter_mut().enumerate() {
        let sum: f64 = all.iter().map(|one| f64::from(one[number].reward)).sum();
        score.reward = (sum / count) as f32;
    }
    Ok(scores)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A judge that scores by the first caption.
    struct First;

    impl Judge for First {
        fn score(
            &mut self,
            groups: &[AnswerGroup<'_>],
            emit: Emit<'_, Vec<JudgeScore>>,
        ) -> Result<ModelTelemetry, ModelError> {
            for (index, group) in groups.iter().enumerate() {
                let captions = group.prompt.captions.as_deref().unwrap_or_default();
                let reward = captions.first().map_or(0.0, |first| first.len() as f32);
                let score = JudgeScore::of(reward);
                let scores = vec![score; group.answers.len()];
                if emit(index, Ok(scores)).is_break() {
                    break;
                }
            }
            Ok(ModelTelemetry::default())
        }
        fn plan(&self) -> Option<String> {
            None
        }
    }

    #[test]
    fn rewards_are_the_mean_over_orders_of_captions() {
        let prompt = |captions: Option<&[&str]>| ChatPrompt {
            places: Vec::new(),
            id: "p".to_owned(),
            images: Vec::new(),
            system: None,
            turns: Vec::new(),
            question: "?".to_owned(),
            captions: captions.map(|texts| texts.iter().map(ToString::to_string).collect()),
            answer: None,
            seed: 0,
        };
        let prompts = [
            prompt(Some(&["a", "bbb", "ccccc", "ddddddd"])),
            prompt(Some(&["alone"])),
            prompt(None),
        ];
        let groups = prompts
            .each_ref()
            .map(|prompt| AnswerGroup::new(prompt, vec!["yes", "no"]));
        let scored = |orders: u32| {
            let mut judge = CaptionPermutations::new(Box::new(First), orders.try_into().unwrap());
            let mut rewards = [0.0; 3];
            let emit = &mut |index: usize, scores: Result<Vec<JudgeScore>, RowFault>| {
                let scores = scores.unwrap();
                assert_eq!(scores.len(), 2);
                rewards[index] = scores[1].reward;
                ControlFlow::Continue(())
            };
            judge.score(&groups, emit).unwrap();
            rewards
        };
        let bits = |rewards: [f32; 3]| rewards.map(f32::to_bits);
        assert_eq!(
            bits(scored(1)),
            bits([1.0, 5.0, 0.0]),
            "one order is the given one"
        );
        let many = scored(400);
        assert!((many[0] - 4.0).abs() < 0.5, "{many:?}");
        assert_eq!(many[1..].to_vec(), [5.0, 0.0]);
        assert_eq!(bits(scored(7)), bits(scored(7)));
    }
}
