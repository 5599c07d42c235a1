//! Row type of rewards: a judge's score for each candidate.

use super::row::rows;

rows! {
    /// A judge's score for one candidate.
    pub struct Reward: "reward" => {
        /// Hash of the key inputs: the prompt, its answers, the judge and its settings.
        pub row_key: String,
        /// ID of the prompt.
        pub prompt_id: String,
        /// Index of the scored answer, from 0 to k - 1.
        pub candidate: i32,
        /// Name of the judge in the pipeline.
        pub judge: String,
        /// Reward; higher is better, on the judge's own scale.
        pub reward: f32,
        /// Reply of the judge, for judges that generate text.
        pub reply: Option<String>,
        /// Name of the verdict, for judges whose verdicts have names.
        pub label: Option<String>,
        /// Score of the answer shown first, for judges that score two answers at a time in one order.
        pub first_score: Option<f32>,
        /// Score of the answer shown second, which is this candidate, for the same judges.
        pub second_score: Option<f32>,
        /// Reason why `reward` is a substitute (`unreadable` of the judge); null: the judge gave it.
        pub failure: Option<String>,
    }
}
