//! Sampling the next token from logits.
//!
//! The order is that of transformers' `generate`: repetition penalty, temperature, `top_k`,
//! `top_p`, `min_p`, draw. Tokens that must never be generated are banned before all of these. The
//! random number of a draw comes from a counter, not from a stateful generator: it depends on the
//! prompt's seed, the answer's index and the token's position, and so on nothing that batching or
//! resuming could change.

use std::cmp::Ordering;

use rayon::prelude::*;
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use ovchat_models::Sampling;

/// The number of most likely tokens that are first copied from a device; the rest follow only if
/// the draw needs them.
const CANDIDATES: i64 = 512;

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
    /// number in [0, 1). `None` for a row whose logits are NaN.
    pub fn choose(&mut self, logits: &Tensor, numbers: &[f64]) -> Vec<Option<i64>> {
        let scores = self.scores(logits);
        let tokens = if self.how.temperature == 0.0 {
            greatest(&scores)
        } else {
            self.draw(&self.probabilities(&scores), numbers)
        };
        if let Some(occurred) = &mut self.occurred {
            let chosen: Vec<i64> = tokens.iter().map(|token| token.unwrap_or(0)).collect();
            let chosen = Tensor::from_slice(&chosen)
                .to_device(occurred.device())
                .unsqueeze(-1);
            let _ = occurred.scatter_value_(-1, &chosen, 1);
        }
        tokens
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
        let rows = rows_of(&self.probabilities(&self.scores(logits)));
        let distribution = |row: Vec<f32>| {
            let mut tokens = Token::all(&row);
            let kept = eligible(&mut tokens, self.how).expect("numbers");
            let whole: f64 = tokens[..kept]
                .iter()
                .map(|token| f64::from(token.chance))
                .sum();
            let mut distribution = vec![0.0; row.len()];
            for token in &tokens[..kept] {
                distribution[token.id as usize] = f64::from(token.chance) / whole;
            }
            distribution
        };
        rows.into_iter().map(distribution).collect()
    }

    fn draw(&self, probabilities: &Tensor, numbers: &[f64]) -> Vec<Option<i64>> {
        let how = self.how;
        if probabilities.device() == Device::Cpu {
            let rows = rows_of(probabilities);
            let rows = rows.par_iter().zip(numbers);
            return rows
                .map(|(row, &number)| draw(&mut Token::all(row), how, number))
                .collect();
        }
        let (chances, ids) =
            probabilities.topk(CANDIDATES.min(probabilities.size()[1]), -1, true, true);
        let ids = Vec::<Vec<i64>>::try_from(ids).expect("a matrix of integers");
        let rows = rows_of(&chances)
            .into_iter()
            .zip(ids)
            .zip(numbers)
            .enumerate();
        rows.map(|(row, ((chances, ids), &number))| {
            let pairs = chances.into_iter().zip(ids);
            let mut few: Vec<Token> = pairs.map(|(chance, id)| Token { chance, id }).collect();
            let sum: f64 = few.iter().map(|token| f64::from(token.chance)).sum();
            // The most likely tokens suffice if they include all eligible ones. They come in order.
            let least = few.last().map_or(0.0, |token| token.chance);
            let most = few.first().map_or(0.0, |token| token.chance);
            if sum >= how.top_p || least < least_chance(most, how.min_p) {
                return draw(&mut few, how, number);
            }
            let all = rows_of(&probabilities.narrow(0, row as i64, 1)).swap_remove(0);
            draw(&mut Token::all(&all), how, number)
        })
        .collect()
    }
}

/// A token and its probability.
#[derive(Debug, Clone, Copy)]
struct Token {
    chance: f32,
    id: i64,
}

impl Token {
    /// All tokens of a vocabulary with nonzero probability.
    fn all(chances: &[f32]) -> Vec<Self> {
        let tokens = (0..).zip(chances);
        // A NaN probability is kept, to be detected later.
        let likely = tokens.filter(|(_, chance)| **chance > 0.0 || chance.is_nan());
        likely.map(|(id, &chance)| Self { chance, id }).collect()
    }

    /// Orders by descending probability, then by ascending id.
    fn order(&self, other: &Self) -> Ordering {
        other
            .chance
            .total_cmp(&self.chance)
            .then(self.id.cmp(&other.id))
    }
}

/// Draws from the eligible tokens with `number`, by inverse transform sampling. `None` if the
/// probabilities are NaN.
fn draw(tokens: &mut [Token], how: &Sampling, number: f64) -> Option<i64> {
    let kept = eligible(tokens, how)?;
    let some_are_out = how.top_p < 1.0 || kept < tokens.len();
    let tokens = &mut tokens[..kept];
    let whole = if some_are_out {
        tokens.iter().map(|token| f64::from(token.chance)).sum()
    } else {
        1.0
    };
    // Rounding may put the draw past the last token.
    let place = reach(tokens, |sum| sum > number * whole).unwrap_or(kept - 1);
    Some(tokens[place].id)
}

/// Moves the eligible tokens to the front, those of the nucleus that pass `min_p`, and returns
/// their number. `None` if the probabilities are NaN or there are none.
fn eligible(tokens: &mut [Token], how: &Sampling) -> Option<usize> {
    let kept = nucleus(tokens, how.top_p)?;
    if how.min_p == 0.0 {
        return Some(kept);
    }
    let nucleus = &mut tokens[..kept];
    let most = nucleus.iter().map(|token| token.chance).fold(0.0, f32::max);
    let least = least_chance(most, how.min_p);
    let mut front = 0;
    for place in 0..kept {
        if nucleus[place].chance >= least {
            nucleus.swap(front, place);
            front += 1;
        }
    }
    Some(front)
}

/// The lowest eligible probability if the highest is `most`; in float32, as in transformers.
fn least_chance(most: f32, min_p: f64) -> f32 {
    most * min_p as f32
}

/// Moves the nucleus to the front, the smallest set of most likely tokens whose probabilities sum
/// to `top_p`, and returns its size. `None` if the probabilities are NaN or there are none.
fn nucleus(tokens: &mut [Token], top_p: f64) -> Option<usize> {
    if tokens.is_empty() || tokens.iter().any(|token| !token.chance.is_finite()) {
        return None;
    }
    if top_p >= 1.0 {
        return Some(tokens.len());
    }
    let last = reach(tokens, |sum| sum >= top_p);
    Some(last.map_or(tokens.len(), |last| last + 1))
}

/// Orders `tokens` as far as needed to find the first one, by descending probability, at which the
/// cumulative probability is `enough`; all more likely tokens are then before it. Takes linear
/// time, unlike sorting: a quickselect by sums instead of counts.
fn reach(tokens: &mut [Token], enough: impl Fn(f64) -> bool) -> Option<usize> {
    let (mut start, mut end) = (0, tokens.len());
    let mut before = 0.0;
    let sum =
        |tokens: &[Token]| -> f64 { tokens.iter().map(|token| f64::from(token.chance)).sum() };
    if !enough(sum(tokens)) {
        // The least likely token goes last, since it is the next one to include or exclude.
        let least = (0..tokens.len()).max_by(|&one, &two| tokens[one].order(&tokens[two]))?;
        tokens.swap(least, end - 1);
        return None;
    }
    while end - start > 1 {
        let middle = (end - start - 1) / 2;
        let (left, pivot, _) = tokens[start..end].select_nth_unstable_by(middle, Token::order);
        let left = before + sum(left);
        let with_pivot = left + f64::from(pivot.chance);
        if enough(left) {
            end = start + middle;
        } else if enough(with_pivot) {
            return Some(start + middle);
        } else {
            before = with_pivot;
            start += middle + 1;
        }
    }
    Some(start)
}

/// The token with the highest score in each row, the lowest id among equals (torch's `argmax`
/// returns the first maximum); `None` for a row whose scores are NaN. Only two numbers per row are
/// copied from the device.
fn greatest(scores: &Tensor) -> Vec<Option<i64>> {
    let ids = Vec::<i64>::try_from(scores.argmax(-1, false)).expect("a vector of int64");
    let highest = scores.amax([-1i64].as_slice(), false);
    let highest = Vec::<f32>::try_from(highest).expect("a vector of float32");
    let rows = ids.into_iter().zip(highest);
    rows.map(|(id, score)| score.is_finite().then_some(id))
        .collect()
}

fn rows_of(matrix: &Tensor) -> Vec<Vec<f32>> {
    Vec::try_from(matrix).expect("a matrix of float32")
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
        for token in chooser.choose(&logits, &numbers) {
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
        let mut next = || chooser.choose(&logits, &[0.0])[0].unwrap();
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
        let scores = Tensor::from_slice(rows.as_flattened()).view([4, 3]);
        assert_eq!(greatest(&scores), [Some(1), None, None, None]);
    }

    /// Probabilities with ties, in no order; selection must give the same result as sorting.
    #[test]
    fn selecting_gives_what_sorting_gives() {
        let chances: Vec<f32> = (0..997)
            .map(|id| (id * 7919 % 101) as f32 / 49_850.0)
            .collect();
        let mut sorted = Token::all(&chances);
        sorted.sort_by(Token::order);
        for step in 0..200 {
            let (top_p, number) = (0.05 + f64::from(step % 20) * 0.04, f64::from(step) / 200.0);
            let sums: Vec<f64> = sorted
                .iter()
                .scan(0.0, |sum, token| {
                    *sum += f64::from(token.chance);
                    Some(*sum)
                })
                .collect();
            let last = sums.iter().position(|&sum| sum >= top_p).unwrap();
            let place = sums
                .iter()
                .position(|&sum| sum > number * sums[last])
                .unwrap();
            let how = Sampling { top_p, ..how() };
            let found = draw(&mut Token::all(&chances), &how, number);
            assert_eq!(found, Some(sorted[place].id), "{top_p} {number}");
        }
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
