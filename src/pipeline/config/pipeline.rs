//! A pipeline file *as written*: its fields, their defaults, and the values that check themselves.
//!
//! The types are at once the result of [`super::reader`] and the source of the JSON Schema: their
//! doc comments are what an editor shows.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU32;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, MapAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::expectation::Expectation;
use super::reference::Variable;
use super::source::KeyPath;
use crate::stages::{ModelName, StageSpec, TableName};
use ovchat_models::{ModelSpec, Share};

/// A pipeline: tables, each made by one verb, and the models that the verbs use.
#[derive(JsonSchema)]
#[schemars(rename = "Pipeline", deny_unknown_fields)]
pub struct PipelineSpec {
    /// A pipeline file from which this one differs: its settings are meant where this one says nothing
    /// else. `null` takes an entry away.
    #[schemars(default)]
    #[expect(
        dead_code,
        reason = "followed before the tree is read; here for the schema"
    )]
    pub extends: Option<PathBuf>,
    /// The pipeline's name, which also names its run folder: `runs/<name>`.
    pub pipeline: PipelineName,
    /// Decides all random numbers, together with stage, round and row.
    #[schemars(default)]
    pub seed: u64,
    /// How often all stages run; each round starts from the models that the last one trained. A
    /// number, or `{ max: 5, stop_when: <SQL> }`.
    #[schemars(default)]
    pub rounds: Rounds,
    /// Values with a name, used as `"${name}"`.
    #[schemars(default, with = "BTreeMap<VariableName, Scalar>")]
    pub vars: Vec<Variable>,
    /// The models by name.
    #[schemars(default, with = "BTreeMap<ModelName, ModelSpec>")]
    pub models: Vec<Entry<ModelName, ModelSpec>>,
    /// The tables by name, each with the one verb that makes it.
    #[schemars(with = "BTreeMap<TableName, StageSpec>")]
    pub stages: Vec<Entry<TableName, StageSpec>>,
    /// Tables that tell how good the models are: made before round 1 (as round 0) and after every
    /// round.
    #[schemars(default, with = "BTreeMap<TableName, StageSpec>")]
    pub evaluate: Vec<Entry<TableName, StageSpec>>,
    /// What the run has to say when it ends: views by name, printed in this order, which later ones and
    /// `pipeline sql` know, too.
    #[schemars(default, with = "BTreeMap<TableName, View>")]
    pub report: Vec<Entry<TableName, View>>,
    /// What must be true of tables, each under a name; checked as soon as the table is there.
    #[schemars(default, with = "BTreeMap<TableName, Expectation>")]
    pub expect: Vec<Entry<TableName, Expectation>>,
    /// The share of a stage's rows that may be faulty before the run stops, from 0 to 1.
    #[schemars(default = "one_percent")]
    pub reject_share_max: Share,
    /// Whether the run's `images` table holds the pictures or only where they lie.
    #[schemars(default)]
    pub keep_images: KeepImages,
    /// The settings that are a variable and nothing else, with its name.
    #[schemars(skip)]
    pub uses: Vec<(KeyPath, String)>,
}

/// The top-level fields, in the order in which people write them.
pub const FIELDS: [&str; 12] = [
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
    "reject_share_max",
    "keep_images",
];

/// A query over all rounds of a run, which is printed when the run ends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct View {
    /// The query. It may read every table of the run, with the column `round` where a table has
    /// rounds, and the views before.
    pub query: String,
    /// A picture of it, as report/<name>.svg in the run's folder.
    #[serde(default)]
    pub chart: Option<Chart>,
}

/// Which columns of a view are drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Chart {
    /// The column that goes to the right.
    pub x: String,
    /// The columns that go up, each in a panel of its own.
    pub lines: Vec<String>,
}

impl Chart {
    /// All columns that it draws.
    pub fn columns(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.x)
            .chain(&self.lines)
            .map(String::as_str)
    }
}

/// How often all stages run.
#[derive(Debug, Clone, PartialEq, Eq, JsonSchema)]
#[schemars(untagged)]
pub enum Rounds {
    /// So often.
    Count(NonZeroU32),
    /// Until something is so.
    Until(Until),
}

/// Rounds that know when to stop.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Until {
    /// The most rounds.
    pub max: NonZeroU32,
    /// A query that is asked after every round and says in one row and one column, true or false,
    /// whether it was the last; null, or no row, is not true, and the rounds go on. It may read every
    /// table as it is by then, with the column `round` where a table has rounds; `$round` is the round
    /// that has just ended.
    pub stop_when: String,
}

impl Rounds {
    /// The most rounds that there may be.
    pub fn max(&self) -> NonZeroU32 {
        match self {
            Self::Count(count) => *count,
            Self::Until(until) => until.max,
        }
    }

    /// The query that ends them.
    pub fn stop_when(&self) -> Option<&str> {
        match self {
            Self::Count(_) => None,
            Self::Until(until) => Some(&until.stop_when),
        }
    }
}

impl Default for Rounds {
    fn default() -> Self {
        Self::Count(NonZeroU32::MIN)
    }
}

/// The most rounds: each is planned before the first begins.
const ROUNDS_MAX: u64 = 1000;

fn within_most<E: de::Error>(rounds: u64) -> Result<(), E> {
    if rounds <= ROUNDS_MAX {
        return Ok(());
    }
    Err(E::custom(format!(
        "{rounds} rounds are too many: a run has at most {ROUNDS_MAX}"
    )))
}

/// What [`Rounds`] is in messages.
pub const ROUNDS: &str = "a number of rounds (1 or more), or a map of `max` and `stop_when`";

/// By hand, for an untagged enum would say only that no variant fits.
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
                Ok(Rounds::Until(until))
            }
        }

        deserializer.deserialize_any(RoundsVisitor)
    }
}

/// A model or stage, under its name.
pub struct Entry<Name, Spec> {
    pub name: Name,
    /// Where it stands: `stages.rewards`.
    pub path: KeyPath,
    /// Where its settings stand: `stages.rewards.score`.
    pub settings: KeyPath,
    /// What it is; `None` when that was wrong and has been complained about.
    pub spec: Option<Spec>,
}

/// The name of a pipeline, fit for a folder.
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
            "`{text}` can't name a folder: use letters, digits, `-`, `_` and `.`, at most 100"
        ))
    }
}

impl From<PipelineName> for String {
    fn from(name: PipelineName) -> Self {
        name.0
    }
}

/// The default of `reject_share_max`.
pub fn one_percent() -> Share {
    Share::try_from(0.01).expect("it is from 0 to 1")
}

/// What the `images` table of a run keeps of a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KeepImages {
    /// The bytes of its file, so that the run needs nothing but itself.
    #[default]
    Bytes,
    /// Where its file lies and the hash of its bytes.
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
