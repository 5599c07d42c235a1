//! Row type of benchmark results: a score of one model, and its gain over another.

use super::row::rows;

rows! {
    /// A score of a model on a benchmark.
    pub struct Measured: "result" => {
        /// Hash of everything that identifies the row: benchmark, family, model, metric and category.
        pub row_key: String,
        /// Name of the benchmark.
        pub benchmark: String,
        /// Name of the family of models, such as `7b`; null: none.
        pub family: Option<String>,
        /// Name of the model within its family, such as `base` or `chat`.
        pub model: String,
        /// Metric: `score` for the benchmark's own figure, or the name of another one.
        pub metric: String,
        /// Value of the kept column that `by` names; null: all items.
        pub category: Option<String>,
        /// Score; null: no item has one.
        pub score: Option<f64>,
        /// Number of items that the score is a mean of; null in published results without it.
        pub n: Option<i64>,
        /// Number of items of the benchmark; null in published results.
        pub items: Option<i64>,
        /// Number of items without a verdict: rejected, refused or unreadable.
        pub failures: Option<i64>,
        /// Judge that scored the answers.
        pub judge: Option<String>,
        /// Rules for failures: `lmms_eval` or `strict`; null in published results.
        pub rules: Option<String>,
        /// Model that `delta` compares with; null: none.
        pub base: Option<String>,
        /// Mean gain over `base` on the items that both models have a verdict on; in published
        /// results, the difference of the scores.
        pub delta: Option<f64>,
        /// Standard error of `delta`, with items about the same image as one cluster.
        pub delta_se: Option<f64>,
        /// Lower end of the 95 % confidence interval of `delta`; null below 10 clusters.
        pub delta_low: Option<f64>,
        /// Upper end of the 95 % confidence interval of `delta`; null below 10 clusters.
        pub delta_high: Option<f64>,
        /// Number of items that `delta` is a mean of.
        pub pairs: Option<i64>,
        /// Number of clusters among these items.
        pub clusters: Option<i64>,
        /// True for a result that others published.
        pub is_published: bool,
    }
}
