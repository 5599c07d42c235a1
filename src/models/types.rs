//! The plain types that models take and give.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A picture as the bytes of its file.
#[derive(Debug, Clone)]
pub struct Picture {
    /// SHA-256 of the bytes, in hex; equal ids are equal pictures.
    pub id: String,
    /// The file's bytes (PNG, JPEG, …).
    pub bytes: Arc<[u8]>,
}

/// Who speaks in a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    User,
    Assistant,
}

/// One turn of the conversation before the question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    pub role: Role,
    pub text: String,
}

/// A question about pictures. The pictures stand before the first thing that the user says.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// Names the prompt in errors.
    pub id: String,
    pub pictures: Vec<Picture>,
    /// `None`: the model's usual system text.
    pub system: Option<String>,
    pub turns: Vec<Turn>,
    pub question: String,
    /// Descriptions of the picture, for judges that can use them.
    pub captions: Option<Vec<String>>,
    /// Seeds the random numbers of this prompt's answers: answer `i` draws its `n`-th token with a
    /// number that depends on (`seed`, `i`, `n`) and on nothing else.
    pub seed: u64,
}

/// How answers are drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Answers per prompt.
    pub count: usize,
    /// 0 means greedy.
    pub temperature: f64,
    /// The smallest set of most likely tokens whose probabilities sum to this; 1 keeps all.
    pub top_p: f64,
    /// The most likely tokens only; 0 keeps all.
    pub top_k: usize,
    /// Only tokens at least this share as likely as the most likely one; 0 keeps all.
    pub min_p: f64,
    /// Divides positive logits (multiplies negative ones) of tokens that occurred; 1 is off.
    pub repetition_penalty: f64,
    /// The longest answer, in tokens, the stop token included.
    pub max_new_tokens: usize,
    /// Texts that end an answer.
    pub stop_strings: Vec<String>,
    /// Tokens that end an answer, beside the model's own.
    pub stop_token_ids: Vec<i64>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The model chose a stop token.
    Token,
    /// The text held one of the stop strings.
    String,
    /// `max_new_tokens` was reached.
    Length,
}

/// One sampled answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// Without the stop token; up to the stop string, where there is one.
    pub text: String,
    /// As sampled, with the tokens of a stop string; ends in a stop token if and only if `stop` is
    /// [`Stop::Token`].
    pub token_ids: Vec<i32>,
    /// Natural log, raw logits, whole vocabulary, temperature 1, in float32.
    pub token_logps: Vec<f32>,
    pub stop: Stop,
    /// The seed that this answer's numbers came from.
    pub seed: i64,
}

/// One prompt and the answers to be scored.
#[derive(Debug)]
pub struct Group<'a> {
    pub prompt: &'a Prompt,
    pub answers: Vec<&'a str>,
}

/// A judge's opinion of one answer. Higher is better.
#[derive(Debug, Clone, PartialEq)]
pub struct Score {
    pub reward: f32,
    /// What a judge that writes wrote.
    pub reply: Option<String>,
}

/// What sampling or scoring some prompts took, and how much of it was shared.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Telemetry {
    /// Prompts that were read.
    pub prompts: u64,
    /// Distinct pictures that they show.
    pub pictures: u64,
    /// Pictures that went through the vision tower.
    pub tower_passes: u64,
    /// Tokens of prompts that the decoder read, pictures included.
    pub prompt_tokens: u64,
    /// Tokens of answers that were sampled, or read to be scored.
    pub answer_tokens: u64,
    /// Passes of growing answers through the decoder, a token of each.
    pub steps: u64,
    /// Answers in all steps, summed.
    pub step_rows: u64,
    /// Answers that may grow side by side.
    pub rows_max: u64,
    /// Tokens of prompts and answers that may be in memory at once.
    pub tokens_max: u64,
    /// How often these two were halved because memory ran out.
    pub halvings: u64,
    /// Decoding and resizing pictures, most of it beside the network.
    pub seconds_pictures: f64,
    /// The network waiting for pictures.
    pub seconds_waiting: f64,
    pub seconds_tower: f64,
    /// Reading prompts.
    pub seconds_prefill: f64,
    /// Sampling or reading answers.
    pub seconds_decode: f64,
}

/// An answer to train on.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub text: String,
    /// The tokens as sampled. `None`: `text` is tokenized and followed by the stop token.
    pub token_ids: Option<Vec<i32>>,
}

/// A pair to train on.
#[derive(Debug)]
pub struct Example<'a> {
    /// Names the pair in errors.
    pub id: &'a str,
    pub prompt: &'a Prompt,
    pub chosen: Answer,
    pub rejected: Answer,
    /// Log-probabilities of `chosen` and `rejected` under the reference; not needed by
    /// [`super::DpoLearner::reference_logps`] and reward models, needed by
    /// [`super::DpoLearner::step`].
    pub reference: Option<[f64; 2]>,
}

/// A conversation to learn answers from.
#[derive(Debug)]
pub struct Lesson<'a> {
    /// Names the conversation in errors.
    pub id: &'a str,
    /// Its earlier turns may hold answers, too.
    pub prompt: &'a Prompt,
    /// The answer to the question.
    pub answer: &'a str,
    pub learned: Learned,
}

/// Which answers of a conversation are learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Learned {
    /// Every turn of the assistant.
    #[default]
    All,
    /// Only the answer to the last question.
    Last,
}

/// What becomes of the vision tower while the rest is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Tower {
    /// It is trained with the rest.
    #[default]
    Train,
    /// It stays as it is.
    Freeze,
}

/// What all trainings have in common.
#[derive(Debug, Clone, PartialEq)]
pub struct Optimization {
    /// The highest learning rate, reached after warmup.
    pub learning_rate: f64,
    /// What the rate does after warmup.
    pub schedule: Schedule,
    /// Share of the updates in which the rate rises from 0.
    pub warmup_ratio: f64,
    /// Optimizer updates of the whole training.
    pub steps: usize,
    pub weight_decay: f64,
    /// AdamW's decay of the first and second moment.
    pub adam_betas: [f64; 2],
    pub adam_epsilon: f64,
    /// Gradients with a larger Euclidean norm are scaled down to it; 0 never clips.
    pub max_grad_norm: f64,
}

/// The learning rate after warmup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schedule {
    /// Falls to 0 along half a cosine.
    Cosine,
    /// Stays.
    Constant,
}

/// Which tokens of a pair count, by the conventions of several programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mask {
    /// The answer and its stop token: what the model says.
    #[default]
    Answer,
    /// As TRL with the chat template: the newline behind the stop token, too.
    Trl,
    /// As LLaVA-NeXT's DPO script: besides, `<|im_start|>` of every message and `<|im_end|>\n` of
    /// every question. Equal in both answers, they change what is logged but not the loss.
    LlavaNext,
}

/// Newlines between a picture and the text behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Newlines {
    /// As in sampling, and as LLaVA-OneVision was first trained.
    #[default]
    One,
    /// As LLaVA-NeXT's DPO script has it: two, each a token of its own.
    Two,
}

/// How a learner is trained with DPO.
#[derive(Debug, Clone, PartialEq)]
pub struct DpoSettings {
    /// DPO's beta: how strongly the reference holds the policy.
    pub beta: f64,
    pub mask: Mask,
    pub newlines: Newlines,
    pub optimization: Optimization,
}

/// How a learner is trained on answers.
#[derive(Debug, Clone, PartialEq)]
pub struct SftSettings {
    pub tower: Tower,
    pub optimization: Optimization,
}

/// How a reward model is trained.
#[derive(Debug, Clone, PartialEq)]
pub struct RewardSettings {
    /// Rank of a fresh adapter.
    pub rank: usize,
    /// A fresh adapter's product is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Weight of the term that keeps the mean reward near 0.
    pub centering: f64,
    /// Seeds the weights of a fresh adapter and head.
    pub seed: u64,
    pub optimization: Optimization,
}

/// What one optimizer update of DPO saw, before the update. Means are over the pairs of the batch.
#[derive(Debug, Clone, PartialEq)]
pub struct DpoReport {
    pub loss: f64,
    pub rewards_chosen: f64,
    pub rewards_rejected: f64,
    /// Share of pairs with a chosen reward above the rejected one.
    pub accuracy: f64,
    pub logps_chosen: f64,
    pub logps_rejected: f64,
    /// Before clipping.
    pub grad_norm: f64,
    pub learning_rate: f64,
    /// Tokens through the decoder.
    pub tokens: u64,
}

/// What one optimizer update on answers saw, before the update.
#[derive(Debug, Clone, PartialEq)]
pub struct SftReport {
    /// Mean cross entropy of the learned tokens of the batch, natural log.
    pub loss: f64,
    /// Share of the learned tokens that were the likeliest.
    pub accuracy: f64,
    /// Before clipping.
    pub grad_norm: f64,
    pub learning_rate: f64,
    /// Tokens through the decoder.
    pub tokens: u64,
    /// Those of them that were learned.
    pub learned_tokens: u64,
}

/// What one optimizer update of a reward model saw, before the update. Means are over the pairs.
#[derive(Debug, Clone, PartialEq)]
pub struct RewardReport {
    pub loss: f64,
    pub reward_chosen: f64,
    pub reward_rejected: f64,
    /// Share of pairs with a chosen reward above the rejected one.
    pub accuracy: f64,
    /// Before clipping.
    pub grad_norm: f64,
    pub learning_rate: f64,
    /// Tokens through the decoder.
    pub tokens: u64,
}
