//! Telemetry: what sampling or scoring a part took.

use super::row::rows;

rows! {
    /// What a network did for a part of a table, and how much of it was shared.
    pub struct Telemetry: "telemetry" => {
        /// The stage.
        pub stage: String,
        /// The round; absent for a table that is made once.
        pub round: Option<i32>,
        /// The part of the table, from 0.
        pub part: i32,
        /// Prompts that were read; rows that were taken over from an earlier making are not among them.
        pub prompts: i64,
        /// Distinct pictures that they show.
        pub pictures: i64,
        /// Pictures that went through the vision tower.
        pub tower_passes: i64,
        /// Tokens of the prompts, pictures included.
        pub prompt_tokens: i64,
        /// Those of them that were not read again, being the beginning of several prompts about the same
        /// pictures.
        pub shared_tokens: i64,
        /// Tokens of answers: sampled, or read to be scored.
        pub answer_tokens: i64,
        /// Passes of growing answers through the decoder, a token of each; 0 in scoring.
        pub steps: i64,
        /// Share of the places for answers that were taken in these steps; absent in scoring.
        pub occupancy: Option<f64>,
        /// Replies of a judge that could not be read and were asked for again.
        pub retries: i64,
        /// Answers that might grow side by side; 0 in scoring.
        [measured] pub rows_max: i64,
        /// Tokens of prompts and answers that might be in memory at once.
        [measured] pub tokens_max: i64,
        /// How often the two were halved because memory ran out.
        [measured] pub halvings: i64,
        /// Decoding and resizing pictures, most of it beside the network.
        [measured] pub seconds_pictures: f64,
        /// The network waiting for pictures.
        [measured] pub seconds_waiting: f64,
        /// The vision tower.
        [measured] pub seconds_tower: f64,
        /// Reading prompts; in scoring a part of `seconds_decode`.
        [measured] pub seconds_prefill: f64,
        /// Sampling answers, or reading them to score them.
        [measured] pub seconds_decode: f64,
        /// All of it, and opening the model, which falls into the first part.
        [measured] pub seconds: f64,
        /// The most memory of this machine that the process took so far, in bytes; not a GPU's.
        [measured] pub peak_memory: Option<i64>,
    }
}
