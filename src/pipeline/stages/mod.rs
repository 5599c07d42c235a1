//! The stage types, one file each: settings, validation, work and tests, in that order.
//!
//! A stage never iterates over its table, resumes or writes a file. It declares
//! the kind of its work ([`StageKind`]); the runner (`run/`) splits the work into parts, skips
//! finished parts, commits, and handles signals, in the same way for every stage.
//!
//! To add a stage type: write its file, add its `mod`, its variant in [`StageSpec`] and its arms in
//! [`StageSpec::as_stage`] and [`StageSpec::as_stage_mut`]; `UPDATE=1 cargo test` rewrites
//! `schemas/`.

mod allowed_folders;
mod fields;
mod formats;
mod image_marks;
mod input_tables;
mod media;
mod model_calls;
mod names;
mod opener;
mod pairing;
mod programs;
mod records;
mod shown;
mod source;
mod source_check;
#[cfg(test)]
mod test_pipeline;
mod unread;
mod values;
mod video;
mod work;

mod load_answers;
mod load_feedback;
mod load_prompts;
mod load_results;
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
mod measure;
mod overlap;
mod sql;

pub use ask_people::AskPeople;
pub use combine::{Combine, Normalize};
pub use compare::Compare;
pub use exec::{Column, Columns, Exec, Inherited};
pub use formats::endings;
pub use load_answers::LoadAnswers;
pub use load_feedback::LoadFeedback;
pub use load_prompts::LoadPrompts;
pub use load_results::LoadResults;
pub use measure::{Measure, Rules, ScoreRule};
pub use overlap::FindOverlap;
pub use programs::{end_with_parent, is_executable};
pub use sample::Sample;
pub use score::Score;
pub use select_extremes::{SelectExtremes, Truncated};
pub use select_pairs::SelectPairs;
pub use selection::Pairs;
pub use shown::{ImageUse, Shown};
pub use source_check::SourceProblem;
pub use sql::Sql;
pub use training::AFTER;

pub use ovchat_models::Share;
use ovchat_models::{DatasetPart, Unchosen};
pub use train_dpo::{REFERENCE, TrainDpo};
pub use train_reward::TrainReward;
pub use train_sft::TrainSft;
pub use values::{
    ModelName, NAME_MAX, NonNegative, Positive, Probability, StopString, TableName, Temperature,
};
pub use video::Ffmpeg;

use std::path::{Path, PathBuf};

use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use ovchat_query::QueryError;

/// A stage in a pipeline file: one stage type and its settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StageSpec {
    /// Loads prompts (images and questions) from a file.
    LoadPrompts(LoadPrompts),
    /// Loads preference pairs labeled by people from a file.
    LoadFeedback(LoadFeedback),
    /// Loads answers to prompts that another program wrote.
    LoadAnswers(LoadAnswers),
    /// Samples answers to prompts with a model.
    Sample(Sample),
    /// Scores candidates with a judge.
    Score(Score),
    /// Waits for annotators to choose between answers.
    AskPeople(AskPeople),
    /// Combines the rewards of several judges.
    Combine(Combine),
    /// Pairs the best with the worst answer to each prompt, by reward.
    SelectExtremes(SelectExtremes),
    /// Pairs the answers to each prompt with a named strategy.
    SelectPairs(SelectPairs),
    /// Trains a model on pairs with DPO or a related loss.
    TrainDpo(TrainDpo),
    /// Trains a model on given answers (supervised fine-tuning).
    TrainSft(TrainSft),
    /// Trains a reward model on pairs.
    TrainReward(TrainReward),
    /// Scores both answers of each pair, to measure how often a judge agrees with the label.
    Compare(Compare),
    /// Measures models on a benchmark: their scores, and gains with confidence intervals.
    Measure(Measure),
    /// Loads benchmark scores that others published.
    LoadResults(LoadResults),
    /// Finds benchmark prompts whose image or question is among the training prompts.
    Overlap(FindOverlap),
    /// Builds a table with an SQL query.
    Sql(Sql),
    /// Builds a table with an external command.
    Exec(Exec),
}

impl StageSpec {
    /// True for a stage that loads a file, and reads no table.
    pub fn is_source(&self) -> bool {
        matches!(
            self,
            Self::LoadPrompts(_) | Self::LoadFeedback(_) | Self::LoadResults(_)
        )
    }

    /// Returns the number of frames of a video, if the stage loads a file that names videos.
    pub fn video_frames(&self) -> Option<usize> {
        match self {
            Self::LoadPrompts(load) => load.video_frames(),
            Self::LoadFeedback(load) => load.video_frames(),
            _ => None,
        }
    }

    /// Returns the source of a loading stage, and the part of it that is loaded.
    pub fn source(&self) -> Option<(&Path, DatasetPart<'_>)> {
        match self {
            Self::LoadPrompts(load) => Some((load.from(), load.part())),
            Self::LoadFeedback(load) => Some((load.from(), load.part())),
            _ => None,
        }
    }

    /// Returns the columns that a loading stage keeps.
    pub fn kept_columns(&self) -> Option<&[String]> {
        match self {
            Self::LoadPrompts(load) => Some(load.kept_columns()),
            Self::LoadFeedback(load) => Some(load.kept_columns()),
            _ => None,
        }
    }

    /// Returns the reason why a loading stage has no files to load.
    pub fn unchosen(&self) -> Option<Unchosen> {
        match self {
            Self::LoadPrompts(load) => load.unchosen(),
            Self::LoadFeedback(load) => load.unchosen(),
            _ => None,
        }
    }

    pub fn as_stage(&self) -> &dyn Stage {
        match self {
            Self::LoadPrompts(stage) => stage,
            Self::LoadFeedback(stage) => stage,
            Self::LoadAnswers(stage) => stage,
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
            Self::Measure(stage) => stage,
            Self::LoadResults(stage) => stage,
            Self::Overlap(stage) => stage,
            Self::Sql(stage) => stage,
            Self::Exec(stage) => stage,
        }
    }

    pub fn as_stage_mut(&mut self) -> &mut dyn Stage {
        match self {
            Self::LoadPrompts(stage) => stage,
            Self::LoadFeedback(stage) => stage,
            Self::LoadAnswers(stage) => stage,
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
            Self::Measure(stage) => stage,
            Self::LoadResults(stage) => stage,
            Self::Overlap(stage) => stage,
            Self::Sql(stage) => stage,
            Self::Exec(stage) => stage,
        }
    }
}

/// A table that a stage reads.
pub struct Input<'a> {
    /// The setting that names it, e.g. `candidates`.
    pub field: &'static str,
    /// The table. `None` if the setting was omitted: the plan then searches the lineage for an
    /// ancestor of `kind` and passes it to [`Stage::find`].
    pub table: Option<&'a TableName>,
    /// The columns that the stage requires.
    pub needs: SchemaRef,
    /// The table kind that has these columns.
    pub kind: &'static str,
}

/// The role of a model in a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelRole {
    /// Generates answers.
    Answers,
    /// Scores answers.
    Scores,
    /// Is trained on pairs with DPO.
    LearnsPairs,
    /// Is trained on answers with SFT.
    LearnsAnswers,
    /// Is trained as a reward model.
    LearnsRewards,
    /// Computes log-probabilities of answers.
    Reads,
}

impl ModelRole {
    /// True if the stage trains the model.
    pub fn learns(self) -> bool {
        !matches!(self, Self::Answers | Self::Scores | Self::Reads)
    }
}

/// The labels of candidates that a stage waits for.
pub struct Waits<'a> {
    pub candidates: &'a TableName,
    pub prompts: &'a TableName,
    /// Tables of rewards that order the label queue.
    pub rewards: &'a [TableName],
    /// The number of labels required.
    pub labels: u64,
}

/// A model that a stage uses.
pub struct Use<'a> {
    /// The setting that names it, e.g. `model`.
    pub field: &'static str,
    pub model: &'a ModelName,
    pub role: ModelRole,
    pub state: ModelState,
}

/// A state of a model that is trained round after round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ModelState {
    /// The state at the start of the stage.
    Now,
    /// The state before the first round.
    Initial,
}

/// An error in a stage that only shows in the context of the whole pipeline or the environment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct StageError {
    /// The setting at fault, if it is a single one.
    pub field: Option<&'static str>,
    pub message: String,
    /// The suggested fix.
    pub help: Option<String>,
    /// The error of the stage's query, if that is the error.
    pub query: Option<QueryError>,
}

impl StageError {
    /// Returns an error in one setting, with the suggested fix.
    fn at(field: &'static str, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self {
            field: Some(field),
            message: message.into(),
            help: Some(help.into()),
            query: None,
        }
    }
}

/// The interface of a stage type.
pub trait Stage {
    /// Returns the tables that the stage reads.
    fn inputs(&self) -> Vec<Input<'_>>;

    /// Sets the input `field`, which was omitted, to the table that the plan found for it.
    fn find(&mut self, _field: &str, _table: TableName) {}

    /// Returns the models that the stage uses.
    fn uses(&self) -> Vec<Use<'_>> {
        Vec::new()
    }

    /// Returns the user's files and folders that the stage reads, each with the setting that names
    /// it.
    fn files(&self) -> Vec<(&'static str, &Path)> {
        Vec::new()
    }

    /// Resolves the relative path in every setting against the folder that `folder` returns for the
    /// setting: that of the pipeline file that sets it.
    fn resolve(&mut self, _folder: &dyn Fn(&str) -> PathBuf) {}

    /// Returns the kind of the table that the stage builds; `None` if its columns are user-defined.
    fn kind(&self) -> Option<&'static str>;

    /// Returns the columns that the stage builds. `given` holds table schemas by name: always those
    /// of [`Stage::inputs`], and any other table of the pipeline that a query may name. Also
    /// validates settings against each other.
    fn output(&self, given: &[(TableName, SchemaRef)]) -> Result<SchemaRef, StageError>;

    /// True if the stage draws random numbers.
    fn draws(&self) -> bool {
        false
    }

    /// Returns the settings that affect how the work is split but not its result. They are no key
    /// inputs.
    fn unkeyed(&self) -> &'static [&'static str] {
        &[]
    }

    /// Returns the version of the stage type, which changes whenever the same input and settings
    /// give another result.
    fn version(&self) -> String {
        "1".to_owned()
    }

    /// Returns the number of rows built from `input` rows of the first input if none is rejected;
    /// `None` if it depends on their content.
    fn expected_rows(&self, _input: u64) -> Option<u64> {
        None
    }

    /// Returns an upper bound of the number of rows where it depends on the content of the inputs;
    /// `rows` returns the number of rows of a table.
    fn rows_at_most(&self, _rows: &dyn Fn(&TableName) -> Option<u64>) -> Option<u64> {
        None
    }

    /// Returns the labels that the stage waits for before it starts.
    fn waits(&self) -> Option<Waits<'_>> {
        None
    }

    /// Returns the work for the runner.
    fn work(&self) -> StageKind<'_>;
}

pub use input_tables::InputTables;
pub use work::*;

/// Resolves the path of the setting `field` against its base folder.
fn join(folder: &dyn Fn(&str) -> PathBuf, field: &str, path: &mut PathBuf) {
    *path = folder(field).join(&*path);
}
