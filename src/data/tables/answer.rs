//! Row type of answers that other programs wrote.

use super::row::rows;

rows! {
    /// An answer to a prompt that was loaded instead of sampled. Judges score it like a candidate.
    pub struct Answer: "answer" => {
        /// Hash of the key inputs: prompt, model and text.
        pub row_key: String,
        /// ID of the prompt.
        pub prompt_id: String,
        /// Index of the answer, from 0.
        pub candidate: i32,
        /// Text of the answer.
        pub text: String,
        /// Name of the model that wrote it, if known.
        pub model: Option<String>,
    }
}
