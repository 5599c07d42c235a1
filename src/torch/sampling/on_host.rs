//! Draws on the CPU: a selection by sums takes linear time, and rows are independent. The result is that
//! of [`super::candidates`], which needs sorted tokens.

use rayon::prelude::*;
use tch::Tensor;

use ovchat_models::Sampling;

/// Draws a token for each row of `probabilities` (`[rows, vocab]`, float32) with its number in [0, 1).
/// `None` for a row whose probabilities are NaN.
pub fn draw_all(probabilities: &Tensor, how: &Sampling, numbers: &[f64]) -> Vec<Option<i64>> {
    let vocab = probabilities.size()[1] as usize;
    let all = probabilities.contiguous().view([-1]);
    let all = Vec::<f32>::try_from(all).expect("a vector of float32");
    let rows = all.par_chunks(vocab).zip(numbers);
    rows.map(|(row, &number)| draw(&mut Token::all(row)?, how, number))
        .collect()
}

/// A token and its probability as one number, which orders tokens by descending probability and then by
/// ascending id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Token(u64);

impl Token {
    /// A token with a probability that is not NaN and not negative.
    fn new(chance: f32, id: usize) -> Self {
        // The bits of such numbers are in their order.
        Self(u64::from(!chance.to_bits()) << 32 | id as u64)
    }

    fn chance(self) -> f32 {
        f32::from_bits(!((self.0 >> 32) as u32))
    }

    fn id(self) -> i64 {
        i64::from(self.0 as u32)
    }

    /// All tokens of a vocabulary with nonzero probability; `None` if some are NaN or infinite.
    fn all(chances: &[f32]) -> Option<Vec<Self>> {
        if chances.iter().any(|chance| !chance.is_finite()) {
            return None;
        }
        let tokens = chances.iter().enumerate();
        let likely = tokens.filter(|(_, chance)| **chance > 0.0);
        Some(likely.map(|(id, &chance)| Self::new(chance, id)).collect())
    }
}

/// Draws from the eligible tokens with `number`, by inverse transform sampling. `None` if the
/// probabilities are NaN.
fn draw(tokens: &mut [Token], how: &Sampling, number: f64) -> Option<i64> {
    let kept = eligible(tokens, how)?;
    let some_are_out = how.top_p < 1.0 || how.min_p > 0.0;
    let tokens = &mut tokens[..kept];
    let whole = if some_are_out {
        tokens.iter().map(|token| f64::from(token.chance())).sum()
    } else {
        1.0
    };
    // Rounding may put the draw past the last token.
    let place = reach(tokens, |sum| sum > number * whole).unwrap_or(kept - 1);
    Some(tokens[place].id())
}

/// Moves the eligible tokens to the front, those of the nucleus that pass `min_p`, and returns
/// their number. `None` if the probabilities are NaN or there are none.
fn eligible(tokens: &mut [Token], how: &Sampling) -> Option<usize> {
    let kept = nucleus(tokens, how.top_p)?;
    if how.min_p == 0.0 {
        return Some(kept);
    }
    let nucleus = &mut tokens[..kept];
    let most = nucleus
        .iter()
        .map(|token| token.chance())
        .fold(0.0, f32::max);
    let least = least_chance(most, how.min_p);
    let mut front = 0;
    for place in 0..kept {
        if nucleus[place].chance() >= least {
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
    if tokens.is_empty() {
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
        |tokens: &[Token]| -> f64 { tokens.iter().map(|token| f64::from(token.chance())).sum() };
    if !enough(sum(tokens)) {
        // The least likely token goes last, since it is the next one to include or exclude.
        let least = (0..tokens.len()).max_by_key(|&at| tokens[at])?;
        tokens.swap(least, end - 1);
        return None;
    }
    while end - start > 1 {
        let middle = (end - start - 1) / 2;
        let (left, pivot, _) = tokens[start..end].select_nth_unstable(middle);
        let left = before + sum(left);
        let with_pivot = left + f64::from(pivot.chance());
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Probabilities with ties, in no order; selection must give the same result as sorting.
    #[test]
    fn selecting_gives_what_sorting_gives() {
        let chances: Vec<f32> = (0..997)
            .map(|id| (id * 7919 % 101) as f32 / 49_850.0)
            .collect();
        let mut sorted = Token::all(&chances).unwrap();
        sorted.sort();
        for step in 0..200 {
            let (top_p, number) = (0.05 + f64::from(step % 20) * 0.04, f64::from(step) / 200.0);
            let sums: Vec<f64> = sorted
                .iter()
                .scan(0.0, |sum, token| {
                    *sum += f64::from(token.chance());
                    Some(*sum)
                })
                .collect();
            let last = sums.iter().position(|&sum| sum >= top_p).unwrap();
            let place = sums
                .iter()
                .position(|&sum| sum > number * sums[last])
                .unwrap();
            let how = Sampling {
                count: 1,
                temperature: 1.0,
                top_p,
                top_k: 0,
                min_p: 0.0,
                repetition_penalty: 1.0,
                max_new_tokens: 1,
                stop_strings: Vec::new(),
                stop_token_ids: Vec::new(),
            };
            let found = draw(&mut Token::all(&chances).unwrap(), &how, number);
            assert_eq!(found, Some(sorted[place].id()), "{top_p} {number}");
        }
    }
}
