//! A prompt that waits to be answered.

use super::super::images::DecodedImage;
use ovchat_models::preprocess::PromptIds;

/// A prompt that waits to be answered.
#[derive(Debug, Clone)]
pub struct PendingPrompt {
    /// The index of the prompt in the call.
    pub index: usize,
    pub text: PromptIds,
    pub shown: Vec<DecodedImage>,
    /// Tokens up to the end of an image, if another prompt of the call has the same prefix; they are
    /// prefilled once for all of these. 0 if there is no such image.
    pub prefix: usize,
    /// The seeds of all answers.
    pub seeds: Vec<i64>,
    /// The number of answers to generate; greedy answers are all equal, so only one is.
    pub drafts: usize,
    /// The maximum number of tokens of an answer.
    pub tokens_max: usize,
}

impl PendingPrompt {
    /// The maximum number of tokens of the prompt and its answers.
    pub fn tokens(&self) -> usize {
        self.text.ids.len() + self.drafts * self.tokens_max
    }
}
