//! The scores of a model on a benchmark, by the rules of lmms-eval or by strict ones.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The making of a benchmark's score from the verdicts on its items.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScoreRule {
    /// The mean reward, times `factor`.
    Mean,
    /// The percentage of wins, where a tie is half a win: a reward above 0 wins, 0 is a tie.
    Wins,
    /// The mean score of the answer as a percentage of that of the answer it is compared with.
    Ratio,
}

/// The treatment of items without a readable verdict, and the rounding.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Rules {
    /// As in lmms-eval: what the judge's `unreadable` says counts, and scores are rounded.
    #[default]
    LmmsEval,
    /// Such items are left out, and nothing is rounded.
    Strict,
}

impl Rules {
    pub fn name(self) -> &'static str {
        match self {
            Self::LmmsEval => "lmms_eval",
            Self::Strict => "strict",
        }
    }
}

/// The verdict on one item.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    pub value: f64,
    /// The scores of the other answer and of this one.
    pub scores: Option<[f64; 2]>,
    pub label: Option<String>,
    /// True if the verdict is a substitute.
    pub is_failure: bool,
}

impl Item {
    /// True if the item has a verdict that the judge gave.
    pub fn is_readable(&self) -> bool {
        !self.is_failure && self.value.is_finite()
    }

    /// The share of a win: 1, a half for a tie, or 0.
    fn win(&self) -> f64 {
        match self.value {
            value if value > 0.0 => 1.0,
            value if value < 0.0 => 0.0,
            _ => 0.5,
        }
    }
}

/// Returns the number that a reward was read from. Rewards are in single precision; the shortest
/// decimal that denotes one is the number in the judge's reply.
pub fn as_written(reward: f32) -> f64 {
    reward.to_string().parse().unwrap_or(f64::NAN)
}

/// Rounds half to even on the exact value, as Python's `round` does.
fn rounded(value: f64, digits: usize) -> f64 {
    format!("{value:.digits$}").parse().unwrap_or(value)
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    values.sum::<f64>() / count
}

/// A benchmark's scoring.
#[derive(Debug, Clone, Copy)]
pub struct Scoring {
    pub rule: ScoreRule,
    pub factor: f64,
    pub rules: Rules,
}

/// The name of the benchmark's own figure among the metrics.
pub const SCORE: &str = "score";

impl Scoring {
    /// Returns the items that count.
    pub fn counted<'i>(&self, items: impl Iterator<Item = &'i Item>) -> Vec<&'i Item> {
        // A substitute without scores cannot be part of a ratio.
        let fits = |item: &&Item| self.rule != ScoreRule::Ratio || item.scores.is_some();
        let counts = |item: &&Item| match self.rules {
            Rules::LmmsEval => item.value.is_finite(),
            Rules::Strict => item.is_readable(),
        };
        items.filter(counts).filter(fits).collect()
    }

    /// Returns the metrics of some items, the benchmark's own figure first; none of an empty list.
    pub fn metrics(&self, items: &[&Item]) -> Vec<(String, Option<f64>)> {
        let own = |score: Option<f64>| (SCORE.to_owned(), score.filter(|score| score.is_finite()));
        if items.is_empty() {
            return vec![own(None)];
        }
        match self.rule {
            ScoreRule::Mean => vec![own(Some(
                self.factor * mean(items.iter().map(|item| item.value)),
            ))],
            ScoreRule::Wins => {
                let percent = |share: f64| 100.0 * share / items.len() as f64;
                let score = percent(items.iter().map(|item| item.win()).sum());
                let wins = items.iter().filter(|item| item.value > 0.0).count();
                let mut metrics = vec![
                    own(Some(self.rounded(score, 2))),
                    ("win_rate".to_owned(), Some(percent(wins as f64))),
                    (
                        "mean".to_owned(),
                        Some(mean(items.iter().map(|item| item.value))),
                    ),
                ];
                let mut labels: BTreeMap<&str, f64> = BTreeMap::new();
                for label in items.iter().filter_map(|item| item.label.as_deref()) {
                    *labels.entry(label).or_default() += 1.0;
                }
                let labels = labels.iter();
                metrics.extend(
                    labels.map(|(label, count)| (format!("label {label}"), Some(percent(*count)))),
                );
                metrics
            }
            ScoreRule::Ratio => {
                let Some([first, second]) = means(items) else {
                    return vec![own(None)];
                };
                let [first, second] = [first, second].map(|mean| self.rounded(mean, 3));
                vec![
                    own(Some(self.rounded(second / first * 100.0, 1))),
                    ("mean_first".to_owned(), Some(first)),
                    ("mean_second".to_owned(), Some(second)),
                ]
            }
        }
    }

    fn rounded(&self, value: f64, digits: usize) -> f64 {
        match self.rules {
            Rules::LmmsEval => rounded(value, digits),
            Rules::Strict => value,
        }
    }

    /// Returns the gain of `items` over `base`, item by item: the gain itself, and the values whose
    /// mean has its uncertainty. `None` if a score is missing.
    ///
    /// For a ratio R = mean(s2) / mean(s1), the value of an item is its share of the first-order error
    /// (s2 − R · s1) / mean(s1) in the one model minus that in the other.
    pub fn gain(&self, items: &[&Item], base: &[&Item]) -> Option<(f64, Vec<f64>)> {
        if items.is_empty() {
            return None;
        }
        let both = items.iter().zip(base);
        let values: Vec<f64> = match self.rule {
            ScoreRule::Mean => both
                .map(|(one, other)| self.factor * (one.value - other.value))
                .collect(),
            ScoreRule::Wins => both
                .map(|(one, other)| 100.0 * (one.win() - other.win()))
                .collect(),
            ScoreRule::Ratio => {
                let [one, one_values] = linearized(items)?;
                let [other, other_values] = linearized(base)?;
                let values = one_values.iter().zip(&other_values);
                let values = values.map(|(one, other)| one - other).collect();
                return Some((one[0] - other[0], values));
            }
        };
        Some((mean(values.iter().copied()), values))
    }
}

/// Returns the mean scores of the other answers and of these; `None` if one is missing.
fn means(items: &[&Item]) -> Option<[f64; 2]> {
    let scores: Option<Vec<[f64; 2]>> = items.iter().map(|item| item.scores).collect();
    let scores = scores?;
    Some([0, 1].map(|answer| mean(scores.iter().map(|scores| scores[answer]))))
}

/// Returns the ratio of some items in percent, alone in a list, and the first-order error of each.
fn linearized(items: &[&Item]) -> Option<[Vec<f64>; 2]> {
    let [first, second] = means(items)?;
    let ratio = second / first;
    let error = |item: &&Item| {
        let [one, other] = item.scores.unwrap_or_default();
        100.0 * (other - ratio * one) / first
    };
    let is_ratio = ratio.is_finite();
    is_ratio.then(|| [vec![100.0 * ratio], items.iter().map(error).collect()])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(value: f64) -> Item {
        Item {
            value,
            scores: None,
            label: None,
            is_failure: false,
        }
    }

    fn scored(first: f64, second: f64) -> Item {
        Item {
            scores: Some([first, second]),
            ..item(second - first)
        }
    }

    fn scoring(rule: ScoreRule, rules: Rules) -> Scoring {
        Scoring {
            rule,
            factor: 10.0,
            rules,
        }
    }

    fn score(scoring: Scoring, items: &[Item]) -> f64 {
        let counted = scoring.counted(items.iter());
        scoring.metrics(&counted)[0].1.unwrap()
    }

    #[test]
    fn failures_count_as_in_lmms_eval_or_are_left_out() {
        let failed = Item {
            is_failure: true,
            ..scored(-1.0, -1.0)
        };
        let items = [scored(8.0, 6.0), scored(10.0, 9.0), failed];
        let lmms = scoring(ScoreRule::Ratio, Rules::LmmsEval);
        // (6 + 9 - 1) / (8 + 10 - 1)
        assert_eq!(score(lmms, &items), 82.4);
        let strict = scoring(ScoreRule::Ratio, Rules::Strict);
        assert!((score(strict, &items) - 100.0 * 15.0 / 18.0).abs() < 1e-12);
        let wins = [item(2.0), item(0.0), item(-1.0), item(f64::NAN)];
        assert_eq!(
            score(scoring(ScoreRule::Wins, Rules::LmmsEval), &wins),
            50.0
        );
        let ratings = [item(8.0), item(5.0)];
        assert_eq!(
            score(scoring(ScoreRule::Mean, Rules::Strict), &ratings),
            65.0
        );
        let none = scoring(ScoreRule::Mean, Rules::Strict);
        assert_eq!(none.metrics(&[]), [(SCORE.to_owned(), None)]);
    }

    #[test]
    fn numbers_round_as_in_python() {
        for (value, digits, expected) in [
            (0.5, 0, 0.0),
            (1.5, 0, 2.0),
            (2.675, 2, 2.67),
            (8.6125, 3, 8.613),
            (0.0625, 3, 0.062),
        ] {
            assert_eq!(rounded(value, digits), expected, "{value}");
        }
        assert_eq!(as_written(8.3_f32), 8.3);
    }

    #[test]
    fn the_gain_of_a_ratio_has_errors_that_sum_to_zero() {
        let chat = [scored(8.0, 9.0), scored(10.0, 8.0), scored(6.0, 7.0)];
        let base = [scored(8.0, 6.0), scored(9.0, 8.0), scored(7.0, 7.0)];
        let of = |items: &'static [Item]| items.iter().collect::<Vec<_>>();
        let (chat, base) = (of(Box::leak(Box::new(chat))), of(Box::leak(Box::new(base))));
        let strict = scoring(ScoreRule::Ratio, Rules::Strict);
        let (gain, values) = strict.gain(&chat, &base).unwrap();
        assert!((gain - (100.0 - 100.0 * 21.0 / 24.0)).abs() < 1e-12);
        assert!(values.iter().sum::<f64>().abs() < 1e-9);
        let wins = scoring(ScoreRule::Wins, Rules::Strict);
        let (gain, values) = wins.gain(&chat, &base).unwrap();
        assert_eq!(values, [100.0, 0.0, 50.0]);
        assert_eq!(gain, 50.0);
    }
}
