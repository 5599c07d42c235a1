//! Row type of telemetry: cost of sampling or scoring one part of a table.

use super::row::rows;

rows! {
    /// Work and timing of a network for one part of a table, with prefix-cache savings.
    pub struct Telemetry: "telemetry" => {
        /// Name of the stage.
        pub stage: String,
        /// Round; null for a static table.
        pub round: Option<i32>,
        /// Part of the table, from 0.
        pub part: i32,
        /// Prompts processed, without rows reused from an earlier table version.
        pub prompts: i64,
        /// Distinct images in the prompts.
        pub pictures: i64,
        /// Images processed by the vision tower.
        pub tower_passes: i64,
        /// Prompt tokens, image tokens included.
        pub prompt_tokens: i64,
        /// Prompt tokens reused from the prefix cache of prompts about the same images.
        pub shared_tokens: i64,
        /// Response tokens: sampled, or processed for scoring.
        pub answer_tokens: i64,
        /// Decoding steps, each one token for every active answer; 0 in scoring.
        pub steps: i64,
        /// Share of decoding slots occupied over all steps; null in scoring.
        pub occupancy: Option<f64>,
        /// Retries after unparseable judge replies.
        pub retries: i64,
        /// Maximum number of answers decoded in parallel; 0 in scoring.
        [measured] pub rows_max: i64,
        /// Maximum number of prompt and answer tokens in memory.
        [measured] pub tokens_max: i64,
        /// OOM retries, each of which halves `rows_max` and `tokens_max`.
        [measured] pub halvings: i64,
        /// Image decoding and resizing time, in seconds; mostly in parallel to the network.
        [measured] pub seconds_pictures: f64,
        /// Time that the network waited for images, in seconds.
        [measured] pub seconds_waiting: f64,
        /// Vision tower time, in seconds.
        [measured] pub seconds_tower: f64,
        /// Prefill time, in seconds; in scoring a part of `seconds_decode`.
        [measured] pub seconds_prefill: f64,
        /// Sampling or scoring time of answers, in seconds.
        [measured] pub seconds_decode: f64,
        /// Total time, in seconds; the first part includes loading the model.
        [measured] pub seconds: f64,
        /// Peak host memory of the process so far, in bytes; no GPU memory.
        [measured] pub peak_memory: Option<i64>,
        /// Peak memory that libtorch held on the GPUs so far, in bytes; null on a CPU.
        [measured] pub peak_device_memory: Option<i64>,
    }
}
