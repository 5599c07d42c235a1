//! What the trainings share: how the optimizer goes, and how pairs become examples.

use arrow::datatypes::{Schema, SchemaRef};

use super::{Failure, Input, NonNegative, Positive, Scope, StageError, TableName, turns};
use crate::models::{self, Answer, Example, Optimization, Schedule};
use crate::tables::Pair;

/// The setting by which a training names another one of the same round that it goes on from.
pub const AFTER: &str = "after";

/// The settings of the optimizer, which every training has under these names.
#[derive(Debug, Clone, Copy)]
pub struct Recipe {
    pub learning_rate: Positive,
    pub schedule: Schedule,
    pub warmup_ratio: NonNegative,
    pub weight_decay: NonNegative,
    pub max_grad_norm: NonNegative,
}

impl Recipe {
    /// What no single setting shows.
    pub fn check(&self) -> Result<(), StageError> {
        if self.warmup_ratio.get() > 1.0 {
            return Err(StageError {
                field: Some("warmup_ratio"),
                message: format!("{} is more than all updates", self.warmup_ratio.get()),
                help: Some("give a share from 0 to 1; the usual one is 0.1".to_owned()),
            });
        }
        Ok(())
    }

    /// For a training of so many updates.
    pub fn optimization(&self, steps: usize) -> Optimization {
        Optimization {
            learning_rate: self.learning_rate.get(),
            schedule: self.schedule,
            warmup_ratio: self.warmup_ratio.get(),
            steps,
            weight_decay: self.weight_decay.get(),
            // torch's AdamW, which the document's scripts leave as it is.
            adam_betas: [0.9, 0.999],
            adam_epsilon: 1e-8,
            max_grad_norm: self.max_grad_norm.get(),
        }
    }
}

/// The inputs of a training: what it learns from, and the training that it goes on from.
pub fn inputs<'a>(rows: Input<'a>, after: Option<&'a TableName>) -> Vec<Input<'a>> {
    let after = after.map(|table| Input {
        field: AFTER,
        table: Some(table),
        needs: SchemaRef::new(Schema::empty()),
        kind: "training",
    });
    std::iter::once(rows).chain(after).collect()
}

/// A pair as learners take it.
pub fn example<'a>(
    pair: &'a Pair,
    prompt: &'a models::Prompt,
    reference: Option<[f64; 2]>,
) -> Example<'a> {
    let answer = |text: &str, token_ids: &Option<Vec<i32>>| Answer {
        text: text.to_owned(),
        token_ids: token_ids.clone(),
    };
    Example {
        id: &pair.row_key,
        prompt,
        chosen: answer(&pair.chosen, &pair.chosen_token_ids),
        rejected: answer(&pair.rejected, &pair.rejected_token_ids),
        reference,
    }
}

/// The prompts of pairs, with the bytes of their pictures.
pub fn prompts(scope: &mut Scope<'_>, pairs: &[Pair]) -> Result<Vec<models::Prompt>, Failure> {
    let mut prompts = Vec::with_capacity(pairs.len());
    for pair in pairs {
        prompts.push(models::Prompt {
            id: pair.prompt_id.clone(),
            pictures: scope.shelf.pictures(&pair.image_ids)?,
            system: pair.system.clone(),
            turns: turns(&pair.turns),
            question: pair.prompt.clone(),
            captions: pair.captions.clone(),
            seed: 0,
        });
    }
    Ok(prompts)
}
