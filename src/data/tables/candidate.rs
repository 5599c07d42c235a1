//! Candidates: the k sampled answers to a prompt.

use super::row::{rows, word_column};

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model chose a stop token.
    Stop,
    /// `max_new_tokens` was reached.
    Length,
}
word_column!(Finish { Stop = "stop", Length = "length" });

rows! {
    /// One sampled answer to a prompt, with the tokens as they were sampled.
    pub struct Candidate: "candidate" => {
        /// What decides this row: the prompt, the model, the settings, the seed. All answers to a
        /// prompt share it.
        pub row_key: String,
        /// The prompt that is answered.
        pub prompt_id: String,
        /// 0 to k - 1.
        pub candidate: i32,
        /// The answer, without the stop token.
        pub text: String,
        /// The tokens as sampled; the stop token is there if and only if `finish` is `stop`.
        pub token_ids: Vec<i32>,
        /// Natural-log probability of each token under the raw logits over the whole vocabulary
        /// (temperature 1, nothing cut off).
        pub token_logps: Vec<f32>,
        /// The sum of `token_logps`.
        pub logp: f64,
        /// `stop`, or `length` when the answer was cut off at `max_new_tokens`.
        pub finish: Finish,
        /// The seed of this answer's random numbers.
        pub seed: i64,
        /// Fingerprint of the model that answered.
        pub model: String,
    }
}
