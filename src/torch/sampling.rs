//! Sampling the next token from logits.
//!
//! The order is that of transformers' `generate`: repetition penalty, temperature, `top_k`,
//! `top_p`, `min_p`, draw. Tokens that must never be generated are banned before all of these. The
//! random number of a draw comes from a counter, not from a stateful generator: it depends on the
//! prompt's seed, the answer's index and the token's position, and so on nothing that batching or
//! resuming could change.

mod candidates;
mod on_host;

use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use self::candidates::Candidates;
use self::on_host::draw_all;
use super::dpo::token_logps;
use ovchat_models::Sampling;

/// The number of most likely tokens that a draw considers first; the rest follow only if it needs
/// them.
const CANDIDATES: i64 = 512;

/// The number of rows whose tokens are all sorted at once.
const ROWS_SORTED_MAX: i64 = 16;

/// The seed of answer `answer`: the first eight bytes, little-endian, of
/// `SHA-256("answer", prompt_seed, answer)`, the numbers as eight little-endian bytes each.
pub fn answer_seed(prompt_seed: u64, answer: usize) -> i64 {
    i64::from_le_bytes(hashed(b"answer", prompt_seed, answer as u64))
}

/// The random number in [0, 1) for token `position` of the answer with this seed: the first eight
/// bytes, little-endian, of `SHA-256("token", seed, position)`, their upper 53 bits over 2^53.
pub fn uniform(answer_seed: i64, position: usize) -> f64 {
    let bytes = hashed(b"token", answer_seed.cast_unsigned(), position as u64);
    (u64::from_le_bytes(bytes) >> 11) as f64 / (1u64 << 53) as f64
}

fn hashed(purpose: &[u8], seed: u64, counter: u64) -> [u8; 8] {
    let mut hash = Sha256::new();
    hash.update(purpose);
    hash.update(seed.to_le_bytes());
    hash.update(counter.to_le_bytes());
    let hash = hash.finalize();
    std::array::from_fn(|index| hash[index])
}

/// Samples tokens for rows, the answers to prompts, which enter and leave.
#[derive(Debug)]
pub struct Chooser<'a> {
    how: &'a Sampling,
    /// 0, or minus infinity for a banned token; `[vocab]`, float32.
    ban: Tensor,
    /// True for each token that occurred in a row; `[rows, vocab]`, bool. Kept only for a
    /// repetition penalty.
    occurred: Option<Tensor>,
}

impl<'a> Chooser<'a> {
    /// A sampler for a vocabulary of `vocab` tokens, of which `banned` are never sampled.
    pub fn new(how: &'a Sampling, vocab: i64, banned: &[i64], device: Device) -> Self {
        let ban = Tensor::zeros([vocab], (Kind::Float, device)).index_fill(
            0,
            &Tensor::from_slice(banned).to_device(device),
            f64::NEG_INFINITY,
        );
        let penalizes = (how.repetition_penalty - 1.0).abs() > f64::EPSILON;
        let occurred = penalizes.then(|| Tensor::zeros([0, vocab], (Kind::Bool, device)));
        Self { how, ban, occurred }
    }

    /// Adds `rows` answers to a prompt with these `ids`, after the existing rows.
    pub fn enter(&mut self, rows: usize, ids: &[i64]) {
        if let Some(occurred) = &mut self.occurred {
            let device = occurred.device();
            let new = Tensor::zeros([occurred.size()[1]], (Kind::Bool, device))
                .index_fill(0, &Tensor::from_slice(ids).to_device(device), 1)
                .repeat([rows as i64, 1]);
            *occurred = Tensor::cat(&[&*occurred, &new], 0);
        }
    }

    /// Keeps only these rows (`[kept]`, int64).
    pub fn keep(&mut self, rows: &Tensor) {
        if let Some(occurred) = &mut self.occurred {
            *occurred = occurred.index_select(0, rows);
        }
    }

    /// Removes all rows.
    pub fn clear(&mut self) {
        if let Some(occurred) = &mut self.occurred {
            *occurred = occurred.narrow(0, 0, 0);
        }
    }

    /// Samples one token for each row of `logits` (`[rows, vocab]`, float32), with the row's random
    /// number in [0, 1). A GPU computes everything; one tensor is copied to the host, and the number of rows
    /// whose draws need more than the most likely tokens.
    pub fn choose(&mut self, logits: &Tensor, numbers: &[f64]) -> Chosen {
        let scores = self.scores(logits);
        let (ids, is_valid) = if self.how.temperature == 0.0 {
            // torch's `argmax` returns the first maximum: the lowest id among equals.
            let highest = scores.amax([-1i64].as_slice(), false);
            (scores.argmax(-1, false), highest.isfinite())
        } else {
            self.draw(&self.probabilities(&scores), numbers)
        };
        let logps = token_logps(logits, &ids);
        if let Some(occurred) = &mut self.occurred {
            let _ = occurred.scatter_value_(-1, &ids.unsqueeze(-1), 1);
        }
        Chosen::new(ids, &is_valid, &logps)
    }

    /// Draws a token for each row of `probabilities`, and says which are numbers.
    fn draw(&self, probabilities: &Tensor, numbers: &[f64]) -> (Tensor, Tensor) {
        if probabilities.device() == Device::Cpu {
            let drawn = draw_all(probabilities, self.how, numbers);
            let ids: Vec<i64> = drawn.iter().map(|id| id.unwrap_or(0)).collect();
            let is_valid: Vec<bool> = drawn.iter().map(Option::is_some).collect();
            return (Tensor::from_slice(&ids), Tensor::from_slice(&is_valid));
        }
        let numbers = Tensor::from_slice(numbers).to_device(probabilities.device());
        let few = Candidates::of(probabilities, CANDIDATES, self.how);
        let (mut ids, is_valid) = (few.draw(&numbers), few.are_numbers());
        if let Some(is_enough) = few.is_enough(self.how) {
            let rest = is_enough.logical_not().logical_and(&is_valid);
            let rest = rest.nonzero().squeeze_dim(-1); // [rows], int64
            // Few at a time: sorting all tokens takes some 50 bytes each.
            for rest in rest.split(ROWS_SORTED_MAX, 0) {
                if rest.size()[0] == 0 {
                    break;
                }
                let rows = probabilities.index_select(0, &rest);
                let all = Candidates::of(&rows, rows.size()[1], self.how);
                let drawn = all.draw(&numbers.index_select(0, &rest));
                ids = ids.index_copy(0, &rest, &drawn);
            }
        }
        (ids, is_valid)
    }

    /// The logits with banned tokens at minus infinity and the repetition penalty applied.
    fn scores(&self, logits: &Tensor) -> Tensor {
        let scores = logits + &self.ban;
        let Some(occurred) = &self.occurred else {
            return scores;
        };
        let penalty = self.how.repetition_penalty;
        let penalized = (&scores * penalty).where_self(&scores.lt(0.0), &(&scores / penalty));
        penalized.where_self(occurred, &scores)
    }

    /// The probabilities after temperature and `top_k`, `[rows, vocab]`.
    fn probabilities(&self, scores: &Tensor) -> Tensor {
        // Subtract the maximum first, so that no temperature causes infinities.
        let highest = scores.amax([-1i64].as_slice(), true);
        let mut scaled = (scores - highest) / self.how.temperature;
        let top_k = self.how.top_k as i64;
        if (1..scaled.size()[1]).contains(&top_k) {
            let (best, _) = scaled.topk(top_k, -1, true, true);
            let least = best.narrow(-1, top_k - 1, 1);
            scaled = scaled.masked_fill(&scaled.lt_tensor(&least), f64::NEG_INFINITY);
        }
        scaled.softmax(-1, Kind::Float)
    }

    /// The probability of each token in [`Chooser::choose`], by row.
    pub fn distribution(&self, logits: &Tensor) -> Vec<Vec<f64>> {
        let probabilities = self.probabilities(&self.scores(logits));
        let all = Candidates::of(&probabilities, probabilities.size()[1], self.how);
        let kept = &all.chances * &all.is_kept;
        let shares = &kept / kept.sum_dim_intlist([-1i64].as_slice(), true, None);
        let shares = shares.zeros_like().scatter(-1, &all.ids, &shares);
        Vec::try_from(shares).expect("a matrix of float64")
    }
}

/// The tokens that were sampled.
#[derive(Debug)]
pub struct Chosen {
    /// The token of each row, `[rows]`, int64, on the device; any token where the logits are NaN.
    pub ids: Tensor,
    /// The same on the host; `None` for a row whose logits are NaN.
    pub tokens: Vec<Option<i64>>,
    /// Their log-probabilities without temperature and nucleus.
    pub logps: Vec<f32>,
}

impl Chosen {
    /// Copies what the host needs, at once.
    fn new(ids: Tensor, is_valid: &Tensor, logps: &Tensor) -> Self {
        let all = [&ids, is_valid, logps].map(|one| one.to_kind(Kind::Double));
        let all = Tensor::stack(&all, 0);
        let all = Vec::<Vec<f64>>::try_from(all).expect("a matrix of float64");
        let tokens = all[0].iter().zip(&all[1]);
        let tokens = tokens.map(|(&id, &is_valid)| (is_valid > 0.0).then_some(id as i64));
        Self {
            tokens: tokens.collect(),
            logps: all[2].iter().map(|&logp| logp as f32).collect(),
            ids,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn how() -> Sampling {
        Sampling {
            count: 1,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            max_new_tokens: 1,
            stop_strings: Vec::new(),
            stop_token_ids: Vec::new(),
        }
    }

    /// The frequencies of tokens drawn with evenly spaced numbers.
    fn shares(how: &Sampling, logits: &[f32], ids: &[i64], banned: &[i64]) -> Vec<f64> {
        const DRAWS: usize = 2000;
        let vocab = logits.len() as i64;
        let mut shares = vec![0.0; logits.len()];
        let numbers: Vec<f64> = (0..DRAWS)
            .map(|draw| (draw as f64 + 0.5) / DRAWS as f64)
            .collect();
        let mut chooser = Chooser::new(how, vocab, banned, Device::Cpu);
        chooser.enter(DRAWS, ids);
        let logits = Tensor::from_slice(logits).expand([DRAWS as i64, vocab], false);
        for token in chooser.choose(&logits, &numbers).tokens {
            shares[token.unwrap() as usize] += 1.0 / DRAWS as f64;
        }
        shares
    }

    fn check(found: &[f64], expected: &[f64]) {
        for (found_one, expected_one) in found.iter().zip(expected) {
            assert!(
                (found_one - expected_one).abs() < 2e-3,
                "{found:?} {expected:?}"
            );
        }
    }

    /// Logits with these probabilities.
    fn logits(chances: &[f32]) -> Vec<f32> {
        chances.iter().map(|chance| chance.ln()).collect()
    }

    const CHANCES: [f32; 4] = [0.1, 0.4, 0.2, 0.3];

    #[test]
    fn tokens_come_as_often_as_their_probability() {
        check(
            &shares(&how(), &logits(&CHANCES), &[], &[]),
            &[0.1, 0.4, 0.2, 0.3],
        );
        let sharp = Sampling {
            temperature: 0.5,
            ..how()
        };
        check(
            &shares(&sharp, &logits(&CHANCES), &[], &[]),
            &[1. / 30., 16. / 30., 4. / 30., 9. / 30.],
        );
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_it() {
        let nucleus = |top_p| Sampling { top_p, ..how() };
        let of = |top_p| shares(&nucleus(top_p), &logits(&CHANCES), &[], &[]);
        check(&of(0.65), &[0., 4. / 7., 0., 3. / 7.]);
        check(&of(0.75), &[0., 4. / 9., 2. / 9., 3. / 9.]);
        check(&of(0.01), &[0., 1., 0., 0.]);
    }

    #[test]
    fn min_p_keeps_what_is_nearly_as_likely_as_the_most_likely() {
        let least = |min_p, top_p| {
            let how = Sampling {
                min_p,
                top_p,
                ..how()
            };
            shares(&how, &logits(&CHANCES), &[], &[])
        };
        check(&least(0.6, 1.0), &[0., 4. / 7., 0., 3. / 7.]);
        check(&least(0.3, 1.0), &[0., 4. / 9., 2. / 9., 3. / 9.]);
        check(&least(1.0, 1.0), &[0., 1., 0., 0.]);
        // The stricter of the two applies.
        check(&least(0.3, 0.65), &[0., 4. / 7., 0., 3. / 7.]);
        check(&least(0.6, 0.85), &[0., 4. / 7., 0., 3. / 7.]);
    }

    #[test]
    fn top_k_keeps_the_most_likely() {
        let two = Sampling { top_k: 2, ..how() };
        check(
            &shares(&two, &logits(&CHANCES), &[], &[]),
            &[0., 4. / 7., 0., 3. / 7.],
        );
        let more_than_all = Sampling { top_k: 9, ..how() };
        check(
            &shares(&more_than_all, &logits(&CHANCES), &[], &[]),
            &[0.1, 0.4, 0.2, 0.3],
        );
    }

    #[test]
    fn banned_tokens_are_never_chosen() {
        check(
            &shares(&how(), &logits(&CHANCES), &[], &[1, 3]),
            &[1. / 3., 0., 2. / 3., 0.],
        );
        let greedy = Sampling {
            temperature: 0.0,
            ..how()
        };
        check(
            &shares(&greedy, &logits(&CHANCES), &[], &[1]),
            &[0., 0., 0., 1.],
        );
    }

    #[test]
    fn a_penalty_divides_positive_and_multiplies_negative_logits_of_what_occurred() {
        let penalty = Sampling {
            repetition_penalty: 2.0,
            ..how()
        };
        // Token 0: 2 becomes 1; token 1: -1 becomes -2; tokens 2 and 3 did not occur.
        let expected = [1.0f64, -2.0, 1.0, -2.0].map(f64::exp);
        let sum: f64 = expected.iter().sum();
        let found = shares(&penalty, &[2.0, -1.0, 1.0, -2.0], &[0, 1], &[]);
        check(&found, &expected.map(|value| value / sum));
    }

    #[test]
    fn what_was_just_chosen_counts_as_occurred() {
        let greedy = Sampling {
            temperature: 0.0,
            repetition_penalty: 2.0,
            ..how()
        };
        let mut chooser = Chooser::new(&greedy, 2, &[], Device::Cpu);
        chooser.enter(1, &[]);
        let logits = Tensor::from_slice(&[3.0f32, 2.0]).unsqueeze(0);
        let mut next = || chooser.choose(&logits, &[0.0]).tokens[0].unwrap();
        assert_eq!([next(), next(), next()], [0, 1, 0]);
    }

    #[test]
    fn greedy_takes_the_lowest_id_among_equals() {
        let rows = [
            [1.0, 5.0, 5.0],
            [5.0, f32::NAN, 1.0],
            [f32::INFINITY, 0.0, 0.0],
            [f32::NEG_INFINITY; 3],
        ];
        let logits = Tensor::from_slice(rows.as_flattened()).view([4, 3]);
        let greedy = Sampling {
            temperature: 0.0,
            ..how()
        };
        let chosen = Chooser::new(&greedy, 3, &[], Device::Cpu).choose(&logits, &[0.0; 4]);
        assert_eq!(chosen.tokens, [Some(1), None, None, None]);
        let drawn = Chooser::new(&how(), 3, &[], Device::Cpu).choose(&logits, &[0.5; 4]);
        assert!(drawn.tokens[0].is_some() && drawn.tokens[1].is_none());
    }

    #[test]
    fn draws_beyond_the_most_likely_reach_all_tokens() {
        let flat = vec![0.0f32; 3 * CANDIDATES as usize];
        let found = shares(&how(), &flat, &[], &[]);
        assert!(
            found[2 * CANDIDATES as usize..]
                .iter()
                .any(|&share| share > 0.0)
        );
    }

    #[test]
    fn numbers_depend_on_seed_answer_and_position() {
        let seed = answer_seed(7, 0);
        assert_ne!(seed, answer_seed(7, 1));
        assert_ne!(seed, answer_seed(8, 0));
        let numbers: Vec<f64> = (0..1000).map(|position| uniform(seed, position)).collect();
        let mean = numbers.iter().sum::<f64>() / 1000.0;
        assert!((mean - 0.5).abs() < 0.03, "{mean}");
        assert!(numbers.iter().all(|number| (0.0..1.0).contains(number)));
    }
}
