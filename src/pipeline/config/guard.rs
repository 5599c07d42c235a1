//! The guard: conditions on the health of a round, each with an action.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::metrics::{METRICS, metric};
use super::suggest::{listed, suggest};

/// The action of a condition that is true after a round.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// None. Turns a default off: the condition `defaults` stands for all of them.
    Off,
    /// The run prints a warning and continues.
    Warn,
    /// The run stops; everything that is already built is kept.
    Stop,
}

impl Action {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Warn => "warn",
            Self::Stop => "stop",
        }
    }
}

/// A condition that is true or false after a round.
#[derive(Debug, Clone, PartialEq)]
pub enum Condition {
    /// All default conditions.
    Defaults,
    Bound(Bound),
    /// A query that returns one boolean.
    Query(String),
}

/// A comparison of a metric with a number: `length_correlation > 0.5`.
#[derive(Debug, Clone, PartialEq)]
pub struct Bound {
    pub metric: &'static str,
    pub end: End,
    pub comparison: Comparison,
    pub number: f64,
}

/// The value of a metric, or an end of its confidence interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Value,
    Low,
    High,
}

/// An operator that compares two numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    Less,
    AtMost,
    More,
    AtLeast,
}

/// A condition that cannot be read.
#[derive(Debug, PartialEq)]
pub struct Unreadable {
    pub message: String,
    /// A similar metric.
    pub suggest: Option<&'static str>,
    pub help: String,
}

/// A condition with its action.
#[derive(Debug, Clone, PartialEq)]
pub struct Guard {
    /// The condition as written.
    pub text: String,
    pub condition: Condition,
    pub action: Action,
    /// False for a default.
    pub is_written: bool,
}

impl Condition {
    /// Reads a condition.
    pub fn read(text: &str) -> Result<Self, Unreadable> {
        let first = text.split_whitespace().next().unwrap_or_default();
        if first == "defaults" && text.trim() == first {
            return Ok(Self::Defaults);
        }
        let is_query = ["select", "with", "values"]
            .iter()
            .any(|word| first.eq_ignore_ascii_case(word));
        if is_query || first.starts_with('(') {
            return Ok(Self::Query(text.to_owned()));
        }
        Bound::read(text).map(Self::Bound)
    }
}

impl Bound {
    fn read(text: &str) -> Result<Self, Unreadable> {
        const EXAMPLE: &str = "write a bound such as `length_correlation > 0.5`, or a query that returns one boolean, \
                               such as `select avg(reward) < 0 from rewards where round = $round`";
        let unreadable = || Unreadable {
            message: format!("`{text}` is neither a bound nor a query"),
            suggest: None,
            help: EXAMPLE.to_owned(),
        };
        let at = text.find(['<', '>']).ok_or_else(unreadable)?;
        let (name, rest) = (text[..at].trim(), &text[at..]);
        let (comparison, number) = [
            ("<=", Comparison::AtMost),
            (">=", Comparison::AtLeast),
            ("<", Comparison::Less),
            (">", Comparison::More),
        ]
        .into_iter()
        .find_map(|(sign, comparison)| Some((comparison, rest.strip_prefix(sign)?)))
        .ok_or_else(unreadable)?;
        let number: f64 = number.trim().parse().map_err(|_| unreadable())?;
        if !number.is_finite() {
            return Err(unreadable());
        }
        let (name, end) = match name.split_once('.') {
            None => (name, End::Value),
            Some((name, "low")) => (name, End::Low),
            Some((name, "high")) => (name, End::High),
            Some((_, end)) => {
                return Err(Unreadable {
                    message: format!("an interval has no end `{end}`"),
                    suggest: None,
                    help: "the ends are `.low` and `.high`".to_owned(),
                });
            }
        };
        let names = METRICS.iter().map(|metric| metric.name);
        let known = metric(name).ok_or_else(|| Unreadable {
            message: format!("there is no metric `{name}`"),
            suggest: suggest(name, names.clone()),
            help: format!("available metrics: {}", listed(names)),
        })?;
        if end != End::Value && !known.has_interval {
            let with = METRICS.iter().filter(|metric| metric.has_interval);
            return Err(Unreadable {
                message: format!("the metric `{name}` has no interval"),
                suggest: None,
                help: format!(
                    "metrics with one: {}",
                    listed(with.map(|metric| metric.name))
                ),
            });
        }
        Ok(Self {
            metric: known.name,
            end,
            comparison,
            number,
        })
    }

    /// True if a value of the metric, with its interval, meets the condition. A null never does.
    pub fn is_met(&self, value: Option<f64>, low: Option<f64>, high: Option<f64>) -> bool {
        let value = match self.end {
            End::Value => value,
            End::Low => low,
            End::High => high,
        };
        value.is_some_and(|value| match self.comparison {
            Comparison::Less => value < self.number,
            Comparison::AtMost => value <= self.number,
            Comparison::More => value > self.number,
            Comparison::AtLeast => value >= self.number,
        })
    }

    /// True if both compare the same metric in the same direction.
    fn replaces(&self, other: &Self) -> bool {
        let is_upper =
            |bound: &Self| matches!(bound.comparison, Comparison::More | Comparison::AtLeast);
        self.metric == other.metric && is_upper(self) == is_upper(other)
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = match self.end {
            End::Value => "",
            End::Low => ".low",
            End::High => ".high",
        };
        let sign = match self.comparison {
            Comparison::Less => "<",
            Comparison::AtMost => "<=",
            Comparison::More => ">",
            Comparison::AtLeast => ">=",
        };
        write!(f, "{}{end} {sign} {}", self.metric, self.number)
    }
}

/// Adds the default conditions to those of a pipeline, which replace the defaults on the same metric in
/// the same direction. `defaults: off` removes all.
pub fn with_defaults(written: Vec<Guard>) -> Vec<Guard> {
    let of_all = written
        .iter()
        .find(|guard| guard.condition == Condition::Defaults);
    let action = of_all.map_or(Action::Warn, |guard| guard.action);
    let defaults = METRICS.iter().filter_map(|metric| metric.warns);
    let defaults = defaults.map(|text| Bound::read(text).expect("a default is readable"));
    let is_replaced = |bound: &Bound| {
        written.iter().any(|guard| match &guard.condition {
            Condition::Bound(own) => own.replaces(bound),
            _ => false,
        })
    };
    let defaults = defaults.filter(|bound| !is_replaced(bound));
    let mut guards: Vec<Guard> = defaults
        .map(|bound| Guard {
            text: bound.to_string(),
            condition: Condition::Bound(bound),
            action,
            is_written: false,
        })
        .collect();
    guards.extend(written.iter().cloned());
    guards.retain(|guard| guard.action != Action::Off && guard.condition != Condition::Defaults);
    guards
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(text: &str, action: Action) -> Guard {
        Guard {
            text: text.to_owned(),
            condition: Condition::read(text).unwrap(),
            action,
            is_written: true,
        }
    }

    #[test]
    fn a_bound_is_read_and_compared() {
        let Ok(Condition::Bound(bound)) = Condition::read(" heldout_step.high<= -0.5 ") else {
            panic!("it is a bound");
        };
        assert_eq!(bound.to_string(), "heldout_step.high <= -0.5");
        assert!(bound.is_met(Some(1.0), Some(-2.0), Some(-0.5)));
        assert!(!bound.is_met(Some(-1.0), Some(-2.0), Some(0.0)));
        assert!(!bound.is_met(Some(-1.0), None, None), "no interval");
        let query = "SELECT true";
        assert_eq!(
            Condition::read(query),
            Ok(Condition::Query(query.to_owned()))
        );
    }

    #[test]
    fn an_unreadable_condition_says_what_would_be_one() {
        let message = |text| Condition::read(text).unwrap_err().message;
        for text in ["cut_off", "cut_off > much", "cut_off > inf", ""] {
            assert_eq!(
                message(text),
                format!("`{text}` is neither a bound nor a query")
            );
        }
        assert_eq!(
            message("heldout_step.hi < 0"),
            "an interval has no end `hi`"
        );
        assert_eq!(
            message("reward.low < 0"),
            "the metric `reward` has no interval"
        );
        let misspelt = Condition::read("lenght_ratio > 2").unwrap_err();
        assert_eq!(misspelt.suggest, Some("length_ratio"));
    }

    #[test]
    fn conditions_replace_the_defaults_that_they_are_about() {
        let all = with_defaults(Vec::new());
        assert_eq!(
            all.len(),
            METRICS
                .iter()
                .filter(|metric| metric.warns.is_some())
                .count()
        );
        assert!(all.iter().all(|guard| guard.action == Action::Warn));
        let own = guard("length_ratio > 3", Action::Stop);
        let off = guard("cut_off > 0", Action::Off);
        let lower = guard("length_growth < 0.5", Action::Warn);
        let guards = with_defaults(vec![own, off, lower]);
        let texts: Vec<&str> = guards.iter().map(|guard| guard.text.as_str()).collect();
        assert!(texts.contains(&"length_ratio > 3") && !texts.contains(&"length_ratio > 1.5"));
        assert!(
            !texts.iter().any(|text| text.starts_with("cut_off")),
            "{texts:?}"
        );
        assert!(texts.contains(&"length_growth > 1.5") && texts.contains(&"length_growth < 0.5"));
        assert!(with_defaults(vec![guard("defaults", Action::Off)]).is_empty());
    }
}
