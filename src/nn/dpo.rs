//! Direct preference optimization: log-probabilities and the loss.
//!
//! Rafailov et al. 2023, *Direct Preference Optimization: Your Language Model is Secretly a Reward
//! Model*, arXiv 2305.18290. The policy itself is the reward model: an answer's implicit reward is
//! how much likelier the policy finds it than the reference does, times beta.

use tch::{Kind, Tensor};

/// Natural-log probabilities of tokens: `logits` (`[tokens, vocab]`, float32) at the positions that
/// predict them, `ids` (`[tokens]`, int64) as they then came. Gives `[tokens]`, float32.
pub fn token_logps(logits: &Tensor, ids: &Tensor) -> Tensor {
    let chosen = logits.gather(-1, &ids.unsqueeze(-1), false).squeeze_dim(-1);
    chosen - logits.logsumexp([-1i64].as_slice(), false)
}

/// What one pair gives.
#[derive(Debug)]
pub struct PairLoss {
    /// The loss of the pair, a scalar in float64, with its gradient.
    pub loss: Tensor,
    /// beta (log p - log p_reference) of the chosen answer.
    pub reward_chosen: f64,
    /// The same of the rejected answer.
    pub reward_rejected: f64,
}

/// The sigmoid loss of one pair, equation 7 of the paper:
/// `-log sigmoid(beta [(log p_c - log ref_c) - (log p_r - log ref_r)])`.
///
/// `logps` are the policy's log-probabilities of the chosen and the rejected answer, scalars;
/// `reference` the same under the reference.
pub fn dpo_loss(logps: [&Tensor; 2], reference: [f64; 2], beta: f64) -> PairLoss {
    let reward = |side: usize| (logps[side].to_kind(Kind::Double) - reference[side]) * beta;
    let (chosen, rejected) = (reward(0), reward(1));
    PairLoss {
        loss: -(&chosen - &rejected).log_sigmoid(),
        reward_chosen: chosen.double_value(&[]),
        reward_rejected: rejected.double_value(&[]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Policy: log p_c = -10, log p_r = -12; reference: -11, -11.5; beta 0.1. Then the rewards are
    /// 0.1 and -0.05, the loss is log(1 + e^-0.15) and its slope along log p_c is
    /// -0.1 sigmoid(-0.15).
    #[test]
    fn the_loss_is_what_the_paper_says_by_hand() {
        let chosen = Tensor::from_slice(&[-10.0f64])
            .squeeze()
            .set_requires_grad(true);
        let rejected = Tensor::from_slice(&[-12.0f64])
            .squeeze()
            .set_requires_grad(true);
        let pair = dpo_loss([&chosen, &rejected], [-11.0, -11.5], 0.1);
        assert!((pair.reward_chosen - 0.1).abs() < 1e-12);
        assert!((pair.reward_rejected + 0.05).abs() < 1e-12);
        let expected = (-0.15f64).exp().ln_1p();
        assert!((pair.loss.double_value(&[]) - expected).abs() < 1e-12);
        pair.loss.backward();
        let slope = 0.1 / (1.0 + 0.15f64.exp());
        assert!((chosen.grad().double_value(&[]) + slope).abs() < 1e-12);
        assert!((rejected.grad().double_value(&[]) - slope).abs() < 1e-12);
    }

    #[test]
    fn a_policy_that_equals_its_reference_loses_log_two() {
        let logp = Tensor::from_slice(&[-300.25f32]).squeeze();
        let pair = dpo_loss([&logp, &logp], [-300.25, -300.25], 0.7);
        assert!((pair.loss.double_value(&[]) - std::f64::consts::LN_2).abs() < 1e-12);
    }

    #[test]
    fn log_probabilities_of_all_tokens_sum_to_one() {
        let logits = Tensor::from_slice(&[0.5f32, -1.0, 40.0]).expand([3, 3], false);
        let logps = token_logps(&logits, &Tensor::from_slice(&[0i64, 1, 2]));
        assert!((logps.exp().sum(Kind::Double).double_value(&[]) - 1.0).abs() < 1e-6);
        assert!((logps.double_value(&[0]) + 39.5).abs() < 1e-5);
    }
}
