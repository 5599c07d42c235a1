//! Row type of prompts: images and videos, a question, and the conversation before it.

use super::row::{Kept, rows, struct_column, word_column};

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
    /// Text of the turn; an `<image>` or `<video>` in a text of the user may be the place of an image
    /// or video.
    pub text: String,
}
struct_column!(Turn {
    role: Role,
    text: String
});

/// A video of a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptVideo {
    /// SHA-256 of the file, in hex; the table `videos` describes it.
    pub video_id: String,
    /// IDs of the frames that models are shown, in order, in the table `images`.
    pub frame_ids: Vec<String>,
}
struct_column!(PromptVideo {
    video_id: String,
    frame_ids: Vec<String>
});

rows! {
    /// A question about images and videos.
    pub struct Prompt: "prompt" => {
        /// Hash of the key inputs; equal keys mean equal rows.
        pub row_key: String,
        /// Hash of images, videos, system text, turns, question, and the number of earlier occurrences.
        /// Unique within the table, unlike the source's `id`, which identifies an image.
        pub prompt_id: String,
        /// `id` in the source, if any.
        pub id: Option<String>,
        /// Image path as written in the source (the first one, if there are several); without
        /// images, the path of the first video.
        pub image: Option<String>,
        /// IDs of the images, in the order of the conversation.
        pub image_ids: Vec<String>,
        /// The videos, in the order of the conversation; null: none.
        pub videos: Option<Vec<PromptVideo>>,
        /// System text; null: the model's default.
        pub system: Option<String>,
        /// Turns before the question, oldest first.
        pub turns: Vec<Turn>,
        /// Question text. If not all images and videos stand before the user's first text, one line
        /// each, images first, an `<image>` in this text and those of the user's turns is the place of
        /// the next image, and a `<video>` that of the next video.
        pub question: String,
        /// Descriptions of the image, for judges that use them.
        pub captions: Option<Vec<String>>,
        /// Ground-truth or reference answer, if known.
        pub answer: Option<String>,
        /// Columns of the source that `keep` names, by their names: `kept['category']`; null: none.
        pub kept: Option<Kept>,
    }
}
