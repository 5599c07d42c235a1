//! The traits of models (policies, judges, trainers) and their errors.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use super::{
    AnswerGroup, Board, ChatPrompt, DpoReport, DpoSettings, Dtype, Example, Generation, JudgeScore,
    Layout, ModelSpec, ModelTelemetry, Placement, RankPlace, RewardReport, RewardSettings, Room,
    Sampling, SftExample, SftReport, SftSettings,
};

/// A callback that takes the result or the fault of row `index` of the call, in any order; it
/// returns `Break` to stop early.
pub type Emit<'a, T> = &'a mut dyn FnMut(usize, Result<T, RowFault>) -> ControlFlow<()>;

/// The caller that waits for a model.
pub struct Listener<'a> {
    /// Shows a note to the user.
    pub say: &'a mut dyn FnMut(&str),
    /// True if the caller wants to stop; polled while there is no result to emit.
    pub stopping: &'a dyn Fn() -> bool,
}

/// A fault of a single row, such as an image that cannot be decoded or a prompt that is too long.
/// Other rows are not affected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct RowFault(pub String);

/// A failure of a model as a whole.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file of the model cannot be read or is invalid.
    #[error("{}: {problem}", path.display())]
    Weights { path: PathBuf, problem: String },
    /// The device does not exist or cannot be used.
    #[error("device `{device}`: {problem}")]
    Device { device: String, problem: String },
    /// The device ran out of memory.
    #[error("out of memory while {what} ({batch} rows, {length} tokens)")]
    OutOfMemory {
        what: String,
        batch: usize,
        length: usize,
    },
    /// The endpoint of a model cannot be used.
    #[error("{url}: {problem}")]
    Service { url: String, problem: String },
    /// A loss or gradient is infinite or not a number; the step changed no weights.
    #[error("{what} is not finite; the rows of this step: {}", rows.join(", "))]
    NotFinite { what: String, rows: Vec<String> },
    /// A row that cannot be trained on.
    #[error("row {row}: {problem}")]
    Row { row: String, problem: String },
    /// Any other error reported by libtorch.
    #[error("{what}: {problem}")]
    Torch { what: String, problem: String },
}

/// A model that answers prompts.
pub trait Policy {
    /// Emits `how.count` answers for each prompt, in candidate order. A prompt that does not fit in
    /// memory on its own is a fault of its row.
    fn sample(
        &mut self,
        prompts: &[ChatPrompt],
        how: &Sampling,
        emit: Emit<'_, Vec<Generation>>,
    ) -> Result<ModelTelemetry, ModelError>;

    /// Describes batch sizes and the reasons for them; `None` if there is nothing to tell.
    fn plan(&self) -> Option<String>;
}

/// A model that scores answers.
pub trait Judge {
    /// Emits one score per answer for each group. A group that does not fit in memory on its own is
    /// a fault of its row.
    fn score(
        &mut self,
        groups: &[AnswerGroup<'_>],
        emit: Emit<'_, Vec<JudgeScore>>,
    ) -> Result<ModelTelemetry, ModelError>;

    /// Scores like [`Judge::score`], for judges that may wait long for an external service: tells
    /// the listener about waits, and stops when the listener asks it to.
    fn score_for(
        &mut self,
        groups: &[AnswerGroup<'_>],
        emit: Emit<'_, Vec<JudgeScore>>,
        _listener: &mut Listener<'_>,
    ) -> Result<ModelTelemetry, ModelError> {
        self.score(groups, emit)
    }

    /// Describes batch sizes and the reasons for them; `None` if there is nothing to tell.
    fn plan(&self) -> Option<String>;
}

/// The common part of all trainers: weights that change, and a state to resume from. If a step
/// fails, weights and optimizer are unchanged.
pub trait Trainer {
    /// Writes a checkpoint into the new folder `to`, in the layout of the original, with everything
    /// needed to load the trained model.
    fn save(&mut self, to: &Path) -> Result<(), ModelError>;

    /// Writes everything that [`Trainer::load_state`] needs to resume at this step (weights,
    /// optimizer, step count) into the new folder `to`.
    fn save_state(&mut self, to: &Path) -> Result<(), ModelError>;

    fn load_state(&mut self, from: &Path) -> Result<(), ModelError>;
}

/// A trainer for direct preference optimization.
pub trait DpoTrainer: Trainer {
    /// Returns the log-probabilities of `[chosen, rejected]` under the current weights.
    fn reference_logps(&mut self, pairs: &[Example<'_>]) -> Result<Vec<[f64; 2]>, ModelError>;

    /// Performs one optimizer update on a batch; the loss is the mean over its pairs.
    fn step(&mut self, batch: &[Example<'_>]) -> Result<DpoReport, ModelError>;

    /// Validates the pairs of a training without decoding their images; fails for the first one
    /// that cannot be trained on.
    fn validate(&mut self, pairs: &[Example<'_>]) -> Result<(), ModelError>;

    /// Describes memory use and batching, based on the validated pairs; `None` if there is nothing
    /// to tell.
    fn plan(&self) -> Option<String>;
}

/// A trainer for supervised fine-tuning on answers (next-token prediction).
pub trait SftTrainer: Trainer {
    /// Performs one optimizer update on a batch; the loss is the mean over its target tokens.
    fn step(&mut self, batch: &[SftExample<'_>]) -> Result<SftReport, ModelError>;
}

/// A trainer for reward models, which score chosen answers above rejected ones.
pub trait RewardTrainer: Trainer {
    /// Performs one optimizer update on a batch; the loss is the mean over its pairs.
    fn step(&mut self, batch: &[Example<'_>]) -> Result<RewardReport, ModelError>;
}

/// The result of opening a model.
pub type Opened<T> = Result<Box<T>, ModelError>;

/// The severity of a finding of `doctor`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    Good,
    Note,
    Bad,
}

/// A finding of `doctor`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub severity: Severity,
    pub text: String,
}

/// A loader of models, implemented by the networks and, for tests, by the scripted models.
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
    /// Returns the dtype that the model's `device` and `dtype` resolve to on this machine. It is a
    /// key input: rows in bfloat16 and rows in float32 are different rows.
    fn precision(&self, spec: &ModelSpec) -> Result<Dtype, ModelError>;
    /// Returns the model's placement on this machine; `None` for a model that needs no compute
    /// device.
    fn placement(&self, spec: &ModelSpec) -> Result<Option<Placement>, ModelError>;
    /// Returns the memory available to the model on this machine; `None` for a model whose memory
    /// use is negligible.
    fn room(&self, spec: &ModelSpec) -> Result<Option<Room>, ModelError>;
    /// Writes the policy in the folder `weights` into the new folder `to`: with an adapter merged
    /// into it, for programs that do not support adapters, or converted to another layout, or both.
    fn rewrite(
        &self,
        weights: &Path,
        adapter: Option<&Path>,
        layout: Option<Layout>,
        to: &Path,
    ) -> Result<(), ModelError>;
    /// Returns the versions of libraries that affect the models' results down to the last bit, for the
    /// footers of the files made with them.
    fn build(&self) -> Vec<(&'static str, String)>;
    /// Returns the number of threads of the CPU that the model computes with on this machine, which
    /// affects the last bits of its results; `None` for a model without a network.
    fn threads(&self, _spec: &ModelSpec) -> Result<Option<u32>, ModelError> {
        Ok(None)
    }
    /// Lets models compute with this number of threads instead, until the next call.
    fn keep_threads(&self, _threads: Option<u32>) {}
    /// Returns the GPUs that `device: auto` may use, as `CUDA_VISIBLE_DEVICES` names them; none if that is
    /// the CPU.
    fn gpus(&self) -> Result<Vec<String>, ModelError> {
        Ok(Vec::new())
    }
    /// Gives the memory of models that were closed back to the GPU.
    fn release(&self) {}
    /// Joins the other ranks of a cluster.
    fn board(&self, place: &RankPlace) -> Result<Box<dyn Board>, ModelError> {
        Err(ModelError::Torch {
            what: format!("joining the ranks at {}:{}", place.host, place.port),
            problem: "this program has no libtorch".to_owned(),
        })
    }
    /// Returns the peak memory of the GPUs in use so far, in bytes; `None` without one.
    fn peak_device_memory(&self) -> Option<u64> {
        None
    }
    /// Lists libraries and devices.
    fn doctor(&self) -> Vec<Finding>;
}
