//! Comparisons: what a judge thinks of the two answers of a pair.

use super::row::rows;

rows! {
    /// A judge's rewards of the chosen and the rejected answer of a pair.
    pub struct Comparison: "comparison" => {
        /// What decides this row: the pair and the judge.
        pub row_key: String,
        /// The `row_key` of the pair.
        pub pair: String,
        /// The `id` that the source gave the pair, if any.
        pub id: Option<String>,
        /// The prompt of the pair.
        pub prompt_id: String,
        /// The judge, by its name in the pipeline.
        pub judge: String,
        /// The reward of the chosen answer.
        pub chosen_reward: f32,
        /// The reward of the rejected answer.
        pub rejected_reward: f32,
        /// `chosen_reward - rejected_reward`.
        pub margin: f32,
        /// Whether the chosen answer has the higher reward.
        pub agrees: bool,
        /// Whether the judge prefers the other one when the two are shown in the other order; absent
        /// where it sees one at a time.
        pub flips: Option<bool>,
    }
}
