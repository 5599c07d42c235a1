//! Rewards: what a judge thinks of each candidate.

use super::row::rows;

rows! {
    /// A judge's score of one candidate.
    pub struct Reward: "reward" => {
        /// What decides this row: the prompt, its answers, the judge, the settings.
        pub row_key: String,
        /// The prompt that was answered.
        pub prompt_id: String,
        /// The answer that is scored, 0 to k - 1.
        pub candidate: i32,
        /// The judge's name in the pipeline.
        pub judge: String,
        /// Higher is better. The scale is the judge's own.
        pub reward: f32,
        /// What a judge that writes wrote.
        pub reply: Option<String>,
    }
}
