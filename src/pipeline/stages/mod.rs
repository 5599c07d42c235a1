//! The verbs: one file each, with its settings, its checks, its work and its tests, in that order.
//!
//! A stage never loops over its table, resumes, reports progress or writes a file: it says what
//! work it is ([`StageKind`]), and the runner (`run/`) cuts parts, skips what is done, commits and
//! answers signals. That is what makes these things the same for every stage.
//!
//! To add a stage: write its file, add its `mod`, its variant in [`StageSpec`] and its arm in
//! [`StageSpec::as_stage`]; `UPDATE=1 cargo test` rewrites `schemas/`.

mod allowed_folders;
mod formats;
mod input_tables;
mod media;
mod pairing;
mod records;
mod source;
mod source_check;
mod unread;
mod values;
mod work;

mod load_feedback;
mod load_prompts;
mod sample;
mod score;
mod select_extremes;
mod select_pairs;
mod selection;

mod training;

mod train_dpo;
mod train_reward;
mod train_sft;

mod ask_people;
mod combine;
mod compare;
mod exec;
mod sql;

pub use ask_people::AskPeople;
pub use combine::{Combine, Normalize};
pub use compare::Compare;
pub use exec::{Column, Columns, Exec, Inherited};
pub use load_feedback::LoadFeedback;
pub use load_prompts::LoadPrompts;
pub use sample::Sample;
pub use score::Score;
pub use select_extremes::{SelectExtremes, Truncated};
pub use select_pairs::SelectPairs;
pub use selection::Pairs;
pub use source::IMAGE_MAX;
pub use source_check::SourceProblem;
pub use sql::Sql;
pub use training::AFTER;

pub use ovchat_models::Share;
pub use train_dpo::{REFERENCE, TrainDpo};
pub use train_reward::TrainReward;
pub use train_sft::TrainSft;
pub use values::{
    ModelName, NAME_MAX, NonNegative, Positive, Probability, StopString, TableName, Temperature,
};

use std::path::{Path, PathBuf};

use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A stage as a pipeline file writes it: one verb and its settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StageSpec {
    /// Reads pictures and questions from a file.
    LoadPrompts(LoadPrompts),
    /// Reads pairs that people judged from a file.
    LoadFeedback(LoadFeedback),
    /// Samples answers to prompts.
    Sample(Sample),
    /// Scores candidates.
    Score(Score),
    /// Waits for people to choose between answers.
    AskPeople(AskPeople),
    /// Adds up what several judges think.
    Combine(Combine),
    /// Pairs the best with the worst answer to each prompt.
    SelectExtremes(SelectExtremes),
    /// Pairs answers to each prompt in a way that is named.
    SelectPairs(SelectPairs),
    /// Trains a model on pairs with DPO.
    TrainDpo(TrainDpo),
    /// Trains a model on answers that are given (supervised fine-tuning).
    TrainSft(TrainSft),
    /// Trains a reward model on pairs.
    TrainReward(TrainReward),
    /// Scores both answers of pairs, to see how often a judge agrees.
    Compare(Compare),
    /// Makes a table by a query of your own.
    Sql(Sql),
    /// Makes a table by a command of your own.
    Exec(Exec),
}

impl StageSpec {
    pub fn as_stage(&self) -> &dyn Stage {
        match self {
            Self::LoadPrompts(stage) => stage,
            Self::LoadFeedback(stage) => stage,
            Self::Sample(stage) => stage,
            Self::Score(stage) => stage,
            Self::AskPeople(stage) => stage,
            Self::Combine(stage) => stage,
            Self::SelectExtremes(stage) => stage,
            Self::SelectPairs(stage) => stage,
            Self::TrainDpo(stage) => stage,
            Self::TrainSft(stage) => stage,
            Self::TrainReward(stage) => stage,
            Self::Compare(stage) => stage,
            Self::Sql(stage) => stage,
            Self::Exec(stage) => stage,
        }
    }

    pub fn as_stage_mut(&mut self) -> &mut dyn Stage {
        match self {
            Self::LoadPrompts(stage) => stage,
            Self::LoadFeedback(stage) => stage,
            Self::Sample(stage) => stage,
            Self::Score(stage) => stage,
            Self::AskPeople(stage) => stage,
            Self::Combine(stage) => stage,
            Self::SelectExtremes(stage) => stage,
            Self::SelectPairs(stage) => stage,
            Self::TrainDpo(stage) => stage,
            Self::TrainSft(stage) => stage,
            Self::TrainReward(stage) => stage,
            Self::Compare(stage) => stage,
            Self::Sql(stage) => stage,
            Self::Exec(stage) => stage,
        }
    }
}

/// A table that a stage reads.
pub struct Input<'a> {
    /// The setting that names it: `candidates`.
    pub field: &'static str,
    /// The table. `None`: the setting was left out, and the plan looks for an ancestor of `kind`
    /// and tells the stage by [`Stage::find`].
    pub table: Option<&'a TableName>,
    /// The columns that the stage needs.
    pub needs: SchemaRef,
    /// The kind that has these columns.
    pub kind: &'static str,
}

/// What a stage does with a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelRole {
    Answers,
    Scores,
    /// Is trained with DPO.
    LearnsPairs,
    /// Is trained on answers.
    LearnsAnswers,
    /// Is trained to score.
    LearnsRewards,
    /// Says how likely answers are.
    Reads,
}

impl ModelRole {
    /// Whether the model changes.
    pub fn learns(self) -> bool {
        !matches!(self, Self::Answers | Self::Scores | Self::Reads)
    }
}

/// What a stage waits for: labels of candidates.
pub struct Waits<'a> {
    pub candidates: &'a TableName,
    pub prompts: &'a TableName,
    /// Tables of rewards that say what to ask about first.
    pub rewards: &'a [TableName],
    /// How many labels are enough.
    pub labels: u64,
}

/// A model that a stage uses.
pub struct Use<'a> {
    /// The setting that names it: `model`.
    pub field: &'static str,
    pub model: &'a ModelName,
    pub role: ModelRole,
    pub state: ModelState,
}

/// Which state of a model that is trained round after round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ModelState {
    /// As it is when the stage begins.
    Now,
    /// As it was before the first round.
    Initial,
}

/// Something is wrong with a stage that only the whole pipeline or the world can show.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct StageError {
    /// The setting at fault, if one is.
    pub field: Option<&'static str>,
    pub message: String,
    /// The way out.
    pub help: Option<String>,
}

/// What every verb promises.
pub trait Stage {
    /// The tables it reads.
    fn inputs(&self) -> Vec<Input<'_>>;

    /// Takes the name of the table that the plan found for the input `field`.
    fn find(&mut self, _field: &str, _table: TableName) {}

    /// The models it uses.
    fn uses(&self) -> Vec<Use<'_>> {
        Vec::new()
    }

    /// The files and folders of the user that it reads, each with the setting that names it.
    fn files(&self) -> Vec<(&'static str, &Path)> {
        Vec::new()
    }

    /// Takes the relative path of every setting to start at the folder that `folder` gives for it:
    /// that of the pipeline file which says it.
    fn resolve(&mut self, _folder: &dyn Fn(&str) -> PathBuf) {}

    /// The kind of the table it makes; `None` when a query decides.
    fn kind(&self) -> Option<&'static str>;

    /// The columns it makes. `given` is the schema of each table of the pipeline by name: those in
    /// [`Stage::inputs`] always, any other that a query may name. Also the place for checks of
    /// settings against each other.
    fn output(&self, given: &[(TableName, SchemaRef)]) -> Result<SchemaRef, StageError>;

    /// Whether it draws random numbers.
    fn draws(&self) -> bool {
        false
    }

    /// Settings that decide how the work is cut, not what comes out; they take no part in keys.
    fn unkeyed(&self) -> &'static [&'static str] {
        &[]
    }

    /// Changes when the verb makes something else of the same input and settings.
    fn version(&self) -> String {
        "1".to_owned()
    }

    /// How many rows it makes of so many rows of its first input, none being set aside; `None` where
    /// that depends on what is in them.
    fn expected_rows(&self, _input: u64) -> Option<u64> {
        None
    }

    /// How many rows it makes at most, where how many depends on what is in its inputs; `rows` tells
    /// those of a table.
    fn rows_at_most(&self, _rows: &dyn Fn(&TableName) -> Option<u64>) -> Option<u64> {
        None
    }

    /// What it waits for people to do before it can begin.
    fn waits(&self) -> Option<Waits<'_>> {
        None
    }

    /// The work, for the runner.
    fn work(&self) -> StageKind<'_>;
}

pub use input_tables::InputTables;
pub use work::*;

/// Joins the path of the setting `field` to the folder at which it starts.
fn join(folder: &dyn Fn(&str) -> PathBuf, field: &str, path: &mut PathBuf) {
    *path = folder(field).join(&*path);
}
