//! Inputs, settings and metrics of training.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ChatPrompt;

/// An answer in a training example.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingAnswer {
    pub text: String,
    /// The token ids as sampled. `None`: `text` is tokenized and a stop token is appended.
    pub token_ids: Option<Vec<i32>>,
}

/// A preference pair.
#[derive(Debug)]
pub struct Example<'a> {
    /// The id of the pair, for errors.
    pub id: &'a str,
    pub prompt: &'a ChatPrompt,
    pub chosen: TrainingAnswer,
    pub rejected: TrainingAnswer,
    /// Log-probabilities of `chosen` and `rejected` under the reference model. Required by
    /// [`super::DpoTrainer::step`]; not used by [`super::DpoTrainer::reference_logps`] and reward
    /// models.
    pub reference: Option<[f64; 2]>,
}

/// An SFT example: a conversation and its final answer.
#[derive(Debug)]
pub struct SftExample<'a> {
    /// The id of the conversation, for errors.
    pub id: &'a str,
    /// The prompt; its earlier turns may contain answers as well.
    pub prompt: &'a ChatPrompt,
    /// The answer to the final question.
    pub answer: &'a str,
    pub learned: TrainOn,
}

/// The assistant turns of a conversation that contribute to the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TrainOn {
    /// Every assistant turn.
    #[default]
    All,
    /// Only the answer to the final question.
    Last,
}

/// Treatment of the vision tower in training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Tower {
    /// The vision tower is trained with the rest of the model.
    #[default]
    Train,
    /// The vision tower is frozen.
    Freeze,
}

/// Optimizer settings common to all training stages.
#[derive(Debug, Clone, PartialEq)]
pub struct Optimization {
    /// Peak learning rate, reached after warmup.
    pub learning_rate: f64,
    /// Learning rate schedule after warmup.
    pub schedule: Schedule,
    /// Optimizer updates over which the learning rate rises linearly from 0.
    pub warmup_steps: usize,
    /// Total number of optimizer updates.
    pub steps: usize,
    pub optimizer: Optimizer,
    pub weight_decay: f64,
    /// AdamW's decay rates of the first and second moment.
    pub adam_betas: [f64; 2],
    pub adam_epsilon: f64,
    /// Maximum Euclidean norm of the gradients; larger ones are scaled down. 0 disables clipping.
    pub max_grad_norm: f64,
}

/// Learning rate schedule after warmup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Cosine decay to 0 (half a cosine).
    #[default]
    Cosine,
    /// Linear decay to 0.
    Linear,
    /// Constant learning rate.
    Constant,
}

/// The optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Optimizer {
    /// AdamW with both moments in float32: 8 bytes of optimizer state per weight.
    #[default]
    Adamw,
    /// AdamW with both moments quantized block-wise to 8 bits: 2 bytes of optimizer state per
    /// weight.
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
}

/// The tokens of a pair that contribute to its log-probabilities, following the convention of one
/// of several programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mask {
    /// The answer and its stop token, which is what the model generates.
    #[default]
    Answer,
    /// As TRL with the chat template: also the newline after the stop token.
    Trl,
    /// As LLaVA-NeXT's DPO script: also the `<|im_start|>` of every message and the
    /// `<|im_end|>\n` of every question. These are equal in both answers, so they change logged
    /// values but not the loss.
    LlavaNext,
}

/// Newlines between an image and the text after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Newlines {
    /// One newline, as in sampling and in the original training of LLaVA-OneVision.
    #[default]
    One,
    /// Two newlines, each a token of its own, as in LLaVA-NeXT's DPO script.
    Two,
}

/// A preference loss, by TRL's name for it. Notation: c and r are the log-probability ratios log p
/// - log p_ref between policy and reference of the chosen and the rejected answer, d is c - r, s is
/// the sigmoid, L is the number of tokens in the mask, and e is `label_smoothing`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// DPO: -(1 - e) log s(beta d) - e log s(-beta d); arXiv 2305.18290, equation 7, and 2310.12036
    /// for e. TRL before 1.0 and LLaVA-NeXT support e here; TRL from 1.0 on does not.
    Sigmoid,
    /// SLiC: max(0, 1 - beta d); arXiv 2305.10425.
    Hinge,
    /// IPO: (c / L_c - r / L_r - 1 / (2 beta))^2; arXiv 2310.12036, with means over tokens as its
    /// authors intended. TRL and LLaVA-NeXT agree, except that LLaVA-NeXT's mask counts other
    /// tokens.
    Ipo,
    /// EXO for pairs: KL(s(beta d), s(-beta d) || 1 - e, e); arXiv 2402.00856, equation 16.
    /// Requires e.
    ExoPair,
    /// NCA: -log s(beta c) - log s(-beta c) / 2 - log s(-beta r) / 2; arXiv 2402.05369.
    NcaPair,
    /// Robust DPO: (-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e); arXiv 2403.00409.
    Robust,
    /// BCO without its moving average, as in TRL from 1.0 on: -log s(beta c) - log s(-beta r);
    /// arXiv 2404.04656.
    BcoPair,
    /// SPPO with hard labels: (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2; arXiv 2405.00675.
    SppoHard,
    /// AOT (distributional alignment by optimal transport): `sigmoid` applied to the batch's values
    /// of log p_c - log p_r and of the same under the reference, each sorted; arXiv 2406.05882.
    Aot,
    /// APO-zero: 1 - s(beta c) + s(beta r); arXiv 2408.06266, equation 7.
    ApoZero,
    /// APO-down: s(beta c) + 1 - s(beta d); arXiv 2408.06266, equation 8.
    ApoDown,
    /// SFT: the mean of -log p over the tokens of the chosen answer, per pair. TRL and LLaVA-NeXT
    /// average over all tokens of a micro-batch, which is the same if it holds one pair.
    Sft,
    /// `sigmoid` on per-token means: -log s(beta (c / L_c - r / L_r)).
    SigmoidNorm,
    /// SimPO: -log s(beta (log p_c / L_c - log p_r / L_r) - gamma), smoothed by e as in `sigmoid`,
    /// with gamma from `simpo_gamma`; arXiv 2405.14734, equation 6. Uses no reference.
    Simpo,
}

impl Loss {
    pub const ALL: [Self; 14] = [
        Self::Sigmoid,
        Self::Hinge,
        Self::Ipo,
        Self::ExoPair,
        Self::NcaPair,
        Self::Robust,
        Self::BcoPair,
        Self::SppoHard,
        Self::Aot,
        Self::ApoZero,
        Self::ApoDown,
        Self::Sft,
        Self::SigmoidNorm,
        Self::Simpo,
    ];

    /// True if the loss uses the reference model.
    pub fn has_reference(self) -> bool {
        !matches!(self, Self::Sft | Self::Simpo)
    }

    /// True if the loss uses `label_smoothing`.
    pub fn has_smoothing(self) -> bool {
        use Loss::{Aot, ExoPair, Robust, Sigmoid, Simpo};
        matches!(self, Sigmoid | ExoPair | Robust | Aot | Simpo)
    }
}

/// The training objective: a weighted sum of losses.
#[derive(Debug, Clone, PartialEq)]
pub struct Objective {
    pub terms: Vec<(Loss, f64)>,
    /// DPO's beta, the strength of the regularization toward the reference.
    pub beta: f64,
    /// Assumed share of pairs whose labels are flipped.
    pub label_smoothing: f64,
    /// Target margin of [`Loss::Simpo`].
    pub simpo_gamma: f64,
}

impl Objective {
    /// Returns the objective of a single loss without label smoothing.
    pub fn of(loss: Loss, beta: f64) -> Self {
        Self {
            terms: vec![(loss, 1.0)],
            beta,
            label_smoothing: 0.0,
            simpo_gamma: 0.0,
        }
    }
}

/// A part of a policy's network, divided as in LLaVA-NeXT's `mm_tunable_parts`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    VisionTower,
    /// The projector from vision features to decoder inputs.
    Projector,
    /// The newline embedding at the end of each row of image features.
    Newline,
    /// The decoder, including its embeddings and head.
    LanguageModel,
}

impl Part {
    pub const ALL: [Self; 4] = [
        Self::VisionTower,
        Self::Projector,
        Self::Newline,
        Self::LanguageModel,
    ];
}

/// Settings of a LoRA adapter that is trained in place of the full weights.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraSettings {
    pub rank: usize,
    /// LoRA alpha: the adapter's output is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Dropout on the adapter's inputs, as a share from 0 to 1.
    pub dropout: f64,
    /// Names of the linear layers of the language model that get an adapter, such as `q_proj`.
    pub targets: Vec<String>,
    /// Seed for the initial weights of a new adapter and for dropout.
    pub seed: u64,
}

/// The weights that a training updates.
#[derive(Debug, Clone, PartialEq)]
pub enum Trained {
    /// These parts, each with its own learning rate or, with `None`, the training's.
    Parts(Vec<(Part, Option<f64>)>),
    /// A LoRA adapter on the language model's linear layers.
    Lora(LoraSettings),
}

impl Trained {
    /// All parts, at the training's learning rate.
    pub fn all() -> Self {
        Self::Parts(Part::ALL.map(|part| (part, None)).to_vec())
    }
}

/// Use of activation checkpointing: recomputing activations in the backward pass to save memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Checkpointing {
    /// Only if the saved activations of the largest pair in a batch would not fit in memory.
    #[default]
    Auto,
    Always,
    Never,
}

/// Settings of DPO training.
#[derive(Debug, Clone, PartialEq)]
pub struct DpoSettings {
    pub objective: Objective,
    pub mask: Mask,
    pub newlines: Newlines,
    pub trained: Trained,
    pub checkpointing: Checkpointing,
    pub optimization: Optimization,
}

/// Settings of SFT.
#[derive(Debug, Clone, PartialEq)]
pub struct SftSettings {
    pub tower: Tower,
    pub optimization: Optimization,
}

/// Settings of reward model training.
#[derive(Debug, Clone, PartialEq)]
pub struct RewardSettings {
    /// Rank of a new adapter.
    pub rank: usize,
    /// LoRA alpha of a new adapter: its output is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Weight of the centering term, which keeps the mean reward near 0.
    pub centering: f64,
    /// Seed for the initial weights of a new adapter and reward head.
    pub seed: u64,
    pub optimization: Optimization,
}

/// Metrics of one DPO update, computed before it. Means are over the pairs of the batch.
#[derive(Debug, Clone, PartialEq)]
pub struct DpoReport {
    pub loss: f64,
    pub rewards_chosen: f64,
    pub rewards_rejected: f64,
    /// Share of pairs whose chosen reward is above the rejected one.
    pub accuracy: f64,
    pub logps_chosen: f64,
    pub logps_rejected: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    pub learning_rate: f64,
    /// Tokens processed by the decoder.
    pub tokens: u64,
}

/// Metrics of one SFT update, computed before it.
#[derive(Debug, Clone, PartialEq)]
pub struct SftReport {
    /// Mean cross entropy of the batch's target tokens, in nats.
    pub loss: f64,
    /// Share of target tokens that were the most likely token.
    pub accuracy: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    pub learning_rate: f64,
    /// Tokens processed by the decoder.
    pub tokens: u64,
    /// Tokens that contributed to the loss.
    pub learned_tokens: u64,
}

/// Metrics of one reward model update, computed before it. Means are over the pairs of the batch.
#[derive(Debug, Clone, PartialEq)]
pub struct RewardReport {
    pub loss: f64,
    pub reward_chosen: f64,
    pub reward_rejected: f64,
    /// Share of pairs whose chosen reward is above the rejected one.
    pub accuracy: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    pub learning_rate: f64,
    /// Tokens processed by the decoder.
    pub tokens: u64,
}
