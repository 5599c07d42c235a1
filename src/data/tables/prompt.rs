//! Row type of prompts: images, a question, and the conversation before it.

use super::row::{rows, struct_column, word_column};

/// The role of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    User,
    Assistant,
}
word_column!(Role { User = "user", Assistant = "assistant" });

/// One turn of the conversation before the question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// Role: `user` or `assistant`.
    pub role: Role,
    /// Text of the turn; an `<image>` in a text of the user may be the place of an image.
    pub text: String,
}
struct_column!(Turn {
    role: Role,
    text: String
});

rows! {
    /// A question about images.
    pub struct Prompt: "prompt" => {
        /// Hash of the key inputs; equal keys mean equal rows.
        pub row_key: String,
        /// Hash of images, system text, turns, question, and the number of earlier occurrences.
        /// Unique within the table, unlike the source's `id`, which identifies an image.
        pub prompt_id: String,
        /// `id` in the source, if any.
        pub id: Option<String>,
        /// Image path as written in the source (the first one, if there are several).
        pub image: Option<String>,
        /// IDs of the images, in the order of the conversation.
        pub image_ids: Vec<String>,
        /// System text; null: the model's default.
        pub system: Option<String>,
        /// Turns before the question, oldest first.
        pub turns: Vec<Turn>,
        /// Question text. If not all images stand before the user's first text, one line each, an
        /// `<image>` in this text and those of the user's turns is the place of the next image.
        pub question: String,
        /// Descriptions of the image, for judges that use them.
        pub captions: Option<Vec<String>>,
        /// Ground-truth or reference answer, if known.
        pub answer: Option<String>,
    }
}
