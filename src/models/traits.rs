//! The traits by which the dataflow meets the networks, and how they fail.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use super::{
    Dtype, Example, Generation, Group, ModelSpec, Prompt, Sampling, Score, StepReport,
    TrainSettings,
};

/// Takes the result or the fault of row `index` of the call, in any order; `Break` means stop early.
pub type Emit<'a, T> = &'a mut dyn FnMut(usize, Result<T, RowFault>) -> ControlFlow<()>;

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
    /// A loss or gradient is infinite or not a number; no weight was changed by this step.
    #[error("{what} is not finite; the pairs of this step: {}", pairs.join(", "))]
    NotFinite { what: String, pairs: Vec<String> },
    /// A pair that can't be trained on.
    #[error("pair {pair}: {problem}")]
    Pair { pair: String, problem: String },
    /// libtorch reported an error that has no better name.
    #[error("{what}: {problem}")]
    Torch { what: String, problem: String },
}

/// Answers prompts.
pub trait Policy {
    /// Emits `how.count` answers for each prompt, in the order of their number.
    fn sample(
        &mut self,
        prompts: &[Prompt],
        how: &Sampling,
        emit: Emit<'_, Vec<Generation>>,
    ) -> Result<(), ModelError>;
}

/// Scores answers.
pub trait Judge {
    /// Emits one score per answer for each group.
    fn score(&mut self, groups: &[Group<'_>], emit: Emit<'_, Vec<Score>>)
    -> Result<(), ModelError>;
}

/// Learns from pairs.
pub trait Learner {
    /// Log-probabilities of `[chosen, rejected]` under the weights as they are now.
    fn reference_logps(&mut self, pairs: &[Example<'_>]) -> Result<Vec<[f64; 2]>, ModelError>;

    /// One optimizer update over the batch (the mean of its pairs' losses). When it fails, weights
    /// and optimizer are as before.
    fn step(&mut self, batch: &[Example<'_>]) -> Result<StepReport, ModelError>;

    /// Writes a checkpoint into the new folder `to`, in the layout that was read, with everything
    /// that transformers needs to load it.
    fn save(&mut self, to: &Path) -> Result<(), ModelError>;

    /// Writes everything that [`Learner::load_state`] needs to go on exactly here (weights,
    /// optimizer, step count) into the new folder `to`.
    fn save_state(&mut self, to: &Path) -> Result<(), ModelError>;

    fn load_state(&mut self, from: &Path) -> Result<(), ModelError>;
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
    /// `weights` replaces the folder in the spec when a checkpoint of an earlier round is meant.
    fn policy(&self, spec: &ModelSpec, weights: Option<&Path>) -> Opened<dyn Policy>;
    fn judge(&self, spec: &ModelSpec) -> Opened<dyn Judge>;
    fn learner(
        &self,
        spec: &ModelSpec,
        weights: Option<&Path>,
        settings: &TrainSettings,
    ) -> Opened<dyn Learner>;
    /// The precision that the model's `device` and `dtype` mean here. It takes part in keys: rows in
    /// bfloat16 and rows in float32 are not the same rows.
    fn precision(&self, spec: &ModelSpec) -> Result<Dtype, ModelError>;
    /// What decides the last bits of what the models compute (library, threads), for the footers of
    /// the files made with them.
    fn build(&self) -> Vec<(&'static str, String)>;
    /// What libraries and devices there are.
    fn doctor(&self) -> Vec<Finding>;
}
