//! What a model promises: text and pictures in, text and numbers out.
//!
//! No tensors and no tables cross this line, so the dataflow builds and runs without libtorch and
//! the networks without Arrow. All traits take many rows at once: an implementation batches and
//! shares as it likes, and hands each row's result to `emit` as soon as it is known.

pub mod prep;

mod asking;
mod critic;
mod http;
mod hub;
pub mod libtorch;
mod orders;
pub mod scripted;
mod spec;
mod tls;
mod training;
mod traits;
mod types;

pub use asking::{Asking, Mode, Questionnaire, Shown, Verdict};
pub use critic::{Critic, PolicyWriter, Request, Writer};
pub use http::{BaseUrl, Http, HttpWriter, Price, Spend, SpendLimit};
pub use hub::{Hub, Repository, is_offline};
pub use orders::Orders;
pub use spec::{
    CriticSpec, DeviceSpec, Dtype, Exam, Gigabytes, Golden, Itself, LlavaOnevision, LlavaRlhf,
    ModelSpec, Scripted, Share, SqlReward, TEMPLATE,
};
pub use training::{
    Answer, Checkpointing, DpoReport, DpoSettings, Example, Learned, Lesson, LoraSettings, Loss,
    Mask, Newlines, Objective, Optimization, Optimizer, Part, RewardReport, RewardSettings,
    Schedule, SftReport, SftSettings, Tower, Trained,
};
pub use traits::{
    DpoLearner, Emit, Finding, Judge, Learner, Listener, ModelError, ModelLoader, Opened, Policy,
    RewardLearner, RowFault, Severity, SftLearner,
};
pub use types::{
    Generation, Group, Layout, Picture, Placement, Prompt, Role, Room, Sampling, Score, Stop,
    Telemetry, Turn, media_type,
};
