//! Reference log-probabilities that were computed: where sampling did not leave them, and to audit
//! those that it left.

use super::row::rows;

rows! {
    /// What the reference model of a training stage thinks of a pair's two answers.
    pub struct Reference: "reference" => {
        /// What decides this row: the pair and the reference model.
        pub row_key: String,
        /// The `row_key` of the pair.
        pub pair: String,
        /// The prompt of the pair.
        pub prompt_id: String,
        /// Log-probability of the chosen answer, in natural log.
        pub chosen_logp: f64,
        /// Log-probability of the rejected answer.
        pub rejected_logp: f64,
        /// Fingerprint of the reference model.
        pub model: String,
        /// How far the log-probabilities that sampling left are off these, per token, in an audit;
        /// null where sampling left none.
        pub drift: Option<f64>,
    }
}
