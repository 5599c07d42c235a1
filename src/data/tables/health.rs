//! Row type of health: metrics of a round, and the conditions of the guard that are true.

use super::row::rows;

rows! {
    /// A metric of a round.
    pub struct Health: "health" => {
        /// Name of the metric; `query` for a query of `guard`, `kept_by` for the value of `rounds.by`.
        pub metric: String,
        /// Table that the metric describes; for a query of `guard`, the query.
        pub source: String,
        /// Value of the metric; 1 or 0 for a query of `guard`. Null: there are no rows to compute it
        /// from.
        pub value: Option<f64>,
        /// Number of rows, answers, pairs or prompts that the value is computed from.
        pub n: Option<i64>,
        /// Lower end of the 95 % confidence interval, if the metric has one.
        pub low: Option<f64>,
        /// Upper end of the 95 % confidence interval, if the metric has one.
        pub high: Option<f64>,
        /// Condition of the guard that is true, such as `length_correlation > 0.5`; null: none is.
        pub condition: Option<String>,
        /// Action of that condition: `warn` or `stop`; null: none is true.
        pub action: Option<String>,
    }
}
