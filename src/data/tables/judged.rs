//! Row type of the input of a reward defined by a SQL expression; never stored.

use super::row::rows;

rows! {
    /// An answer to be judged, with the fields of its prompt.
    pub struct Judged: "judged" => {
        /// Index of the answer within the batch that is judged.
        pub row: i64,
        /// ID of the prompt.
        pub prompt_id: String,
        /// Index of the answer among the candidates of the prompt.
        pub candidate: i32,
        /// Text of the answer.
        pub text: String,
        /// Question text.
        pub question: String,
        /// Ground-truth or reference answer, if known.
        pub answer: Option<String>,
        /// Descriptions of the image, if any.
        pub captions: Option<Vec<String>>,
    }
}
