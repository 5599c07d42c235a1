//! What a model promises: text and pictures in, text and numbers out.
//!
//! No tensors and no tables cross this line, so the dataflow builds and runs without libtorch and
//! the networks without Arrow. All traits take many rows at once: an implementation batches and
//! shares as it likes, and hands each row's result to `emit` as soon as it is known.

pub mod scripted;
mod spec;
mod traits;
mod types;

pub use spec::{DeviceSpec, Dtype, Gigabytes, LlavaOnevision, LlavaRlhf, ModelSpec, Scripted};
pub use traits::{
    DpoLearner, Emit, Finding, Judge, Learner, ModelError, ModelLoader, Opened, Policy,
    RewardLearner, RowFault, Severity, SftLearner,
};
pub use types::{
    Answer, DpoReport, DpoSettings, Example, Generation, Group, Learned, Lesson, Mask, Newlines,
    Optimization, Picture, Prompt, RewardReport, RewardSettings, Role, Sampling, Schedule, Score,
    SftReport, SftSettings, Stop, Telemetry, Tower, Turn,
};
