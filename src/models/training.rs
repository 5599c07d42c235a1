//! What trainings are given, how they are to go about it, and what they report.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ChatPrompt;

/// An answer to train on.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingAnswer {
    pub text: String,
    /// The tokens as sampled. `None`: `text` is tokenized and followed by the stop token.
    pub token_ids: Option<Vec<i32>>,
}

/// A pair to train on.
#[derive(Debug)]
pub struct Example<'a> {
    /// Names the pair in errors.
    pub id: &'a str,
    pub prompt: &'a ChatPrompt,
    pub chosen: TrainingAnswer,
    pub rejected: TrainingAnswer,
    /// Log-probabilities of `chosen` and `rejected` under the reference; not needed by
    /// [`super::DpoTrainer::reference_logps`] and reward models, needed by
    /// [`super::DpoTrainer::step`].
    pub reference: Option<[f64; 2]>,
}

/// A conversation to learn answers from.
#[derive(Debug)]
pub struct SftExample<'a> {
    /// Names the conversation in errors.
    pub id: &'a str,
    /// Its earlier turns may hold answers, too.
    pub prompt: &'a ChatPrompt,
    /// The answer to the question.
    pub answer: &'a str,
    pub learned: TrainOn,
}

/// Which answers of a conversation are learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TrainOn {
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
    /// Updates in which the rate rises from 0.
    pub warmup_steps: usize,
    /// Optimizer updates of the whole training.
    pub steps: usize,
    pub optimizer: Optimizer,
    pub weight_decay: f64,
    /// AdamW's decay of the first and second moment.
    pub adam_betas: [f64; 2],
    pub adam_epsilon: f64,
    /// Gradients with a larger Euclidean norm are scaled down to it; 0 never clips.
    pub max_grad_norm: f64,
}

/// The learning rate after warmup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Falls to 0 along half a cosine.
    #[default]
    Cosine,
    /// Falls to 0 in a straight line.
    Linear,
    /// Stays.
    Constant,
}

/// What turns gradients into updates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Optimizer {
    /// AdamW with its two moments in float32: eight bytes a weight.
    #[default]
    Adamw,
    /// AdamW with its two moments in eight bits each, block by block: two bytes a weight.
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
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

/// A loss of a pair, by the name that TRL has for it. With c and r for how much likelier the policy
/// finds chosen and rejected than the reference (log p - log p_ref), d for c - r, s for the sigmoid,
/// L for tokens that count, and e for `label_smoothing`:
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// DPO: -(1 - e) log s(beta d) - e log s(-beta d); arXiv 2305.18290, equation 7, and 2310.12036
    /// for e. TRL from 1.0 on takes no e here, LLaVA-NeXT and TRL before do.
    Sigmoid,
    /// SLiC: max(0, 1 - beta d); arXiv 2305.10425.
    Hinge,
    /// IPO: (c / L_c - r / L_r - 1 / (2 beta))^2; arXiv 2310.12036, with means over tokens as its
    /// authors meant it. TRL and LLaVA-NeXT agree, but LLaVA-NeXT's mask counts other tokens.
    Ipo,
    /// EXO on pairs: KL(s(beta d), s(-beta d) || 1 - e, e); arXiv 2402.00856, equation 16. Needs e.
    ExoPair,
    /// NCA: -log s(beta c) - log s(-beta c) / 2 - log s(-beta r) / 2; arXiv 2402.05369.
    NcaPair,
    /// Robust DPO: (-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e); arXiv 2403.00409.
    Robust,
    /// BCO without its moving mean, as in TRL from 1.0 on: -log s(beta c) - log s(-beta r);
    /// arXiv 2404.04656.
    BcoPair,
    /// SPPO with hard labels: (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2; arXiv 2405.00675.
    SppoHard,
    /// Distributional alignment by optimal transport: as `sigmoid`, of the batch's log p_c - log p_r
    /// and of its references', each sorted; arXiv 2406.05882.
    Aot,
    /// APO-zero: 1 - s(beta c) + s(beta r); arXiv 2408.06266, equation 7.
    ApoZero,
    /// APO-down: s(beta c) + 1 - s(beta d); arXiv 2408.06266, equation 8.
    ApoDown,
    /// The mean of -log p of the chosen answer's tokens, pair by pair. TRL and LLaVA-NeXT take the mean
    /// over the tokens of a micro-batch, which is the same where that is one pair.
    Sft,
    /// `sigmoid` of means over tokens: -log s(beta (c / L_c - r / L_r)).
    SigmoidNorm,
    /// SimPO: -log s(beta (log p_c / L_c - log p_r / L_r) - gamma), smoothed by e as `sigmoid`, with
    /// `simpo_gamma` for gamma; arXiv 2405.14734, equation 6. Knows no reference.
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

    /// Whether it asks what the reference thinks.
    pub fn has_reference(self) -> bool {
        !matches!(self, Self::Sft | Self::Simpo)
    }

    /// Whether `label_smoothing` has a part in it.
    pub fn has_smoothing(self) -> bool {
        use Loss::{Aot, ExoPair, Robust, Sigmoid, Simpo};
        matches!(self, Sigmoid | ExoPair | Robust | Aot | Simpo)
    }
}

/// What is made small: a weighted sum of losses.
#[derive(Debug, Clone, PartialEq)]
pub struct Objective {
    pub terms: Vec<(Loss, f64)>,
    /// DPO's beta: how strongly the reference holds the policy.
    pub beta: f64,
    /// The share of pairs that are assumed to be the wrong way round.
    pub label_smoothing: f64,
    /// The margin that [`Loss::Simpo`] asks for.
    pub simpo_gamma: f64,
}

impl Objective {
    /// One loss without smoothing.
    pub fn of(loss: Loss, beta: f64) -> Self {
        Self {
            terms: vec![(loss, 1.0)],
            beta,
            label_smoothing: 0.0,
            simpo_gamma: 0.0,
        }
    }
}

/// A part of a policy's network, as LLaVA-NeXT's `mm_tunable_parts` divides it.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    VisionTower,
    /// What turns the tower's features into the decoder's.
    Projector,
    /// The embedding that ends a row of a picture.
    Newline,
    /// The decoder with its embeddings and head.
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

/// A low-rank adapter that is trained in the place of weights.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraSettings {
    pub rank: usize,
    /// The adapter's product is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Share of the adapter's inputs that is set to zero at random in each pass.
    pub dropout: f64,
    /// Linear layers of the language model, such as `q_proj`.
    pub targets: Vec<String>,
    /// Seeds the weights of a fresh adapter, and what is dropped.
    pub seed: u64,
}

/// What of a policy is trained.
#[derive(Debug, Clone, PartialEq)]
pub enum Trained {
    /// These parts, each with a learning rate of its own or the training's.
    Parts(Vec<(Part, Option<f64>)>),
    /// An adapter beside the language model's linear layers.
    Lora(LoraSettings),
}

impl Trained {
    /// Everything, at the training's learning rate.
    pub fn all() -> Self {
        Self::Parts(Part::ALL.map(|part| (part, None)).to_vec())
    }
}

/// When activations are computed again for the gradients instead of being remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Checkpointing {
    /// When remembering those of a batch's largest pair would not fit into memory.
    #[default]
    Auto,
    Always,
    Never,
}

/// How a learner is trained with DPO.
#[derive(Debug, Clone, PartialEq)]
pub struct DpoSettings {
    pub objective: Objective,
    pub mask: Mask,
    pub newlines: Newlines,
    pub trained: Trained,
    pub checkpointing: Checkpointing,
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
