//! The traits by which the dataflow meets the networks, and how they fail.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use super::{
    AnswerGroup, ChatPrompt, DpoReport, DpoSettings, Dtype, Example, Generation, JudgeScore,
    Layout, ModelSpec, ModelTelemetry, Placement, RewardReport, RewardSettings, Room, Sampling,
    SftExample, SftReport, SftSettings,
};

/// Takes the result or the fault of row `index` of the call, in any order; `Break` means stop early.
pub type Emit<'a, T> = &'a mut dyn FnMut(usize, Result<T, RowFault>) -> ControlFlow<()>;

/// Somebody who waits for a model.
pub struct Listener<'a> {
    /// Takes what they should know, in words.
    pub say: &'a mut dyn FnMut(&str),
    /// Whether they want no more; asked while nothing comes that could be emitted.
    pub stopping: &'a dyn Fn() -> bool,
}

/// Something is wrong with one row (a picture that does not decode, a prompt that is too long);
/// the others go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct RowFault(pub String);

/// A model fails as a whole.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file of the model can't be read or doesn't hold what it must.
    #[error("{}: {problem}", path.display())]
    Weights { path: PathBuf, problem: String },
    /// The device does not exist or can't be used.
    #[error("device `{device}`: {problem}")]
    Device { device: String, problem: String },
    /// The device ran out of memory.
    #[error("out of memory while {what} ({batch} rows, {length} tokens)")]
    OutOfMemory {
        what: String,
        batch: usize,
        length: usize,
    },
    /// A model behind an endpoint can't be asked.
    #[error("{url}: {problem}")]
    Service { url: String, problem: String },
    /// A loss or gradient is infinite or not a number; no weight was changed by this step.
    #[error("{what} is not finite; the rows of this step: {}", rows.join(", "))]
    NotFinite { what: String, rows: Vec<String> },
    /// A row that can't be trained on.
    #[error("row {row}: {problem}")]
    Row { row: String, problem: String },
    /// libtorch reported an error that has no better name.
    #[error("{what}: {problem}")]
    Torch { what: String, problem: String },
}

/// Answers prompts.
pub trait Policy {
    /// Emits `how.count` answers for each prompt, in the order of their number. A prompt that alone
    /// is too much for the memory is a fault of its row.
    fn sample(
        &mut self,
        prompts: &[ChatPrompt],
        how: &Sampling,
        emit: Emit<'_, Vec<Generation>>,
    ) -> Result<ModelTelemetry, ModelError>;

    /// How much it computes at once and why, in words; `None` if there is nothing to say.
    fn plan(&self) -> Option<String>;
}

/// Scores answers.
pub trait Judge {
    /// Emits one score per answer for each group. A group that alone is too much for the memory is a
    /// fault of its row.
    fn score(
        &mut self,
        groups: &[AnswerGroup<'_>],
        emit: Emit<'_, Vec<JudgeScore>>,
    ) -> Result<ModelTelemetry, ModelError>;

    /// The same for one that may wait long for something else: it tells what for, and stops when asked to.
    fn score_for(
        &mut self,
        groups: &[AnswerGroup<'_>],
        emit: Emit<'_, Vec<JudgeScore>>,
        _listener: &mut Listener<'_>,
    ) -> Result<ModelTelemetry, ModelError> {
        self.score(groups, emit)
    }

    /// How much it computes at once and why, in words; `None` if there is nothing to say.
    fn plan(&self) -> Option<String>;
}

/// What every training has in common: weights that change, and a state to go on from. When a step
/// fails, weights and optimizer are as before.
pub trait Trainer {
    /// Writes a checkpoint into the new folder `to`, in the layout that was read, with everything
    /// that is needed to load what was trained.
    fn save(&mut self, to: &Path) -> Result<(), ModelError>;

    /// Writes everything that [`Trainer::load_state`] needs to go on exactly here (weights,
    /// optimizer, step count) into the new folder `to`.
    fn save_state(&mut self, to: &Path) -> Result<(), ModelError>;

    fn load_state(&mut self, from: &Path) -> Result<(), ModelError>;
}

/// Learns from pairs with direct preference optimization.
pub trait DpoTrainer: Trainer {
    /// Log-probabilities of `[chosen, rejected]` under the weights as they are now.
    fn reference_logps(&mut self, pairs: &[Example<'_>]) -> Result<Vec<[f64; 2]>, ModelError>;

    /// One optimizer update over the batch (the mean of its pairs' losses).
    fn step(&mut self, batch: &[Example<'_>]) -> Result<DpoReport, ModelError>;

    /// Looks pairs over that will be trained on, without decoding their pictures; fails at one that
    /// can't be.
    fn validate(&mut self, pairs: &[Example<'_>]) -> Result<(), ModelError>;

    /// What it takes of memory and how it goes about it, by the pairs that it looked over, in words;
    /// `None` if there is nothing to say.
    fn plan(&self) -> Option<String>;
}

/// Learns answers by heart: the next token, given the ones before.
pub trait SftTrainer: Trainer {
    /// One optimizer update over the batch (the mean over its learned tokens).
    fn step(&mut self, batch: &[SftExample<'_>]) -> Result<SftReport, ModelError>;
}

/// Learns to score chosen answers above rejected ones.
pub trait RewardTrainer: Trainer {
    /// One optimizer update over the batch (the mean of its pairs' losses).
    fn step(&mut self, batch: &[Example<'_>]) -> Result<RewardReport, ModelError>;
}

/// A model that was opened.
pub type Opened<T> = Result<Box<T>, ModelError>;

/// How grave a finding of `doctor` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    Good,
    Note,
    Bad,
}

/// One thing that `doctor` found, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub severity: Severity,
    pub text: String,
}

/// Opens models. Implemented by the networks and, for tests, by nothing but the scripted doubles.
pub trait ModelLoader {
    fn policy(&self, spec: &ModelSpec) -> Opened<dyn Policy>;
    fn judge(&self, spec: &ModelSpec) -> Opened<dyn Judge>;
    fn dpo_trainer(&self, spec: &ModelSpec, settings: &DpoSettings) -> Opened<dyn DpoTrainer>;
    fn sft_trainer(&self, spec: &ModelSpec, settings: &SftSettings) -> Opened<dyn SftTrainer>;
    fn reward_trainer(
        &self,
        spec: &ModelSpec,
        settings: &RewardSettings,
    ) -> Opened<dyn RewardTrainer>;
    /// The precision that the model's `device` and `dtype` mean here. It takes part in keys: rows in
    /// bfloat16 and rows in float32 are not the same rows.
    fn precision(&self, spec: &ModelSpec) -> Result<Dtype, ModelError>;
    /// On which device the model computes here, and why; `None` for a model that needs none.
    fn placement(&self, spec: &ModelSpec) -> Result<Option<Placement>, ModelError>;
    /// Where the model computes here, and what memory it may take there; `None` for a model that takes
    /// none worth telling.
    fn room(&self, spec: &ModelSpec) -> Result<Option<Room>, ModelError>;
    /// Writes the policy in the folder `weights` into the new folder `to`: with an adapter added to
    /// it, for programs that know no adapters, or laid out for another program, or both.
    fn rewrite(
        &self,
        weights: &Path,
        adapter: Option<&Path>,
        layout: Option<Layout>,
        to: &Path,
    ) -> Result<(), ModelError>;
    /// What decides the last bits of what the models compute (library, threads), for the footers of
    /// the files made with them.
    fn build(&self) -> Vec<(&'static str, String)>;
    /// What libraries and devices there are.
    fn doctor(&self) -> Vec<Finding>;
}
