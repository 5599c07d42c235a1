//! Verdicts: the settings that say where a reply has its verdict, and the reading of replies.

use std::fmt;

use regex::Regex;
use schemars::JsonSchema;
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{self, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::literal::{self, Literal, Syntax};

/// Maximum magnitude of a score. Rewards are sums of scores in single precision.
const SCORE_MAX: f64 = 1e30;

/// The number of answers that a judge sees at a time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    #[default]
    Pairwise,
    Pointwise,
    Against,
}

/// The place of the verdict in a reply.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// A regular expression with named groups.
    Groups(String),
    /// Rules that are tried in order.
    Rules(Vec<VerdictRule>),
}

/// A rule that finds a verdict: a `pattern` with a `value`, a `pattern` with the groups or matches
/// of scores, or the key of an `object`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct VerdictRule {
    /// Regular expression. Without `value` and `matches`, its named groups are those of a `verdict`
    /// that is a single expression.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pattern: Option<RegexText>,
    /// Verdict of a reply that the pattern matches: the score of the answer (pointwise), or by how
    /// much the second answer is better (otherwise).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<f64>,
    /// Scores that are the first matches of the pattern, in order: `[score]`, or `[first, second]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub matches: Option<Vec<ScoreName>>,
    /// Key of the score, for a reply that is a JSON object or a Python dict. The score is a number,
    /// or a string that holds one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// Least and greatest score that is read; a reply with another one has no verdict. Default: any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub range: Option<[f64; 2]>,
    /// Syntax of the object: `any`, `json` as `json.loads` of Python reads it, or `python` as
    /// `ast.literal_eval` does. Default: `any`, which also reads what is almost either.
    #[serde(skip_serializing_if = "is_any")]
    pub syntax: Syntax,
    /// Other keys that the object must have.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub requires: Vec<String>,
    /// Cuts the score of an object to an integer, as Python's `int()` does: 4.8 becomes 4, and a
    /// string must hold an integer.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub integer: bool,
    /// Name of the verdict, for the column `label` of the rewards.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
}

fn is_any(syntax: &Syntax) -> bool {
    *syntax == Syntax::Any
}

/// A score that a rule finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScoreName {
    /// The score of the only answer.
    Score,
    /// The score of the answer that is shown first.
    First,
    /// The score of the answer that is shown second.
    Second,
}

/// A regular expression, as written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RegexText(String);

impl RegexText {
    pub fn compiled(&self) -> Regex {
        Regex::new(&self.0).expect("the expression was checked when it was read")
    }
}

impl TryFrom<String> for RegexText {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match Regex::new(&text) {
            Ok(_) => Ok(Self(text)),
            Err(error) => Err(format!("invalid regular expression: {error}")),
        }
    }
}

impl From<RegexText> for String {
    fn from(text: RegexText) -> Self {
        text.0
    }
}

impl JsonSchema for RegexText {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Regex".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string", "format": "regex"})
    }
}

/// A verdict that counts for a reply without a readable one, or for an empty answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Substitute {
    /// The verdict: the score of the answer (pointwise), or by how much the second answer is
    /// better (otherwise).
    #[serde(deserialize_with = "score")]
    pub value: f64,
    /// Score of the first answer. Default: none.
    #[serde(
        default,
        deserialize_with = "some_score",
        skip_serializing_if = "Option::is_none"
    )]
    pub first: Option<f64>,
    /// Score of the second answer. Default: none.
    #[serde(
        default,
        deserialize_with = "some_score",
        skip_serializing_if = "Option::is_none"
    )]
    pub second: Option<f64>,
    /// Name of the verdict, for the column `label` of the rewards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
}

fn score<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let score = f64::deserialize(deserializer)?;
    if score.abs() <= SCORE_MAX {
        return Ok(score);
    }
    Err(de::Error::custom(format!(
        "expected a number of at most {SCORE_MAX:e} in magnitude"
    )))
}

fn some_score<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    score(deserializer).map(Some)
}

/// The verdict that counts for a reply without a readable one.
#[derive(Debug, Clone, PartialEq)]
pub enum Unreadable {
    /// A reward that is no number.
    LeftOut,
    Counts(Substitute),
}

/// The name of [`Unreadable::LeftOut`] in a pipeline file.
const LEFT_OUT: &str = "left_out";

impl Serialize for Unreadable {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::LeftOut => LEFT_OUT.serialize(serializer),
            Self::Counts(substitute) => substitute.serialize(serializer),
        }
    }
}

/// Implemented by hand, because an untagged enum would only report that no variant matches.
impl<'de> Deserialize<'de> for Unreadable {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct UnreadableVisitor;

        impl<'de> Visitor<'de> for UnreadableVisitor {
            type Value = Unreadable;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`left_out` or a map with `value`")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Unreadable, E> {
                match text {
                    LEFT_OUT => Ok(Unreadable::LeftOut),
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Unreadable, A::Error> {
                let substitute = Substitute::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Unreadable::Counts(substitute))
            }
        }

        deserializer.deserialize_any(UnreadableVisitor)
    }
}

impl JsonSchema for Unreadable {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Unreadable".into()
    }
    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let substitute = generator.subschema_for::<Substitute>();
        schemars::json_schema!({"anyOf": [{"const": LEFT_OUT}, substitute]})
    }
}

/// The verdict on one answer, or on two.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// The score of the answer, or by how much the second answer is better.
    pub value: f64,
    /// The scores of the first and the second answer, if the verdict has them.
    pub scores: Option<[f64; 2]>,
    pub label: Option<String>,
}

impl Reading {
    fn of_two([first, second]: [f64; 2]) -> Self {
        Self {
            value: second - first,
            scores: Some([first, second]),
            label: None,
        }
    }

    fn of_one(value: f64) -> Self {
        Self {
            value,
            scores: None,
            label: None,
        }
    }

    fn is_valid(&self) -> bool {
        let scores = self.scores.iter().flatten();
        scores
            .chain([&self.value])
            .all(|score| score.abs() <= SCORE_MAX)
    }
}

impl From<&Unreadable> for Reading {
    fn from(unreadable: &Unreadable) -> Self {
        match unreadable {
            Unreadable::LeftOut => Self::of_one(f64::NAN),
            Unreadable::Counts(substitute) => substitute.into(),
        }
    }
}

impl From<&Substitute> for Reading {
    fn from(substitute: &Substitute) -> Self {
        let scores = substitute.first.zip(substitute.second);
        Self {
            value: substitute.value,
            scores: scores.map(|(first, second)| [first, second]),
            label: substitute.label.clone(),
        }
    }
}

/// The named groups of each kind of verdict.
const GROUPS: [&[&str]; 3] = [
    &["score"],
    &["first", "second"],
    &["better_first", "better_second", "tie"],
];

/// Returns the problem of a regular expression whose named groups are not those of a verdict.
fn groups_problem(regex: &Regex) -> Option<String> {
    let named: Vec<&str> = regex.capture_names().flatten().collect();
    let kind = GROUPS
        .iter()
        .find(|group| !named.is_empty() && named.iter().all(|name| group.contains(name)));
    let is_whole = kind.is_some_and(|kind| kind.len() != 2 || named.len() == 2);
    (!is_whole).then(|| {
        "expected the named groups `(?<score>…)`; `(?<first>…)` and `(?<second>…)`; or \
         `(?<better_first>…)`, `(?<better_second>…)` and `(?<tie>…)`"
            .to_owned()
    })
}

impl VerdictRule {
    /// Returns the problem of a rule whose fields do not fit each other.
    fn problem(&self) -> Option<String> {
        if self.range.is_some_and(|[low, high]| !(low <= high)) {
            return Some("the first number of `range` must not be above the second".to_owned());
        }
        let given = [
            self.value.is_some(),
            self.matches.is_some(),
            self.object.is_some(),
        ];
        let problem = match (&self.pattern, given) {
            (None, [false, false, true]) => return None,
            (Some(_), [true, false, false]) => match self.value {
                Some(value) if value.abs() <= SCORE_MAX => return None,
                _ => "`value` is too large",
            },
            (Some(_), [false, true, false]) => match self.matches.as_deref() {
                Some([ScoreName::Score] | [ScoreName::First, ScoreName::Second]) => return None,
                _ => "`matches` must be `[score]` or `[first, second]`",
            },
            (Some(pattern), [false, false, false]) => return groups_problem(&pattern.compiled()),
            (None, [false, false, false]) => "expected `pattern` or `object`",
            (None, _) => "`value` and `matches` need a `pattern`",
            (Some(_), _) => "expected one of `value`, `matches` and `object`",
        };
        Some(problem.to_owned())
    }
}

impl TryFrom<String> for Verdict {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let text = RegexText::try_from(text)?;
        match groups_problem(&text.compiled()) {
            Some(problem) => Err(problem),
            None => Ok(Self::Groups(text.0)),
        }
    }
}

impl Serialize for Verdict {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Groups(text) => text.serialize(serializer),
            Self::Rules(rules) => rules.serialize(serializer),
        }
    }
}

/// Implemented by hand, because an untagged enum would only report that no variant matches.
impl<'de> Deserialize<'de> for Verdict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct VerdictVisitor;

        impl<'de> Visitor<'de> for VerdictVisitor {
            type Value = Verdict;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a regular expression or a list of rules")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Verdict, E> {
                Verdict::try_from(text.to_owned()).map_err(E::custom)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Verdict, A::Error> {
                let rules = Vec::<VerdictRule>::deserialize(SeqAccessDeserializer::new(list))?;
                if rules.is_empty() {
                    return Err(de::Error::custom("expected at least one rule"));
                }
                for (number, rule) in rules.iter().enumerate() {
                    if let Some(problem) = rule.problem() {
                        return Err(de::Error::custom(format!("rule {}: {problem}", number + 1)));
                    }
                }
                Ok(Verdict::Rules(rules))
            }
        }

        deserializer.deserialize_any(VerdictVisitor)
    }
}

impl JsonSchema for Verdict {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Verdict".into()
    }
    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let rules = generator.subschema_for::<Vec<VerdictRule>>();
        schemars::json_schema!({"anyOf": [{"type": "string", "format": "regex"}, rules]})
    }
}

/// A reader of verdicts.
#[derive(Debug)]
pub struct VerdictReader {
    mode: Mode,
    within: Option<Regex>,
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    find: Find,
    range: Option<[f64; 2]>,
    label: Option<String>,
}

#[derive(Debug)]
enum Find {
    /// Named groups; all matches must agree.
    Groups(Regex),
    Value(Regex, f64),
    Matches(Regex, usize),
    Object {
        key: String,
        requires: Vec<String>,
        is_integer: bool,
        syntax: Syntax,
    },
}

impl VerdictReader {
    /// Returns the reader of a verdict, within the text that `within` finds. Fails, with a message, if
    /// the verdict is not one of this mode.
    pub fn new(mode: Mode, verdict: &Verdict, within: Option<&RegexText>) -> Result<Self, String> {
        let groups = |text: &str| {
            Regex::new(text)
                .map(Find::Groups)
                .map_err(|error| format!("`verdict`: {error}"))
        };
        let find = |rule: &VerdictRule| match (&rule.pattern, &rule.object) {
            (Some(pattern), _) => Ok(match (rule.value, &rule.matches) {
                (Some(value), _) => Find::Value(pattern.compiled(), value),
                (_, Some(names)) => Find::Matches(pattern.compiled(), names.len()),
                _ => groups(&pattern.0)?,
            }),
            (None, Some(key)) => Ok(Find::Object {
                key: key.clone(),
                requires: rule.requires.clone(),
                is_integer: rule.integer,
                syntax: rule.syntax,
            }),
            (None, None) => Err("`verdict`: expected `pattern` or `object`".to_owned()),
        };
        let rules: Vec<Rule> = match verdict {
            Verdict::Groups(text) => vec![Rule {
                find: groups(text)?,
                range: None,
                label: None,
            }],
            Verdict::Rules(rules) => {
                let rule = |rule: &VerdictRule| {
                    Ok::<_, String>(Rule {
                        find: find(rule)?,
                        range: rule.range,
                        label: rule.label.clone(),
                    })
                };
                rules.iter().map(rule).collect::<Result<_, _>>()?
            }
        };
        for rule in &rules {
            rule.find.check(mode)?;
        }
        Ok(Self {
            mode,
            within: within.map(RegexText::compiled),
            rules,
        })
    }

    /// Reads the verdict in a reply. `None` if there is none, or if several matches of one expression
    /// differ.
    pub fn read(&self, reply: &str) -> Option<Reading> {
        let text = self.within.as_ref().and_then(|within| only(within, reply));
        let text = text.unwrap_or(reply);
        self.rules.iter().find_map(|rule| {
            let mut found = rule.find.read(self.mode, text)?;
            if let Some([low, high]) = rule.range {
                let one = [found.value];
                let scores = found.scores.as_ref().map_or(&one[..], |scores| &scores[..]);
                if !scores.iter().all(|score| (low..=high).contains(score)) {
                    return None;
                }
            }
            if rule.label.is_some() {
                found.label.clone_from(&rule.label);
            }
            Some(found)
        })
    }
}

/// Returns the text that the first group of an expression, or the expression, finds, if all matches
/// find the same.
fn only<'t>(within: &Regex, text: &'t str) -> Option<&'t str> {
    let mut found: Option<&str> = None;
    for captures in within.captures_iter(text) {
        let whole = captures.get(0).expect("the match");
        let part = captures.get(1).unwrap_or(whole).as_str();
        if found.is_some_and(|found| found != part) {
            return None;
        }
        found = Some(part);
    }
    found
}

impl Find {
    /// Fails if the verdict is not one of this mode.
    fn check(&self, mode: Mode) -> Result<(), String> {
        let is_of_one = match self {
            Self::Groups(regex) => regex.capture_names().flatten().any(|name| name == "score"),
            Self::Matches(_, count) => *count == 1,
            Self::Object { .. } => true,
            // Fits any mode.
            Self::Value(..) => return Ok(()),
        };
        if is_of_one == (mode == Mode::Pointwise) {
            return Ok(());
        }
        let wanted = match mode {
            Mode::Pointwise => "`score`",
            Mode::Pairwise | Mode::Against => {
                "`first` and `second`, or `better_first`, `better_second` and `tie`"
            }
        };
        Err(match self {
            Self::Object { .. } => {
                "`verdict` reads one score from an `object`; use it with `mode: pointwise`"
                    .to_owned()
            }
            Self::Matches(..) => format!("`verdict` must have the `matches` {wanted} in this mode"),
            _ => format!("`verdict` must have the named group or groups {wanted} in this mode"),
        })
    }

    fn read(&self, mode: Mode, text: &str) -> Option<Reading> {
        let reading = match self {
            Self::Groups(regex) => grouped(regex, mode, text)?,
            Self::Value(regex, value) => regex.is_match(text).then(|| Reading::of_one(*value))?,
            Self::Matches(regex, count) => {
                let numbers = regex.find_iter(text).take(*count);
                let numbers = numbers.map(|found| found.as_str().parse::<f64>().ok());
                let numbers: Option<Vec<f64>> = numbers.collect();
                match numbers?[..] {
                    [score] if *count == 1 => Reading::of_one(score),
                    [first, second] => Reading::of_two([first, second]),
                    _ => return None,
                }
            }
            Self::Object {
                key,
                requires,
                is_integer,
                syntax,
            } => {
                let object = literal::object(text, *syntax)?;
                if !requires.iter().all(|key| object.contains_key(key)) {
                    return None;
                }
                Reading::of_one(number(object.get(key)?, *is_integer)?)
            }
        };
        reading.is_valid().then_some(reading)
    }
}

/// Returns the number that a value of an object is or holds.
fn number(value: &Literal, is_integer: bool) -> Option<f64> {
    Some(match (value, is_integer) {
        (Literal::Number(number), false) => *number,
        (Literal::Number(number), true) => number.trunc(),
        (Literal::Text(text), false) => text.trim().parse().ok()?,
        (Literal::Text(text), true) => text.trim().parse::<i64>().ok()? as f64,
        (Literal::Bool(flag), true) => f64::from(u8::from(*flag)),
        _ => return None,
    })
}

/// Reads the verdict that the named groups of an expression have; `None` if several matches differ.
fn grouped(regex: &Regex, mode: Mode, text: &str) -> Option<Reading> {
    let mut found: Option<Reading> = None;
    for captures in regex.captures_iter(text) {
        let number = |name: &str| captures.name(name)?.as_str().parse::<f64>().ok();
        let has = |name: &str| captures.name(name).is_some();
        let verdict = if has("better_first") {
            Reading::of_two([1.0, 0.0])
        } else if has("better_second") {
            Reading::of_two([0.0, 1.0])
        } else if has("tie") {
            Reading::of_two([0.5, 0.5])
        } else if mode == Mode::Pointwise {
            Reading::of_one(number("score")?)
        } else {
            Reading::of_two([number("first")?, number("second")?])
        };
        if !verdict.is_valid() || found.is_some_and(|found| found != verdict) {
            return None;
        }
        found = Some(verdict);
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn reader(mode: Mode, verdict: serde_json::Value, within: Option<&str>) -> VerdictReader {
        let verdict: Verdict = serde_json::from_value(verdict).unwrap();
        let within = within.map(|text| RegexText::try_from(text.to_owned()).unwrap());
        VerdictReader::new(mode, &verdict, within.as_ref()).unwrap()
    }

    #[test]
    fn rules_are_tried_in_order_and_carry_their_labels() {
        let rules = json!([
            {"pattern": "A>B", "value": -1, "label": "worse"},
            {"pattern": "A>>B", "value": -2, "label": "much worse"},
            {"pattern": "B>A", "value": 1},
        ]);
        let grades = reader(Mode::Against, rules, Some(r"\[\[([AB<>=]+)\]\]"));
        let read = |reply: &str| {
            let found = grades.read(reply)?;
            Some((found.value, found.label))
        };
        let worse = Some((-1.0, Some("worse".to_owned())));
        assert_eq!(read("So [[A>B]]."), worse);
        assert_eq!(
            read("[[A>>B]]"),
            Some((-2.0, Some("much worse".to_owned())))
        );
        // The text within brackets counts alone where it is clear, else the whole reply.
        assert_eq!(
            read("Not A>B but [[B>A]], I say [[B>A]]"),
            Some((1.0, None))
        );
        assert_eq!(read("[[B>A]] or [[A>B]]"), worse);
        assert_eq!(read("A>B, I think"), worse);
        assert_eq!(read("a draw"), None);
    }

    #[test]
    fn matches_are_scores_in_their_order() {
        let rules = json!([{"pattern": r"-?\d+(?:\.\d+)?", "matches": ["first", "second"]}]);
        let scores = reader(Mode::Against, rules, Some(r"\A\s*(.*)"));
        let read = |reply: &str| scores.read(reply)?.scores;
        assert_eq!(read("8 9.5\nbecause of 3"), Some([8.0, 9.5]));
        assert_eq!(read("Scores: 8, 9"), Some([8.0, 9.0]));
        assert_eq!(read("12\n13"), None);
        assert_eq!(scores.read("8 9").unwrap().value, 1.0);
    }

    #[test]
    fn scores_of_objects_are_numbers_or_strings() {
        let rating = json!([{"object": "Rating", "requires": ["Explanation"]}]);
        let rating = reader(Mode::Pointwise, rating, None);
        let read = |reply: &str| Some(rating.read(reply)?.value);
        assert_eq!(read(r#"{"Explanation": "x", "Rating": 9.5}"#), Some(9.5));
        assert_eq!(read(r#"{"Explanation": "x", "Rating": "8"}"#), Some(8.0));
        assert_eq!(read(r#"{"Rating": 8}"#), None);
        let score = json!([{"object": "score", "integer": true}]);
        let score = reader(Mode::Pointwise, score, None);
        let read = |reply: &str| Some(score.read(reply)?.value);
        assert_eq!(read("{'score': 4.8}"), Some(4.0));
        assert_eq!(read("{'score': '4'}"), Some(4.0));
        assert_eq!(read("{'score': '4.5'}"), None);
        assert_eq!(read("```python\n{'score': 4}\n```"), None);
        assert_eq!(read("{'score': 1e300}"), None);
        let ten = json!([{"pattern": r"\d+", "matches": ["score"], "range": [0, 10]}]);
        let ten = reader(Mode::Pointwise, ten, None);
        assert_eq!(ten.read("10/10").map(|found| found.value), Some(10.0));
        assert_eq!(ten.read("11"), None);
    }

    #[test]
    fn verdicts_that_fit_no_mode_are_refused() {
        let refused = |rules: serde_json::Value| {
            let verdict: Result<Verdict, _> = serde_json::from_value(rules);
            verdict.unwrap_err().to_string()
        };
        for (rules, problem) in [
            (json!([]), "expected at least one rule"),
            (
                json!([{"label": "x"}]),
                "rule 1: expected `pattern` or `object`",
            ),
            (
                json!([{"pattern": "x", "value": 1}, {"pattern": "x"}]),
                "rule 2: expected the named groups",
            ),
            (
                json!([{"object": "x", "value": 1}]),
                "`value` and `matches` need a `pattern`",
            ),
            (
                json!([{"pattern": "x", "matches": ["second"]}]),
                "`matches` must be `[score]` or `[first, second]`",
            ),
            (
                json!([{"pattern": "(", "value": 1}]),
                "invalid regular expression",
            ),
            (json!(7), "expected a regular expression or a list of rules"),
        ] {
            let told = refused(rules);
            assert!(told.contains(problem), "{told}");
        }
        let verdict = |rules| serde_json::from_value::<Verdict>(rules).unwrap();
        let object = verdict(json!([{"object": "score"}]));
        let told = VerdictReader::new(Mode::Against, &object, None).unwrap_err();
        assert!(told.contains("use it with `mode: pointwise`"), "{told}");
    }
}
