//! The types of a pipeline file as written: its fields, their default values, and validated
//! scalars.
//!
//! The types are both the result of [`super::reader`] and the source of the JSON Schema: editors
//! show their doc comments.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU32;
use std::path::PathBuf;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, MapAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::expectation::Expectation;
use super::guard::{Action, Guard};
use super::reference::Variable;
use super::source::KeyPath;
use crate::stages::{ModelName, StageSpec, TableName};
use ovchat_models::{ModelSpec, Share};

/// A pipeline: tables, each built by one stage, and the models that the stages use.
#[derive(JsonSchema)]
#[schemars(rename = "Pipeline", deny_unknown_fields)]
pub struct PipelineSpec {
    /// A base pipeline file, or a list of them: their settings apply unless this file overrides them;
    /// of a list, later files override earlier ones. `null` removes an entry.
    #[schemars(default)]
    #[expect(
        dead_code,
        reason = "resolved before the tree is read; declared for the schema"
    )]
    pub extends: Option<BaseFiles>,
    /// The pipeline's name, which also names its run folder: `runs/<name>`.
    pub pipeline: PipelineName,
    /// The random seed. Random numbers depend on the seed, the stage, the round and the row.
    #[schemars(default)]
    pub seed: u64,
    /// The number of rounds, or `{ max: 5, stop_when: <SQL> }`, or `{ max: 5, keep: best, by: <SQL> }`.
    /// All stages run in every round, and each round starts from the models trained in the previous
    /// one.
    #[schemars(default)]
    pub rounds: Rounds,
    /// Named values, referenced as `"${name}"`.
    #[schemars(default, with = "BTreeMap<VariableName, Scalar>")]
    pub vars: Vec<Variable>,
    /// The models, by name.
    #[schemars(default, with = "BTreeMap<ModelName, ModelSpec>")]
    pub models: Vec<Entry<ModelName, ModelSpec>>,
    /// The tables, by name, each with the stage that builds it.
    #[schemars(with = "BTreeMap<TableName, StageSpec>")]
    pub stages: Vec<Entry<TableName, StageSpec>>,
    /// The tables that evaluate the models: built before round 1 (as round 0) and after every
    /// round.
    #[schemars(default, with = "BTreeMap<TableName, StageSpec>")]
    pub evaluate: Vec<Entry<TableName, StageSpec>>,
    /// The views that a run prints when it ends, by name and in this order. Later views and
    /// `pipeline sql` can query them.
    #[schemars(default, with = "BTreeMap<TableName, View>")]
    pub report: Vec<Entry<TableName, View>>,
    /// The expectations on tables, by name; each is checked as soon as its table is built.
    #[schemars(default, with = "BTreeMap<TableName, Expectation>")]
    pub expect: Vec<Entry<TableName, Expectation>>,
    /// Conditions on the health of a round, each with the action if it is true after the round: `warn`,
    /// `stop` or `off`. A condition is a bound on a metric of the table `health`, such as
    /// `length_correlation > 0.5` or `heldout_step.high < 0` (`low` and `high` are the ends of the
    /// confidence interval), or a query that returns one boolean and sees the tables of all rounds so
    /// far, with `$round`. A bound replaces the default bounds on the metric in the same direction;
    /// `defaults: off` turns all of them off. `pipeline health --help` lists metrics and defaults.
    #[schemars(default, with = "BTreeMap<String, Action>")]
    pub guard: Vec<GuardEntry>,
    /// The share of a stage's rows that may be rejected before the run stops, from 0 to 1.
    #[schemars(default = "one_percent")]
    pub reject_share_max: Share,
    /// The contents of the run's `images` table: the bytes of the images, or only references to
    /// their files.
    #[schemars(default)]
    pub keep_images: KeepImages,
    /// The settings whose whole value is one variable, with the name of the variable.
    #[schemars(skip)]
    pub uses: Vec<(KeyPath, String)>,
}

/// The base files of a pipeline file.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
#[expect(
    dead_code,
    reason = "resolved before the tree is read; declared for the schema"
)]
pub enum BaseFiles {
    One(PathBuf),
    Several(Vec<PathBuf>),
}

impl PipelineSpec {
    /// The stages, then those under `evaluate`, each with true if it is an evaluation.
    pub fn all_stages(&self) -> impl Iterator<Item = (&Entry<TableName, StageSpec>, bool)> {
        let stages = self.stages.iter().map(|stage| (stage, false));
        stages.chain(self.evaluate.iter().map(|stage| (stage, true)))
    }
}

/// The top-level fields, in their customary order.
pub const FIELDS: [&str; 13] = [
    "extends",
    "pipeline",
    "seed",
    "rounds",
    "vars",
    "models",
    "stages",
    "evaluate",
    "report",
    "expect",
    "guard",
    "reject_share_max",
    "keep_images",
];

/// A query over all rounds of a run, printed when the run ends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct View {
    /// The query. It may read every table of the run, with the column `round` if the table has
    /// rounds, and the views before this one.
    pub query: String,
    /// A chart of the result, written to the folder `report` of the run: `{ x: …, lines: […] }` as an
    /// SVG, `bars` as an SVG and a Markdown table, or `examples` as a page.
    ///
    /// `bars` draws results as the stage `measure` builds them. `examples` shows the rows of a query
    /// with the columns `question` and, if there are some, `image_ids`, `videos`, `reference`, and any
    /// others, of which texts stand side by side.
    #[serde(default)]
    pub chart: Option<Chart>,
}

/// A chart of a view.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Chart {
    Lines(LineChart),
    Bars(BarChart),
    /// Rows as a page: questions with their images, and the answers of models side by side.
    Examples,
}

/// A chart with a panel for each of some columns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LineChart {
    /// The column of the x axis.
    pub x: String,
    /// The columns of the y axis, each in a panel of its own.
    pub lines: Vec<String>,
}

/// A chart of benchmark results: a panel for each benchmark, a bar for each model.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BarChart {
    /// Draws results of a benchmark by different judges beside each other. By default, they are
    /// refused, because they cannot be compared. Published results are always marked.
    pub mixed_judges: bool,
}

impl Chart {
    /// The columns that a chart needs, each with true if it must be a number.
    pub fn columns(&self) -> Vec<(&str, bool)> {
        match self {
            Self::Lines(chart) => {
                let columns = std::iter::once(&chart.x).chain(&chart.lines);
                columns.map(|column| (column.as_str(), true)).collect()
            }
            Self::Bars(_) => vec![("benchmark", false), ("model", false), ("score", true)],
            Self::Examples => vec![("question", false)],
        }
    }
}

/// The description of [`Chart`] in messages.
const CHARTS: &str = "`bars`, `examples`, or a map with `x` and `lines` or with `bars`";

/// Implemented by hand, because an untagged enum would only report that no variant matches.
impl<'de> Deserialize<'de> for Chart {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ChartVisitor;

        impl<'de> Visitor<'de> for ChartVisitor {
            type Value = Chart;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(CHARTS)
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Chart, E> {
                match name {
                    "bars" => Ok(Chart::Bars(BarChart::default())),
                    "examples" => Ok(Chart::Examples),
                    _ => Err(E::invalid_value(Unexpected::Str(name), &self)),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Chart, A::Error> {
                #[derive(Deserialize)]
                #[serde(deny_unknown_fields)]
                struct Fields {
                    #[serde(default)]
                    x: Option<String>,
                    #[serde(default)]
                    lines: Option<Vec<String>>,
                    #[serde(default)]
                    bars: Option<BarChart>,
                }
                let fields = Fields::deserialize(MapAccessDeserializer::new(map))?;
                match fields {
                    Fields {
                        x: None,
                        lines: None,
                        bars: Some(bars),
                    } => Ok(Chart::Bars(bars)),
                    Fields {
                        x: Some(x),
                        lines: Some(lines),
                        bars: None,
                    } => Ok(Chart::Lines(LineChart { x, lines })),
                    Fields {
                        x: None,
                        bars: None,
                        ..
                    } => Err(de::Error::missing_field("x")),
                    Fields {
                        lines: None,
                        bars: None,
                        ..
                    } => Err(de::Error::missing_field("lines")),
                    _ => Err(de::Error::custom(format!("expected {CHARTS}"))),
                }
            }
        }

        deserializer.deserialize_any(ChartVisitor)
    }
}

impl JsonSchema for Chart {
    fn schema_name() -> Cow<'static, str> {
        "Chart".into()
    }
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let lines = generator.subschema_for::<LineChart>();
        let bars = generator.subschema_for::<BarChart>();
        json_schema!({"anyOf": [
            {"enum": ["bars", "examples"]},
            lines,
            {"type": "object", "properties": {"bars": bars}, "required": ["bars"], "additionalProperties": false},
        ]})
    }
}

/// The number of rounds.
#[derive(Debug, Clone, PartialEq, Eq, JsonSchema)]
#[schemars(untagged)]
pub enum Rounds {
    /// A fixed number of rounds.
    Count(NonZeroU32),
    /// Rounds until a condition is met.
    Until(Until),
}

/// Rounds that end when a condition is met, or of which the best is kept.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Until {
    /// The maximum number of rounds.
    pub max: NonZeroU32,
    /// A query that runs after every round and returns one boolean: true ends the rounds; false,
    /// null or no row continues them. It may read every table built so far, and `health`, with the
    /// column `round` if the table has rounds; `$round` is the round that has just ended.
    #[serde(default)]
    pub stop_when: Option<String>,
    /// The round whose checkpoint `pipeline export` takes: the last one, or the best one by `by`. Each
    /// round starts from the one before in both cases.
    #[serde(default)]
    pub keep: KeepRound,
    /// With `keep: best`, a query that runs after every round and returns one number. The round with
    /// the highest number is the best; of equal ones, the earliest. It may read the same tables as
    /// `stop_when`.
    #[serde(default)]
    pub by: Option<String>,
}

/// The round whose checkpoint is exported.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KeepRound {
    #[default]
    Last,
    Best,
}

/// A condition of `guard`, with its place.
pub struct GuardEntry {
    pub path: KeyPath,
    pub guard: Guard,
}

impl Rounds {
    /// The maximum number of rounds.
    pub fn max(&self) -> NonZeroU32 {
        match self {
            Self::Count(count) => *count,
            Self::Until(until) => until.max,
        }
    }

    /// The query that ends the rounds.
    pub fn stop_when(&self) -> Option<&str> {
        match self {
            Self::Count(_) => None,
            Self::Until(until) => until.stop_when.as_deref(),
        }
    }

    /// The query whose number decides which round is the best.
    pub fn by(&self) -> Option<&str> {
        match self {
            Self::Count(_) => None,
            Self::Until(until) => until.by.as_deref(),
        }
    }
}

impl Default for Rounds {
    fn default() -> Self {
        Self::Count(NonZeroU32::MIN)
    }
}

/// The limit on rounds: all of them are planned before the first one starts.
const ROUNDS_MAX: u64 = 1000;

fn within_most<E: de::Error>(rounds: u64) -> Result<(), E> {
    if rounds <= ROUNDS_MAX {
        return Ok(());
    }
    Err(E::custom(format!(
        "too many rounds: {rounds} (at most {ROUNDS_MAX})"
    )))
}

/// The description of [`Rounds`] in messages.
pub const ROUNDS: &str =
    "a number of rounds (1 or more) or a map with `max` and `stop_when`, or `keep: best` and `by`";

/// Implemented by hand, because an untagged enum would only report that no variant matches.
impl<'de> Deserialize<'de> for Rounds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RoundsVisitor;

        impl<'de> Visitor<'de> for RoundsVisitor {
            type Value = Rounds;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(ROUNDS)
            }

            fn visit_u64<E: de::Error>(self, count: u64) -> Result<Rounds, E> {
                within_most(count)?;
                let rounds = u32::try_from(count).ok().and_then(NonZeroU32::new);
                let rounds = rounds.map(Rounds::Count);
                rounds.ok_or_else(|| E::invalid_value(Unexpected::Unsigned(count), &self))
            }

            fn visit_i64<E: de::Error>(self, count: i64) -> Result<Rounds, E> {
                match u64::try_from(count) {
                    Ok(count) => self.visit_u64(count),
                    Err(_) => Err(E::invalid_value(Unexpected::Signed(count), &self)),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Rounds, A::Error> {
                let until = Until::deserialize(MapAccessDeserializer::new(map))?;
                within_most(until.max.get().into())?;
                match (until.keep, &until.by) {
                    (KeepRound::Best, None) => return Err(de::Error::missing_field("by")),
                    (KeepRound::Last, Some(_)) => {
                        let words = "`by` needs `keep: best`: the last round is kept by default";
                        return Err(de::Error::custom(words));
                    }
                    _ => {}
                }
                Ok(Rounds::Until(until))
            }
        }

        deserializer.deserialize_any(RoundsVisitor)
    }
}

/// A named model or stage.
pub struct Entry<Name, Spec> {
    pub name: Name,
    /// The path of the entry: `stages.rewards`.
    pub path: KeyPath,
    /// The path of its settings: `stages.rewards.score`.
    pub settings: KeyPath,
    /// The model or stage itself; `None` if it is invalid and has a diagnostic.
    pub spec: Option<Spec>,
}

/// The name of a pipeline, valid as the name of a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct PipelineName(
    #[schemars(regex(pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"), length(max = 100))]
    pub(super)  String,
);

impl PipelineName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for PipelineName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let starts_well = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        if starts_well && text.len() <= 100 && text.chars().all(word) {
            return Ok(Self(text));
        }
        Err(format!(
            "invalid pipeline name `{text}`: use at most 100 letters, digits, `-`, `_` and `.`, starting with a letter or digit"
        ))
    }
}

impl From<PipelineName> for String {
    fn from(name: PipelineName) -> Self {
        name.0
    }
}

/// The default value of `reject_share_max`.
pub fn one_percent() -> Share {
    Share::try_from(0.01).expect("0.01 is from 0 to 1")
}

/// The contents of the `images` table of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KeepImages {
    /// The bytes of each image file, so that the run is self-contained.
    #[default]
    Bytes,
    /// The path of each image file and the hash of its bytes.
    Reference,
}

/// The name of a variable.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "stands for the names of variables in the schema")]
struct VariableName(#[schemars(regex(pattern = r"^[A-Za-z0-9_]+$"))] String);

/// The value of a variable.
#[derive(JsonSchema)]
#[schemars(untagged)]
#[expect(dead_code, reason = "stands for the values of variables in the schema")]
enum Scalar {
    Text(String),
    Number(f64),
    Flag(bool),
}
