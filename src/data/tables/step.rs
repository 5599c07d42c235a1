//! Row types of training steps: metrics of each optimizer update, one kind per training method.

use super::row::rows;

rows! {
    /// One optimizer update of DPO. Means are over the pairs of the step, before the update.
    pub struct DpoStep: "step" => {
        /// Optimizer step of the stage, from 1.
        pub step: i32,
        /// Epoch over the pairs, from 1.
        pub epoch: i32,
        /// Mean DPO loss.
        pub loss: f64,
        /// Mean implicit reward of the chosen answers: beta (log p - log p_reference).
        pub rewards_chosen: f64,
        /// Mean implicit reward of the rejected answers.
        pub rewards_rejected: f64,
        /// Share of pairs with a higher chosen than rejected reward.
        pub accuracy: f64,
        /// Mean reward margin: `rewards_chosen - rewards_rejected`.
        pub margin: f64,
        /// Mean natural-log probability of the chosen answers.
        pub logps_chosen: f64,
        /// Mean natural-log probability of the rejected answers.
        pub logps_rejected: f64,
        /// Gradient norm (L2) before clipping.
        pub grad_norm: f64,
        /// Learning rate of this update.
        pub learning_rate: f64,
        /// Prompt and answer tokens processed by the decoder; a prompt counts once per pair.
        pub tokens: i64,
        /// Wall time of the step, in seconds.
        [measured] pub seconds: f64,
    }
}

rows! {
    /// One optimizer update of supervised fine-tuning. Means are over the target tokens of the
    /// step, before the update.
    pub struct SftStep: "sft_step" => {
        /// Optimizer step of the stage, from 1.
        pub step: i32,
        /// Epoch over the prompts, from 1.
        pub epoch: i32,
        /// Mean cross-entropy, in nats.
        pub loss: f64,
        /// Share of target tokens with the highest predicted probability.
        pub accuracy: f64,
        /// Gradient norm (L2) before clipping.
        pub grad_norm: f64,
        /// Learning rate of this update.
        pub learning_rate: f64,
        /// Tokens processed by the decoder, image tokens included.
        pub tokens: i64,
        /// Target tokens, which contribute to the loss.
        pub learned_tokens: i64,
        /// Wall time of the step, in seconds.
        [measured] pub seconds: f64,
    }
}

rows! {
    /// One optimizer update of a reward model. Means are over the pairs of the step, before the
    /// update.
    pub struct RewardStep: "reward_step" => {
        /// Optimizer step of the stage, from 1.
        pub step: i32,
        /// Epoch over the pairs, from 1.
        pub epoch: i32,
        /// Loss of the batch: mean over the pairs, plus the centering term.
        pub loss: f64,
        /// Mean reward of the chosen answers.
        pub reward_chosen: f64,
        /// Mean reward of the rejected answers.
        pub reward_rejected: f64,
        /// Share of pairs with a higher chosen than rejected reward.
        pub accuracy: f64,
        /// Mean reward margin: `reward_chosen - reward_rejected`.
        pub margin: f64,
        /// Gradient norm (L2) before clipping.
        pub grad_norm: f64,
        /// Learning rate of this update.
        pub learning_rate: f64,
        /// Tokens processed by the decoder, image tokens included.
        pub tokens: i64,
        /// Wall time of the step, in seconds.
        [measured] pub seconds: f64,
    }
}
