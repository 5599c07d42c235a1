//! Plain input and output types of models.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::places::ImagePlace;

/// An image as the encoded bytes of its file, or a video as its frames.
#[derive(Debug, Clone)]
pub struct Visual {
    /// SHA-256 of the bytes, in hex, or for a video of the ids of its frames; equal ids mean equal
    /// images.
    pub id: String,
    /// The bytes of the file (PNG, JPEG, …); none for a video.
    pub bytes: Arc<[u8]>,
    /// The frames of a video, in order; none for an image.
    pub frames: Vec<Visual>,
}

impl Visual {
    /// Returns an image.
    pub fn new(id: String, bytes: Arc<[u8]>) -> Self {
        Self {
            id,
            bytes,
            frames: Vec::new(),
        }
    }

    /// Returns a video of these frames.
    pub fn video(frames: Vec<Visual>) -> Self {
        let mut ids = Sha256::new();
        for frame in &frames {
            ids.update((frame.id.len() as u64).to_le_bytes());
            ids.update(&frame.id);
        }
        Self {
            id: hex::encode(ids.finalize()),
            bytes: [].into(),
            frames,
        }
    }

    pub fn is_video(&self) -> bool {
        !self.frames.is_empty()
    }

    /// Returns the images to show: the image itself, or the frames of a video.
    pub fn shown(&self) -> &[Self] {
        if self.is_video() {
            &self.frames
        } else {
            std::slice::from_ref(self)
        }
    }

    /// Returns the media type of the image, detected from its first bytes; `None` for a format that
    /// browsers and endpoints do not accept.
    pub fn media_type(&self) -> Option<&'static str> {
        media_type(&self.bytes)
    }
}

/// Returns the media type of encoded image bytes; see [`Visual::media_type`].
pub fn media_type(bytes: &[u8]) -> Option<&'static str> {
    Some(match bytes {
        [0x89, b'P', b'N', b'G', ..] => "image/png",
        [0xff, 0xd8, ..] => "image/jpeg",
        [b'G', b'I', b'F', ..] => "image/gif",
        [
            b'R',
            b'I',
            b'F',
            b'F',
            _,
            _,
            _,
            _,
            b'W',
            b'E',
            b'B',
            b'P',
            ..,
        ] => "image/webp",
        _ => return None,
    })
}

/// The layout of a LLaVA-OneVision checkpoint: names of tensors, config, tokenizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// The layout of transformers, 4.45 or later.
    Transformers,
    /// The layout of LLaVA-NeXT, as in the checkpoints of lmms-lab.
    LlavaNext,
}

/// The memory available to a model on its compute device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// True for GPU memory; false for the memory of the machine.
    pub on_gpu: bool,
    /// Bytes available for weights, KV cache and activations.
    pub bytes: u64,
    /// Bytes of the whole device.
    pub device: u64,
}

/// The compute device and dtype of a model, with the reason for them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// The name of the device: `the CPU`, `cuda:0 (NVIDIA H200)`.
    pub device: String,
    /// The dtype: `float32` or `bfloat16`.
    pub precision: &'static str,
    /// The reason, as a clause that completes "since …".
    pub reason: String,
}

/// The role of a chat turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChatRole {
    User,
    Assistant,
}

/// One turn of the conversation before the question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatTurn {
    pub role: ChatRole,
    pub text: String,
}

/// A question about images.
#[derive(Debug, Clone)]
pub struct ChatPrompt {
    /// The id of the prompt, for errors.
    pub id: String,
    pub images: Vec<Visual>,
    /// The places of the images in the texts, in the order of the conversation. None: all images
    /// stand before the user's first text, one line each.
    pub places: Vec<ImagePlace>,
    /// The system text; `None` for the model's default.
    pub system: Option<String>,
    pub turns: Vec<ChatTurn>,
    pub question: String,
    /// Captions of the image, for judges that use them.
    pub captions: Option<Vec<String>>,
    /// The reference answer, if one is known, for judges that compare with it.
    pub answer: Option<String>,
    /// Seed of the random numbers for this prompt's answers: token `n` of answer `i` is drawn with
    /// a number that depends only on (`seed`, `i`, `n`).
    pub seed: u64,
}

/// Sampling parameters.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Number of answers per prompt.
    pub count: usize,
    /// Sampling temperature; 0 is greedy decoding.
    pub temperature: f64,
    /// Top-p: sample from the smallest set of most likely tokens whose probabilities sum to at
    /// least this; 1 keeps all.
    pub top_p: f64,
    /// Top-k: sample from the k most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Min-p: keep tokens at least this share as likely as the most likely one; 0 keeps all.
    pub min_p: f64,
    /// Repetition penalty: divides positive logits (multiplies negative ones) of tokens that
    /// already occurred; 1 disables it.
    pub repetition_penalty: f64,
    /// Maximum length of an answer, in tokens, including the stop token.
    pub max_new_tokens: usize,
    /// Strings that end an answer.
    pub stop_strings: Vec<String>,
    /// Ids of tokens that end an answer, in addition to the model's own.
    pub stop_token_ids: Vec<i64>,
}

/// The reason why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The model sampled a stop token.
    Token,
    /// The text contained a stop string.
    String,
    /// The answer reached `max_new_tokens`.
    Length,
}

/// A sampled answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// The text without the stop token, up to the stop string if there is one.
    pub text: String,
    /// The tokens as sampled, including those of a stop string; the last one is a stop token if and
    /// only if `stop` is [`Stop::Token`].
    pub token_ids: Vec<i32>,
    /// Log-probabilities of the tokens: natural log of the softmax of the raw logits over the whole
    /// vocabulary, at temperature 1, in float32.
    pub token_logps: Vec<f32>,
    pub stop: Stop,
    /// The seed of the random numbers for this answer.
    pub seed: i64,
}

/// Values of a prompt's record that only judges use.
#[derive(Debug, Clone, Copy, Default)]
pub struct RowContext<'a> {
    /// The id of the record.
    pub id: Option<&'a str>,
    /// The kept columns of the record: their names and values.
    pub kept: &'a [(String, String)],
    /// The answer that the others are compared with, in place of the one that the judge's settings
    /// name.
    pub other: Option<&'a str>,
}

impl<'a> RowContext<'a> {
    /// Returns the value of a kept column.
    pub fn kept_value(&self, name: &str) -> Option<&'a str> {
        let mut kept = self.kept.iter();
        let (_, value) = kept.find(|(own, _)| own == name)?;
        Some(value)
    }
}

/// A prompt and the answers to score.
#[derive(Debug)]
pub struct AnswerGroup<'a> {
    pub prompt: &'a ChatPrompt,
    pub answers: Vec<&'a str>,
    /// Candidate numbers of the answers; empty if they have none.
    pub numbers: Vec<i32>,
    pub context: RowContext<'a>,
}

impl<'a> AnswerGroup<'a> {
    /// Returns answers without numbers to a prompt.
    pub fn new(prompt: &'a ChatPrompt, answers: Vec<&'a str>) -> Self {
        Self {
            prompt,
            answers,
            numbers: Vec::new(),
            context: RowContext::default(),
        }
    }
}

/// A judge's score of one answer. Higher is better.
#[derive(Debug, Clone, PartialEq)]
pub struct JudgeScore {
    pub reward: f32,
    /// The reply of a judge that replies in text.
    pub reply: Option<String>,
    /// For pairwise judges, the share of the other answers for which the verdict changes when the
    /// two answers are shown in the other order.
    pub flips: Option<f32>,
    /// The name of the verdict, for judges whose verdicts have names.
    pub label: Option<String>,
    /// The scores of the other answer and of this one, for judges that give both.
    pub scores: Option<[f32; 2]>,
    /// The reason why the reward is a substitute, if no verdict was readable.
    pub failure: Option<String>,
}

impl JudgeScore {
    /// Returns a score without a reply.
    pub fn of(reward: f32) -> Self {
        Self {
            reward,
            reply: None,
            flips: None,
            label: None,
            scores: None,
            failure: None,
        }
    }
}

/// Counters and timings of sampling or scoring.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModelTelemetry {
    /// Prompts processed.
    pub prompts: u64,
    /// Distinct images in the prompts.
    pub images: u64,
    /// Images that went through the vision tower.
    pub tower_passes: u64,
    /// Prompt tokens processed by the decoder, including image tokens.
    pub prompt_tokens: u64,
    /// Prompt tokens among these that were reused from the prefix cache, as the common prefix of
    /// several prompts about the same images.
    pub shared_tokens: u64,
    /// Answer tokens that were sampled, or read for scoring.
    pub answer_tokens: u64,
    /// Decoding steps; each adds one token to every answer of the batch.
    pub steps: u64,
    /// Answers summed over all decoding steps.
    pub step_rows: u64,
    /// Maximum number of answers decoded in one batch.
    pub rows_max: u64,
    /// Maximum number of prompt and answer tokens in the KV cache.
    pub tokens_max: u64,
    /// Retries after replies without a readable verdict.
    pub retries: u64,
    /// OOM retries, each of which halves these two limits.
    pub oom_retries: u64,
    /// Time for decoding and resizing images, in seconds; most of it runs in parallel to the
    /// network.
    pub seconds_images: f64,
    /// Time that the network waited for images, in seconds.
    pub seconds_waiting: f64,
    pub seconds_tower: f64,
    /// Prefill time (processing prompts), in seconds.
    pub seconds_prefill: f64,
    /// Decoding time (sampling or reading answers), in seconds.
    pub seconds_decode: f64,
}

impl ModelTelemetry {
    /// Adds the telemetry of another call; limits become the lower of the two.
    pub fn add(&mut self, other: &Self) {
        let least = |one: u64, other: u64| match (one, other) {
            (0, other) => other,
            (one, 0) => one,
            (one, other) => one.min(other),
        };
        *self = Self {
            prompts: self.prompts + other.prompts,
            images: self.images + other.images,
            tower_passes: self.tower_passes + other.tower_passes,
            prompt_tokens: self.prompt_tokens + other.prompt_tokens,
            shared_tokens: self.shared_tokens + other.shared_tokens,
            answer_tokens: self.answer_tokens + other.answer_tokens,
            steps: self.steps + other.steps,
            step_rows: self.step_rows + other.step_rows,
            rows_max: least(self.rows_max, other.rows_max),
            tokens_max: least(self.tokens_max, other.tokens_max),
            retries: self.retries + other.retries,
            oom_retries: self.oom_retries + other.oom_retries,
            seconds_images: self.seconds_images + other.seconds_images,
            seconds_waiting: self.seconds_waiting + other.seconds_waiting,
            seconds_tower: self.seconds_tower + other.seconds_tower,
            seconds_prefill: self.seconds_prefill + other.seconds_prefill,
            seconds_decode: self.seconds_decode + other.seconds_decode,
        };
    }
}
