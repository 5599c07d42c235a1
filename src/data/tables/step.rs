//! Steps: what each optimizer update of a training stage saw, a kind for each way to train.

use super::row::rows;

rows! {
    /// One optimizer update of DPO. Means are over the pairs of the step, before the update.
    pub struct DpoStep: "step" => {
        /// 1 for the first update of the stage.
        pub step: i32,
        /// The pass over the pairs, from 1.
        pub epoch: i32,
        /// Mean DPO loss.
        pub loss: f64,
        /// Mean of beta (log p - log p_reference) of the chosen answers.
        pub rewards_chosen: f64,
        /// The same of the rejected answers.
        pub rewards_rejected: f64,
        /// Share of pairs whose chosen reward is above the rejected one.
        pub accuracy: f64,
        /// Mean of `rewards_chosen - rewards_rejected`.
        pub margin: f64,
        /// Mean log-probability of the chosen answers.
        pub logps_chosen: f64,
        /// Mean log-probability of the rejected answers.
        pub logps_rejected: f64,
        /// Euclidean norm of the gradient before clipping.
        pub grad_norm: f64,
        /// The learning rate of this update.
        pub learning_rate: f64,
        /// Tokens of prompts and answers that went through the decoder; a prompt counts once a pair.
        pub tokens: i64,
        /// Wall time of the step.
        [measured] pub seconds: f64,
    }
}

rows! {
    /// One optimizer update on answers. Means are over the learned tokens of the step, before the
    /// update.
    pub struct SftStep: "sft_step" => {
        /// 1 for the first update of the stage.
        pub step: i32,
        /// The pass over the prompts, from 1.
        pub epoch: i32,
        /// Mean cross entropy, natural log.
        pub loss: f64,
        /// Share of the learned tokens that were the likeliest.
        pub accuracy: f64,
        /// Euclidean norm of the gradient before clipping.
        pub grad_norm: f64,
        /// The learning rate of this update.
        pub learning_rate: f64,
        /// Tokens that went through the decoder, those of pictures included.
        pub tokens: i64,
        /// Those of them that were learned.
        pub learned_tokens: i64,
        /// Wall time of the step.
        [measured] pub seconds: f64,
    }
}

rows! {
    /// One optimizer update of a reward model. Means are over the pairs of the step, before the
    /// update.
    pub struct RewardStep: "reward_step" => {
        /// 1 for the first update of the stage.
        pub step: i32,
        /// The pass over the pairs, from 1.
        pub epoch: i32,
        /// The loss of the batch: its mean over the pairs, and the centering term.
        pub loss: f64,
        /// Mean reward of the chosen answers.
        pub reward_chosen: f64,
        /// Mean reward of the rejected answers.
        pub reward_rejected: f64,
        /// Share of pairs whose chosen answer has the higher reward.
        pub accuracy: f64,
        /// `reward_chosen - reward_rejected`.
        pub margin: f64,
        /// Euclidean norm of the gradient before clipping.
        pub grad_norm: f64,
        /// The learning rate of this update.
        pub learning_rate: f64,
        /// Tokens that went through the decoder, those of pictures included.
        pub tokens: i64,
        /// Wall time of the step.
        [measured] pub seconds: f64,
    }
}
