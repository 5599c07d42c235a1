//! The plain types that models take and give.

use std::sync::Arc;

/// A picture as the bytes of its file.
#[derive(Debug, Clone)]
pub struct EncodedImage {
    /// SHA-256 of the bytes, in hex; equal ids are equal pictures.
    pub id: String,
    /// The file's bytes (PNG, JPEG, …).
    pub bytes: Arc<[u8]>,
}

impl EncodedImage {
    /// What browsers and endpoints call its format, by its first bytes; `None` for one that they do not
    /// take.
    pub fn media_type(&self) -> Option<&'static str> {
        media_type(&self.bytes)
    }
}

/// See [`EncodedImage::media_type`].
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

/// How a LLaVA-OneVision checkpoint is laid out: names of tensors, config, tokenizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// As transformers reads it, 4.45 or later.
    Transformers,
    /// As LLaVA-NeXT reads it; the checkpoints of lmms-lab.
    LlavaNext,
}

/// Where a model computes, and what it may take there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// On a GPU; else in the memory of the machine.
    pub on_gpu: bool,
    /// Bytes that weights and what is computed at once may take.
    pub bytes: u64,
}

/// On which device a model computes, in which precision, and why there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// `the CPU`, `cuda:0 (NVIDIA H200)`.
    pub device: String,
    /// `float32` or `bfloat16`.
    pub precision: &'static str,
    /// Completes "since …".
    pub reason: String,
}

/// Who speaks in a turn.
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

/// A question about pictures. The pictures stand before the first thing that the user says.
#[derive(Debug, Clone)]
pub struct ChatPrompt {
    /// Names the prompt in errors.
    pub id: String,
    pub images: Vec<EncodedImage>,
    /// `None`: the model's usual system text.
    pub system: Option<String>,
    pub turns: Vec<ChatTurn>,
    pub question: String,
    /// Descriptions of the picture, for judges that can use them.
    pub captions: Option<Vec<String>>,
    /// The true or reference answer, if one is known, for judges that compare with it.
    pub answer: Option<String>,
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
pub struct AnswerGroup<'a> {
    pub prompt: &'a ChatPrompt,
    pub answers: Vec<&'a str>,
    /// The answers' numbers among the candidates of the prompt; empty where they have none.
    pub numbers: Vec<i32>,
}

/// A judge's opinion of one answer. Higher is better.
#[derive(Debug, Clone, PartialEq)]
pub struct JudgeScore {
    pub reward: f32,
    /// What a judge that writes wrote.
    pub reply: Option<String>,
    /// Share of the other answers about which it says something else when the two are shown in the
    /// other order, where it sees two at once.
    pub flips: Option<f32>,
}

/// What sampling or scoring some prompts took, and how much of it was shared.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModelTelemetry {
    /// Prompts that were read.
    pub prompts: u64,
    /// Distinct pictures that they show.
    pub images: u64,
    /// Pictures that went through the vision tower.
    pub tower_passes: u64,
    /// Tokens of prompts that the decoder read, pictures included.
    pub prompt_tokens: u64,
    /// Those of them that were not read again, being the beginning of several prompts about the same
    /// pictures.
    pub shared_tokens: u64,
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
    /// Replies that could not be read and were asked for again.
    pub retries: u64,
    /// How often these two were halved because memory ran out.
    pub oom_retries: u64,
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

impl ModelTelemetry {
    /// Adds what another call took; of what is a limit, the lesser one.
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
            seconds_pictures: self.seconds_pictures + other.seconds_pictures,
            seconds_waiting: self.seconds_waiting + other.seconds_waiting,
            seconds_tower: self.seconds_tower + other.seconds_tower,
            seconds_prefill: self.seconds_prefill + other.seconds_prefill,
            seconds_decode: self.seconds_decode + other.seconds_decode,
        };
    }
}
