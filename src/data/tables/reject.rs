//! Rejects: rows set aside, and why. Nothing is skipped silently.

use super::row::{rows, word_column};

/// Whether something is wrong with a row, or a rule left it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RejectClass {
    /// Something is wrong with it; counts towards `reject_share_max`.
    Fault,
    /// A rule left it out, such as a tie.
    Dropped,
}
word_column!(RejectClass { Fault = "fault", Dropped = "dropped" });

rows! {
    /// A row that a stage set aside.
    pub struct Reject: "reject" => {
        /// The stage that set it aside.
        pub stage: String,
        /// The round; absent for a table that is made once.
        pub round: Option<i32>,
        /// What names the row: `prompt_id` where there is one, else its place in the source, with its own
        /// id: `line 3, id q17`.
        pub id: String,
        /// `fault`: something is wrong with it; `dropped`: a rule left it out.
        pub class: RejectClass,
        /// Why, in words.
        pub reason: String,
    }
}
