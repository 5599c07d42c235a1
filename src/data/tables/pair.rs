//! Pairs: of two answers to a prompt, the preferred one and the other.

use super::prompt::Turn;
use super::row::rows;

rows! {
    /// A chosen and a rejected answer. With `images`, a pair is all that training needs.
    pub struct Pair: "pair" => {
        /// What decides this row; it names the pair.
        pub row_key: String,
        /// The `id` that the source gave its prompt, if any.
        pub id: Option<String>,
        /// The picture's path as the source wrote it.
        pub image: Option<String>,
        /// The question, without picture placeholders.
        pub prompt: String,
        /// The preferred answer.
        pub chosen: String,
        /// The other answer.
        pub rejected: String,
        /// The prompt that is answered.
        pub prompt_id: String,
        /// The pictures, by content.
        pub image_ids: Vec<String>,
        /// System text; absent: the model's usual one.
        pub system: Option<String>,
        /// What was said before the question, oldest first.
        pub turns: Vec<Turn>,
        /// Sentences that are true of the pictures, for judges that use them.
        pub captions: Option<Vec<String>>,
        /// Which candidate was chosen; absent for pairs that people wrote.
        pub chosen_candidate: Option<i32>,
        /// Which candidate was rejected.
        pub rejected_candidate: Option<i32>,
        /// The reward of the chosen answer.
        pub chosen_reward: Option<f32>,
        /// The reward of the rejected answer.
        pub rejected_reward: Option<f32>,
        /// `chosen_reward - rejected_reward`.
        pub margin: Option<f32>,
        /// The chosen answer as it was sampled; absent: `chosen` is tokenized and ends in a stop token.
        pub chosen_token_ids: Option<Vec<i32>>,
        /// The rejected answer as it was sampled.
        pub rejected_token_ids: Option<Vec<i32>>,
        /// Log-probability of the chosen answer under `model`, in natural log.
        pub chosen_logp: Option<f64>,
        /// Log-probability of the rejected answer under `model`.
        pub rejected_logp: Option<f64>,
        /// Fingerprint of the model that sampled the answers and whose log-probabilities these are.
        pub model: Option<String>,
    }
}
