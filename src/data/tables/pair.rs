//! Row type of preference pairs: a chosen and a rejected answer to a prompt.

use super::prompt::{Prompt, PromptVideo, Turn};
use super::row::{Kept, rows};

rows! {
    /// A chosen and a rejected answer. Together with table `images`, a pair contains everything
    /// that training needs.
    pub struct Pair: "pair" => {
        /// Hash of the key inputs; identifies the pair.
        pub row_key: String,
        /// `id` of the prompt in the source, if any.
        pub id: Option<String>,
        /// Image path as written in the source; without images, the path of the first video.
        pub image: Option<String>,
        /// Question text; an `<image>` or `<video>` in it is the place of an image or video, as in the
        /// table of prompts.
        pub prompt: String,
        /// Text of the preferred answer.
        pub chosen: String,
        /// Text of the other answer.
        pub rejected: String,
        /// ID of the prompt.
        pub prompt_id: String,
        /// IDs of the images.
        pub image_ids: Vec<String>,
        /// The videos; null: none.
        pub videos: Option<Vec<PromptVideo>>,
        /// System text; null: the model's default.
        pub system: Option<String>,
        /// Turns before the question, oldest first.
        pub turns: Vec<Turn>,
        /// True statements about the images, for judges that use them.
        pub captions: Option<Vec<String>>,
        /// Columns of the source that `keep` names, by their names; null: none.
        pub kept: Option<Kept>,
        /// Index of the chosen candidate; null for human-written pairs.
        pub chosen_candidate: Option<i32>,
        /// Index of the rejected candidate; null for human-written pairs.
        pub rejected_candidate: Option<i32>,
        /// Reward of the chosen answer.
        pub chosen_reward: Option<f32>,
        /// Reward of the rejected answer.
        pub rejected_reward: Option<f32>,
        /// Reward margin: `chosen_reward - rejected_reward`.
        pub margin: Option<f32>,
        /// Token IDs of the chosen answer as sampled; null: `chosen` is tokenized, with a stop
        /// token appended.
        pub chosen_token_ids: Option<Vec<i32>>,
        /// Token IDs of the rejected answer as sampled; null: `rejected` is tokenized, with a
        /// stop token appended.
        pub rejected_token_ids: Option<Vec<i32>>,
        /// Natural-log probability of the chosen answer under `model`.
        pub chosen_logp: Option<f64>,
        /// Natural-log probability of the rejected answer under `model`.
        pub rejected_logp: Option<f64>,
        /// Fingerprint of the model that sampled the answers and computed their
        /// log-probabilities.
        pub model: Option<String>,
    }
}

impl From<Pair> for Prompt {
    /// Returns the prompt of a pair; a pair has no known answer.
    fn from(pair: Pair) -> Self {
        Self {
            row_key: pair.row_key,
            prompt_id: pair.prompt_id,
            id: pair.id,
            image: pair.image,
            image_ids: pair.image_ids,
            videos: pair.videos,
            system: pair.system,
            turns: pair.turns,
            question: pair.prompt,
            captions: pair.captions,
            answer: None,
            kept: pair.kept,
        }
    }
}
