//! Labels: what people said of two answers side by side.

use super::row::rows;

rows! {
    /// What somebody said, as the page wrote it down. Of lines with one `id` the last counts.
    pub struct Label: "label" => {
        /// Its number among those of the table that waits.
        pub id: i64,
        /// The prompt.
        pub prompt_id: String,
        /// The candidate that was shown left.
        pub left: i32,
        /// The candidate that was shown right.
        pub right: i32,
        /// SHA-256 of the text of the left one.
        pub left_digest: String,
        /// SHA-256 of the text of the right one.
        pub right_digest: String,
        /// `left` or `right` is better, `tie`, `both_bad`, `skip`; `undone`: it was taken back.
        pub said: String,
        /// Who said it.
        pub by: String,
        /// When, in seconds since 1970.
        pub at: i64,
        /// How long it took.
        pub milliseconds: i64,
    }
}
