//! Row type of labels: human preferences between two answers.

use super::row::rows;

rows! {
    /// One label from the labeling page. If several lines share an `id`, the last one is used.
    pub struct Label: "label" => {
        /// Number of the label within its labeling task.
        pub id: i64,
        /// ID of the prompt.
        pub prompt_id: String,
        /// Candidate shown on the left.
        pub left: i32,
        /// Candidate shown on the right.
        pub right: i32,
        /// SHA-256 of the left answer's text.
        pub left_digest: String,
        /// SHA-256 of the right answer's text.
        pub right_digest: String,
        /// Verdict: `left` or `right` for the better answer, `tie`, `both_bad`, `skip`, or
        /// `undone` for a retracted label.
        pub said: String,
        /// Name of the annotator.
        pub by: String,
        /// Time of the label, in seconds since the Unix epoch.
        pub at: i64,
        /// Time that the annotator took, in milliseconds.
        pub milliseconds: i64,
    }
}
