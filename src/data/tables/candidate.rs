//! Row type of candidates: the k sampled answers to a prompt.

use super::row::{rows, word_column};

/// The reason why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model sampled a stop token.
    Stop,
    /// The answer reached `max_new_tokens`.
    Length,
}
word_column!(Finish { Stop = "stop", Length = "length" });

rows! {
    /// One sampled answer to a prompt, with its tokens as sampled.
    pub struct Candidate: "candidate" => {
        /// Hash of the key inputs: prompt, model, settings and seed. Shared by all answers to a
        /// prompt.
        pub row_key: String,
        /// ID of the prompt.
        pub prompt_id: String,
        /// Index of the answer, from 0 to k - 1.
        pub candidate: i32,
        /// Text of the answer, without the stop token.
        pub text: String,
        /// Token IDs as sampled; the last one is the stop token if and only if `finish` is `stop`.
        pub token_ids: Vec<i32>,
        /// Natural-log probability of each token under the raw logits over the full vocabulary
        /// (temperature 1, no truncation).
        pub token_logps: Vec<f32>,
        /// Sum of `token_logps`.
        pub logp: f64,
        /// Finish reason: `stop`, or `length` if the answer was truncated at `max_new_tokens`.
        pub finish: Finish,
        /// Random seed of this answer.
        pub seed: i64,
        /// Fingerprint of the model that sampled the answer.
        pub model: String,
    }
}
