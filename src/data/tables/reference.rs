//! Row type of computed reference log-probabilities, for pairs that have none from sampling and to
//! audit those that do.

use super::row::rows;

rows! {
    /// Log-probabilities of a pair's two answers under the reference model of a training stage.
    pub struct Reference: "reference" => {
        /// Hash of the key inputs: the pair and the reference model.
        pub row_key: String,
        /// `row_key` of the pair.
        pub pair: String,
        /// ID of the pair's prompt.
        pub prompt_id: String,
        /// Natural-log probability of the chosen answer.
        pub chosen_logp: f64,
        /// Natural-log probability of the rejected answer.
        pub rejected_logp: f64,
        /// Fingerprint of the reference model.
        pub model: String,
        /// Difference per token from the log-probabilities recorded at sampling, in an audit; null
        /// if there are none.
        pub drift: Option<f64>,
    }
}
