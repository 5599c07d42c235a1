//! Row type of comparisons: a judge's rewards for the two answers of a pair.

use super::row::rows;

rows! {
    /// A judge's rewards for the chosen and the rejected answer of a pair.
    pub struct Comparison: "comparison" => {
        /// Hash of the key inputs: the pair and the judge.
        pub row_key: String,
        /// `row_key` of the pair.
        pub pair: String,
        /// `id` of the pair in the source, if any.
        pub id: Option<String>,
        /// ID of the pair's prompt.
        pub prompt_id: String,
        /// Name of the judge in the pipeline.
        pub judge: String,
        /// Reward of the chosen answer.
        pub chosen_reward: f32,
        /// Reward of the rejected answer.
        pub rejected_reward: f32,
        /// Reward margin: `chosen_reward - rejected_reward`.
        pub margin: f32,
        /// True if the chosen answer has the higher reward.
        pub agrees: bool,
        /// True if the judge's preference flips when the answers are shown in the opposite order;
        /// null for judges that see one answer at a time.
        pub flips: Option<bool>,
    }
}
