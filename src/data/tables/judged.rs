//! What a reward that is an expression of SQL is about; never stored.

use super::row::rows;

rows! {
    /// An answer that is judged, with what is known of its prompt.
    pub struct Judged: "judged" => {
        /// Its number among those that are judged at once.
        pub row: i64,
        /// The prompt that was answered.
        pub prompt_id: String,
        /// Its number among the answers to the prompt.
        pub candidate: i32,
        /// What the answer says.
        pub text: String,
        /// The question.
        pub question: String,
        /// The true or reference answer, if one is known.
        pub answer: Option<String>,
        /// Descriptions of the picture, if there are some.
        pub captions: Option<Vec<String>>,
    }
}
