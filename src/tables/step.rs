//! Steps: what each optimizer update of a training stage saw.

use super::row::rows;

rows! {
    /// One optimizer update. Means are over the pairs of the step, before the update.
    pub struct Step: "step" => {
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
