//! Prompts: pictures and a question, with what was said before it.

use super::row::{rows, struct_column, word_column};

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    User,
    Assistant,
}
word_column!(Role { User = "user", Assistant = "assistant" });

/// One turn of the conversation before the question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// `user` or `assistant`.
    pub role: Role,
    /// What was said, without picture placeholders.
    pub text: String,
}
struct_column!(Turn {
    role: Role,
    text: String
});

rows! {
    /// A question about pictures.
    pub struct Prompt: "prompt" => {
        /// What decides this row; equal keys mean equal rows.
        pub row_key: String,
        /// Hash of pictures, system text, turns, question, and how often they came before. Unlike
        /// the document's `id`, which names a picture, it is unique in the table.
        pub prompt_id: String,
        /// The `id` that the source gave, if any.
        pub id: Option<String>,
        /// The picture's path as the source wrote it (the first, if there are several).
        pub image: Option<String>,
        /// The pictures, by content, in the order of the conversation.
        pub image_ids: Vec<String>,
        /// System text; absent: the model's usual one.
        pub system: Option<String>,
        /// What was said before the question, oldest first.
        pub turns: Vec<Turn>,
        /// The question, without picture placeholders.
        pub question: String,
        /// Descriptions of the picture that a judge may be given.
        pub captions: Option<Vec<String>>,
        /// The true or reference answer, if one is known.
        pub answer: Option<String>,
    }
}
