//! Row type of overlaps: benchmark prompts that training prompts repeat.

use super::row::rows;

rows! {
    /// A benchmark prompt whose image or question occurs among the training prompts.
    pub struct Overlap: "overlap" => {
        /// Hash of the two prompts and the way in which they overlap.
        pub row_key: String,
        /// ID of the benchmark prompt.
        pub prompt_id: String,
        /// `id` of the benchmark prompt in the source, if any.
        pub id: Option<String>,
        /// ID of the first such training prompt.
        pub training_prompt_id: String,
        /// `id` of the training prompt in the source, if any.
        pub training_id: Option<String>,
        /// The likeness: `pixels` (equal pixels), `look` (perceptual hashes that differ in at most
        /// `distance_max` bits) or `question` (a run of words).
        pub kind: String,
        /// ID of the benchmark's image; null for `question`.
        pub image_id: Option<String>,
        /// ID of the training image; null for `question`.
        pub training_image_id: Option<String>,
        /// Number of differing bits of the perceptual hashes, for `pixels` and `look`.
        pub distance: Option<i32>,
        /// The first shared run of words, for `question`.
        pub words: Option<String>,
        /// Number of training prompts that overlap in this way.
        pub count: i64,
    }
}
