//! Preference losses: log-probabilities of answers, and the DPO loss and its variants.
//!
//! Rafailov et al. 2023, *Direct Preference Optimization: Your Language Model is Secretly a Reward
//! Model*, arXiv 2305.18290. The policy itself is the reward model: the implicit reward of an
//! answer is beta times the difference of its log-probabilities under the policy and the reference.
//! Other losses replace the paper's function by other functions of the same numbers.
//!
//! A loss depends on a pair through two log-probabilities, so its gradient has two components. They
//! are computed here in float64 along with the value ([`Dual`]); the network only backpropagates
//! them.

use std::ops::{Add, Mul, Neg, Sub};

use tch::Tensor;

use ovchat_models::{Loss, Objective};

/// Log-probabilities (natural) of tokens: `logits` (`[tokens, vocab]`, float32) are those that
/// predict the tokens `ids` (`[tokens]`, int64). Returns `[tokens]`, float32.
pub fn token_logps(logits: &Tensor, ids: &Tensor) -> Tensor {
    let chosen = logits.gather(-1, &ids.unsqueeze(-1), false).squeeze_dim(-1);
    chosen - logits.logsumexp([-1i64].as_slice(), false)
}

/// The inputs of a loss for one pair; each array holds the chosen answer's value, then the rejected
/// one's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairLogps {
    /// Log-probabilities under the policy.
    pub policy: [f64; 2],
    /// Log-probabilities under the reference; 0 without one.
    pub reference: [f64; 2],
    /// The numbers of counted tokens.
    pub tokens: [f64; 2],
}

impl PairLogps {
    /// The implicit rewards of both answers, beta (log p - log p_reference).
    pub fn rewards(&self, beta: f64) -> [f64; 2] {
        [0, 1].map(|side| beta * (self.policy[side] - self.reference[side]))
    }
}

/// The loss of a pair and its partial derivatives with respect to the two log-probabilities of the
/// policy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairLoss {
    pub loss: f64,
    pub slopes: [f64; 2],
}

/// A number and its partial derivatives with respect to the policy's log-probabilities of chosen
/// and rejected.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Dual {
    value: f64,
    slopes: [f64; 2],
}

impl Dual {
    fn constant(value: f64) -> Self {
        let slopes = [0.0; 2];
        Self { value, slopes }
    }

    /// Applies a function, given its value and its derivative at this number.
    fn map(self, value: f64, slope: f64) -> Self {
        let slopes = self.slopes.map(|own| own * slope);
        Self { value, slopes }
    }

    fn sigmoid(self) -> Self {
        let value = sigmoid(self.value);
        self.map(value, value * sigmoid(-self.value))
    }

    /// log sigmoid(x) = -log(1 + e^-x), without overflow.
    fn log_sigmoid(self) -> Self {
        let value = self.value.min(0.0) - (-self.value.abs()).exp().ln_1p();
        self.map(value, sigmoid(-self.value))
    }

    fn square(self) -> Self {
        self.map(self.value * self.value, 2.0 * self.value)
    }

    fn relu(self) -> Self {
        self.map(self.value.max(0.0), f64::from(u8::from(self.value > 0.0)))
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

impl Add for Dual {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let [a, b] = [self.slopes, other.slopes];
        Self {
            value: self.value + other.value,
            slopes: [a[0] + b[0], a[1] + b[1]],
        }
    }
}

impl Neg for Dual {
    type Output = Self;

    fn neg(self) -> Self {
        self * -1.0
    }
}

impl Sub for Dual {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        self + -other
    }
}

impl Add<f64> for Dual {
    type Output = Self;

    fn add(self, number: f64) -> Self {
        self + Self::constant(number)
    }
}

impl Sub<f64> for Dual {
    type Output = Self;

    fn sub(self, number: f64) -> Self {
        self + -number
    }
}

impl Mul<f64> for Dual {
    type Output = Self;

    fn mul(self, factor: f64) -> Self {
        self.map(self.value * factor, factor)
    }
}

impl Mul for Dual {
    type Output = Self;

    #[expect(clippy::suspicious_arithmetic_impl, reason = "the product rule")]
    fn mul(self, other: Self) -> Self {
        let slope = |side: usize| self.slopes[side] * other.value + self.value * other.slopes[side];
        Self {
            value: self.value * other.value,
            slopes: [slope(0), slope(1)],
        }
    }
}

/// The losses of a batch of pairs, each the weighted sum of the objective's terms. All terms except
/// [`Loss::Aot`] depend on their own pair only.
pub fn losses(pairs: &[PairLogps], objective: &Objective) -> Vec<PairLoss> {
    let mut sums = vec![Dual::constant(0.0); pairs.len()];
    for &(loss, weight) in &objective.terms {
        let of_pairs = match loss {
            Loss::Aot => aot(pairs, objective),
            _ => pairs
                .iter()
                .map(|pair| of_pair(loss, pair, objective))
                .collect(),
        };
        for (sum, of_pair) in sums.iter_mut().zip(of_pairs) {
            *sum = *sum + of_pair * weight;
        }
    }
    let plain = |Dual { value, slopes }| PairLoss {
        loss: value,
        slopes,
    };
    sums.into_iter().map(plain).collect()
}

/// One term of one pair. The variants of [`Loss`] document the source of each formula.
fn of_pair(loss: Loss, pair: &PairLogps, objective: &Objective) -> Dual {
    let Objective {
        beta,
        label_smoothing: epsilon,
        simpo_gamma,
        ..
    } = *objective;
    let [chosen_logp, rejected_logp] = logps(pair);
    let [chosen_tokens, rejected_tokens] = pair.tokens;
    let chosen = chosen_logp - pair.reference[0];
    let rejected = rejected_logp - pair.reference[1];
    let margin = chosen - rejected;
    let smoothed = |x: Dual| -x.log_sigmoid() * (1.0 - epsilon) - (-x).log_sigmoid() * epsilon;
    match loss {
        Loss::Sigmoid => smoothed(margin * beta),
        Loss::Hinge => (-margin * beta + 1.0).relu(),
        Loss::Ipo => {
            let mean = chosen * chosen_tokens.recip() - rejected * rejected_tokens.recip();
            (mean - 0.5 / beta).square()
        }
        Loss::ExoPair => {
            let (to, from) = (margin * beta, -margin * beta);
            to.sigmoid() * (to.log_sigmoid() - (-epsilon).ln_1p())
                + from.sigmoid() * (from.log_sigmoid() - epsilon.ln())
        }
        Loss::NcaPair => {
            let (chosen, rejected) = (chosen * beta, rejected * beta);
            -chosen.log_sigmoid() - (-chosen).log_sigmoid() * 0.5 - (-rejected).log_sigmoid() * 0.5
        }
        Loss::Robust => {
            let margin = margin * beta;
            let flipped = (-margin).log_sigmoid() * epsilon;
            (flipped - margin.log_sigmoid() * (1.0 - epsilon)) * (1.0 - 2.0 * epsilon).recip()
        }
        Loss::BcoPair => -(chosen * beta).log_sigmoid() - (-rejected * beta).log_sigmoid(),
        Loss::SppoHard => (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square(),
        Loss::ApoZero => -(chosen * beta).sigmoid() + (rejected * beta).sigmoid() + 1.0,
        Loss::ApoDown => (chosen * beta).sigmoid() - (margin * beta).sigmoid() + 1.0,
        Loss::Sft => -chosen_logp * chosen_tokens.recip(),
        Loss::SigmoidNorm => {
            let mean = chosen * chosen_tokens.recip() - rejected * rejected_tokens.recip();
            -(mean * beta).log_sigmoid()
        }
        Loss::Simpo => {
            let mean =
                chosen_logp * chosen_tokens.recip() - rejected_logp * rejected_tokens.recip();
            smoothed(mean * beta - simpo_gamma)
        }
        Loss::Aot => unreachable!("AOT is computed for the whole batch"),
    }
}

/// The policy's log-probabilities as the variables of the loss.
fn logps(pair: &PairLogps) -> [Dual; 2] {
    let [chosen, rejected] = pair.policy;
    [(chosen, [1.0, 0.0]), (rejected, [0.0, 1.0])].map(|(value, slopes)| Dual { value, slopes })
}

/// [`Loss::Aot`]: the margins of the policy and of the reference are sorted separately, and the
/// loss is a function of the differences; each loss belongs to the pair whose policy margin it
/// contains.
fn aot(pairs: &[PairLogps], objective: &Objective) -> Vec<Dual> {
    let margins: Vec<Dual> = pairs
        .iter()
        .map(|pair| {
            let [chosen, rejected] = logps(pair);
            chosen - rejected
        })
        .collect();
    let mut references: Vec<f64> = pairs
        .iter()
        .map(|pair| pair.reference[0] - pair.reference[1])
        .collect();
    references.sort_by(f64::total_cmp);
    let mut order: Vec<usize> = (0..pairs.len()).collect();
    order.sort_by(|&a, &b| margins[a].value.total_cmp(&margins[b].value));
    let mut losses = vec![Dual::constant(0.0); pairs.len()];
    let epsilon = objective.label_smoothing;
    for (&pair, reference) in order.iter().zip(references) {
        let delta = (margins[pair] - reference) * objective.beta;
        losses[pair] = -delta.log_sigmoid() * (1.0 - epsilon) - (-delta).log_sigmoid() * epsilon;
    }
    losses
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    fn objective(loss: Loss, label_smoothing: f64) -> Objective {
        Objective {
            label_smoothing,
            simpo_gamma: 0.5,
            ..Objective::of(loss, 0.1)
        }
    }

    /// Policy: log p_c = -10, log p_r = -12; reference: -11, -11.5; so c = 1, r = -0.5, d = 1.5;
    /// 4 and 5 tokens.
    const PAIR: PairLogps = PairLogps {
        policy: [-10.0, -12.0],
        reference: [-11.0, -11.5],
        tokens: [4.0, 5.0],
    };

    /// With s(x) = 1 / (1 + e^-x), computed from the papers' formulas with a calculator:
    /// s(0.15) = 0.537429845, s(0.1) = 0.524979187, s(0.05) = 0.512497396.
    #[test]
    fn each_loss_is_what_its_paper_says_by_hand() {
        let table = [
            // -ln s(0.15)
            (Loss::Sigmoid, 0.0, 0.620_957_048),
            // 0.9 of that plus 0.1 of -ln s(-0.15) = 0.770957048
            (Loss::Sigmoid, 0.1, 0.635_957_048),
            // 1 - 0.15
            (Loss::Hinge, 0.0, 0.85),
            // (1/4 + 0.5/5 - 5)^2
            (Loss::Ipo, 0.0, 21.6225),
            // s(0.15) (ln s(0.15) - ln 0.9) + s(-0.15) (ln s(-0.15) - ln 0.1)
            (Loss::ExoPair, 0.1, 0.431_388_457),
            // -ln s(0.1) - 0.5 ln s(-0.1) - 0.5 ln s(0.05)
            (Loss::NcaPair, 0.0, 1.350_824_814),
            // (0.9 * 0.620957048 - 0.1 * 0.770957048) / 0.8
            (Loss::Robust, 0.1, 0.602_207_048),
            // -ln s(0.1) - ln s(0.05)
            (Loss::BcoPair, 0.0, 1.312_856_308),
            // (1 - 5)^2 + (-0.5 + 5)^2
            (Loss::SppoHard, 0.0, 36.25),
            // 1 - s(0.1) + s(-0.05)
            (Loss::ApoZero, 0.0, 0.962_523_416),
            // s(0.1) + 1 - s(0.15)
            (Loss::ApoDown, 0.0, 0.987_549_342),
            // 10 / 4
            (Loss::Sft, 0.0, 2.5),
            // -ln s(0.1 (0.25 + 0.1))
            (Loss::SigmoidNorm, 0.0, 0.675_800_298),
            // -ln s(0.1 (-2.5 + 2.4) - 0.5) = -ln s(-0.51)
            (Loss::Simpo, 0.0, 0.980_313_318),
            // for a single pair, the sigmoid loss
            (Loss::Aot, 0.0, 0.620_957_048),
        ];
        for (loss, smoothing, expected) in table {
            let found = losses(&[PAIR], &objective(loss, smoothing))[0].loss;
            assert!(
                (found - expected).abs() < 1e-8,
                "{loss:?} {found} {expected}"
            );
        }
    }

    #[test]
    fn slopes_are_those_of_the_values() {
        let step = 1e-6;
        for loss in Loss::ALL {
            let objective = objective(loss, 0.1);
            let other = PairLogps {
                policy: [-9.0, -9.5],
                ..PAIR
            };
            let of = |pair: PairLogps| losses(&[pair, other], &objective)[0];
            for side in 0..2 {
                let moved = |by: f64| {
                    let mut pair = PAIR;
                    pair.policy[side] += by;
                    of(pair).loss
                };
                let expected = (moved(step) - moved(-step)) / (2.0 * step);
                let found = of(PAIR).slopes[side];
                assert!(
                    (found - expected).abs() < 1e-6,
                    "{loss:?} {found} {expected}"
                );
            }
        }
    }

    #[test]
    fn terms_add_up_with_their_weights() {
        let sum = Objective {
            terms: vec![(Loss::Sigmoid, 1.0), (Loss::Sft, 0.2)],
            ..objective(Loss::Sigmoid, 0.0)
        };
        let found = losses(&[PAIR], &sum)[0];
        assert!((found.loss - (0.620_957_048 + 0.2 * 2.5)).abs() < 1e-8);
        let slope = -0.1 * sigmoid(-0.15) - 0.2 / 4.0;
        assert!((found.slopes[0] - slope).abs() < 1e-12);
    }

    /// The policy's margins are 2 and 0.5, the reference's 0.5 and -1. Sorted, 0.5 is matched with
    /// -1 and 2 with 0.5, so that both differences are 1.5.
    #[test]
    fn aot_sorts_the_margins_of_a_batch_apart() {
        let other = PairLogps {
            policy: [-9.0, -9.5],
            reference: [-4.0, -3.0],
            tokens: [1.0, 1.0],
        };
        for found in losses(&[PAIR, other], &objective(Loss::Aot, 0.0)) {
            assert!((found.loss - 0.620_957_048).abs() < 1e-8, "{found:?}");
        }
    }

    #[test]
    fn a_policy_that_equals_its_reference_loses_log_two_and_overflow_is_far() {
        let equal = PairLogps {
            policy: [-300.25; 2],
            reference: [-300.25; 2],
            tokens: [1.0; 2],
        };
        let found = losses(&[equal], &objective(Loss::Sigmoid, 0.0))[0];
        assert!((found.loss - std::f64::consts::LN_2).abs() < 1e-12);
        assert!(equal.rewards(0.7).iter().all(|reward| reward.abs() < 1e-12));
        let far = PairLogps {
            policy: [-9e5, -1.0],
            ..equal
        };
        let found = losses(&[far], &objective(Loss::Sigmoid, 0.0))[0];
        assert!((found.loss / 9e4 - 1.0).abs() < 1e-3 && (found.slopes[0] + 0.1).abs() < 1e-12);
    }

    #[test]
    fn log_probabilities_of_all_tokens_sum_to_one() {
        let logits = Tensor::from_slice(&[0.5f32, -1.0, 40.0]).expand([3, 3], false);
        let logps = token_logps(&logits, &Tensor::from_slice(&[0i64, 1, 2]));
        assert!((logps.exp().sum(Kind::Double).double_value(&[]) - 1.0).abs() < 1e-6);
        assert!((logps.double_value(&[0]) + 39.5).abs() < 1e-5);
    }
}
