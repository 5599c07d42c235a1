//! The interface of models: text and images in, text and numbers out.
//!
//! No tensors and no tables cross this interface, so the dataflow builds and runs without libtorch
//! and the networks without Arrow. All traits take many rows at once: an implementation batches and
//! shares work as it likes, and hands each row's result to `emit` as soon as it is known.

pub mod architectures;
pub mod checkpoint;
pub mod preprocess;

mod architecture;
mod board;
mod caption_permutations;
mod compute;
mod critic;
mod exam;
mod http;
mod hub;
mod judge_prompt;
pub mod libtorch;
mod places;
pub mod scripted;
mod spec;
mod tls;
mod training;
mod traits;
mod types;

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod test_util;

pub use architecture::{Architecture, ImageProcessor};
pub use board::{Board, LocalBoard, RankPlace};
pub use caption_permutations::CaptionPermutations;
pub use compute::{Compute, DeviceSpec, Dtype, Gigabytes};
pub use critic::{Critic, PolicyWriter, Request, Writer};
pub use exam::{Exam, Golden, Share};
pub use http::{BaseUrl, Http, HttpWriter, INVALID_KEY, Price, Spend, SpendLimit};
pub use hub::{DatasetPart, Hub, Repository, Unchosen, data_files, is_offline};
pub use judge_prompt::{JudgeInput, JudgePrompt, JudgePromptSettings, Mode, OtherAnswer, Verdict};
pub use places::{IMAGE_PLACEHOLDER, ImagePlace, VIDEO_PLACEHOLDER, misfit};
pub use spec::{
    CriticSpec, LlavaRlhfSpec, ModelSpec, PromptedJudge, Replies, Role, SYSTEM, Scripted,
    SelfJudge, SqlReward, TEMPLATE, VisionLanguageSpec,
};
pub use training::{
    Checkpointing, DpoReport, DpoSettings, Example, LoraSettings, Loss, Mask, Newlines, Objective,
    Optimization, Optimizer, Part, RewardReport, RewardSettings, Schedule, SftExample, SftReport,
    SftSettings, Tower, TrainOn, Trained, TrainingAnswer,
};
pub use traits::{
    DpoTrainer, Emit, Finding, Judge, Listener, ModelError, ModelLoader, Opened, Policy,
    RewardTrainer, RowFault, Severity, SftTrainer, Trainer,
};
pub use types::{
    AnswerGroup, ChatPrompt, ChatRole, ChatTurn, Generation, JudgeScore, Layout, ModelTelemetry,
    Placement, Room, RowContext, Sampling, Stop, Visual, media_type,
};
