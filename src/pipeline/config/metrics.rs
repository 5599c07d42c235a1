//! The metrics of the table `health`: names, formulas, and the conditions that warn by default.

/// A metric of a round.
#[derive(Debug)]
pub struct Metric {
    pub name: &'static str,
    /// The name in figures and tables.
    pub title: &'static str,
    /// The formula, as a sentence.
    pub help: &'static str,
    /// The condition that warns by default.
    pub warns: Option<&'static str>,
    /// True if it has a confidence interval.
    pub has_interval: bool,
}

/// All metrics, in the order in which they are shown.
pub const METRICS: [Metric; 20] = [
    Metric {
        name: "length_correlation",
        title: "correlation of reward and length",
        help: "Pearson correlation of reward and length in tokens over all sampled answers; it is also high if questions with long answers have high rewards",
        warns: Some("length_correlation > 0.6"),
        has_interval: false,
    },
    Metric {
        name: "length_correlation_within",
        title: "correlation within prompts",
        help: "Pearson correlation of reward and length in tokens, both as differences from the mean of the prompt",
        warns: Some("length_correlation_within > 0.5"),
        has_interval: false,
    },
    Metric {
        name: "length_ratio",
        title: "length of chosen / rejected",
        help: "mean length of the chosen answers, divided by that of the rejected ones, in tokens",
        warns: Some("length_ratio > 1.5"),
        has_interval: false,
    },
    Metric {
        name: "length_growth",
        title: "length of answers / first round",
        help: "mean length of the sampled answers, divided by that in the first round",
        warns: Some("length_growth > 1.5"),
        has_interval: false,
    },
    Metric {
        name: "answer_tokens",
        title: "length of answers",
        help: "mean length of the sampled answers, in tokens",
        warns: None,
        has_interval: false,
    },
    Metric {
        name: "chosen_tokens",
        title: "length of chosen",
        help: "mean length of the chosen answers, in tokens",
        warns: None,
        has_interval: false,
    },
    Metric {
        name: "rejected_tokens",
        title: "length of rejected",
        help: "mean length of the rejected answers, in tokens",
        warns: None,
        has_interval: false,
    },
    Metric {
        name: "distinct_2",
        title: "distinct-2 of the k answers",
        help: "number of distinct token bigrams in the k answers to a prompt, divided by the number of all; mean over 500 prompts",
        warns: Some("distinct_2 < 0.1"),
        has_interval: false,
    },
    Metric {
        name: "repeated_4",
        title: "share of repeated 4-grams",
        help: "1 - distinct / all token 4-grams of an answer; mean over the answers of four tokens or more to 500 prompts",
        warns: Some("repeated_4 > 0.1"),
        has_interval: false,
    },
    Metric {
        name: "cut_off",
        title: "share cut off",
        help: "share of the sampled answers that reached `max_new_tokens`",
        warns: Some("cut_off > 0.05"),
        has_interval: false,
    },
    Metric {
        name: "reward",
        title: "reward",
        help: "mean reward of the sampled answers",
        warns: None,
        has_interval: false,
    },
    Metric {
        name: "right",
        title: "share of known answers",
        help: "share of the sampled answers that equal the known answer, ignoring case and outer spaces",
        warns: None,
        has_interval: false,
    },
    Metric {
        name: "judge_right",
        title: "judge agrees with known answers",
        help: "share of all pairs of a right and a wrong answer to one prompt in which the right one has the higher reward; ties count half",
        warns: Some("judge_right < 0.5"),
        has_interval: false,
    },
    Metric {
        name: "labelers_agree",
        title: "labelers agree",
        help: "share of equal verdicts of two annotators on the same two answers",
        warns: Some("labelers_agree < 0.5"),
        has_interval: false,
    },
    Metric {
        name: "log_ratio",
        title: "log-ratio to the start model",
        help: "mean of log p - log p_reference of the answers of the pairs, in the last tenth of the steps, summed over the rounds; in nats per answer",
        warns: Some("log_ratio < -20"),
        has_interval: false,
    },
    Metric {
        name: "heldout_unchanged",
        title: "held-out answers unchanged",
        help: "share of the held-out answers that equal those of the round before",
        warns: Some("heldout_unchanged > 0.99"),
        has_interval: false,
    },
    Metric {
        name: "heldout_right",
        title: "held-out share of known answers",
        help: "share of the held-out answers that equal the known answer, ignoring case and outer spaces",
        warns: None,
        has_interval: false,
    },
    Metric {
        name: "heldout_reward",
        title: "held-out reward",
        help: "mean reward of the held-out answers",
        warns: None,
        has_interval: false,
    },
    Metric {
        name: "heldout_gain",
        title: "held-out gain over round 0",
        help: "mean difference of the rewards of the held-out prompts from round 0, with a 95 % interval; prompts about the same image or video are one cluster",
        warns: Some("heldout_gain.high < 0"),
        has_interval: true,
    },
    Metric {
        name: "heldout_step",
        title: "held-out gain over the round before",
        help: "mean difference of the rewards of the held-out prompts from the round before, with a 95 % interval; prompts about the same image or video are one cluster",
        warns: Some("heldout_step.high < 0"),
        has_interval: true,
    },
];

/// Returns a metric by its name.
pub fn metric(name: &str) -> Option<&'static Metric> {
    METRICS.iter().find(|metric| metric.name == name)
}
