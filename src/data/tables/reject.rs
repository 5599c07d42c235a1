//! Row type of rejects: rows set aside, each with a reason. No row is skipped silently.

use super::row::{rows, word_column};

/// The class of a reject: a faulty row, or one that a rule excluded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RejectClass {
    /// The row is faulty; counts towards `reject_share_max`.
    Fault,
    /// A rule excluded the row, for example a tie.
    Dropped,
}
word_column!(RejectClass { Fault = "fault", Dropped = "dropped" });

rows! {
    /// A row that a stage rejected.
    pub struct Reject: "reject" => {
        /// Name of the stage.
        pub stage: String,
        /// Round; null for a static table.
        pub round: Option<i32>,
        /// Identifier of the row: `prompt_id` if there is one, else its position and ID in the
        /// source, such as `line 3, id q17`.
        pub id: String,
        /// Class: `fault` for a faulty row, `dropped` for a row that a rule excluded.
        pub class: RejectClass,
        /// Reason, as text.
        pub reason: String,
    }
}
