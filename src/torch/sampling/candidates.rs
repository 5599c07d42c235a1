//! Draws on a device, by tensor operations on all rows at once.

use tch::{Kind, Tensor};

use ovchat_models::Sampling;

/// The most likely tokens of each row, by descending probability and then by ascending id.
pub struct Candidates {
    pub chances: Tensor, // [rows, candidates], float64
    pub ids: Tensor,     // [rows, candidates], int64
    /// True for the eligible ones: those of the nucleus that pass `min_p`. They come first.
    pub is_kept: Tensor, // [rows, candidates], bool
    /// The sum of the probabilities, if it is not certain to be 1.
    whole: Option<Tensor>, // [rows, 1], float64
    /// True if these are not all tokens.
    has_others: bool,
}

impl Candidates {
    /// The `count` most likely tokens, of `probabilities`, `[rows, vocab]`, float32.
    pub fn of(probabilities: &Tensor, count: i64, how: &Sampling) -> Self {
        let has_others = count < probabilities.size()[1];
        let (chances, ids) = if has_others {
            // `topk` has no order among equals: order by id, then by probability.
            let (chances, ids) = probabilities.topk(count, -1, true, false);
            let (ids, order) = ids.sort(-1, false);
            let chances = chances.gather(-1, &order, false);
            let (chances, order) = chances.sort_stable(true, -1, true);
            (chances, ids.gather(-1, &order, false))
        } else {
            probabilities.sort_stable(true, -1, true)
        };
        let mut is_kept = chances.gt(0.0);
        if how.min_p > 0.0 {
            // In float32, as in transformers.
            let least = chances.narrow(-1, 0, 1) * f64::from(how.min_p as f32);
            is_kept = is_kept.logical_and(&chances.ge_tensor(&least));
        }
        let chances = chances.to_kind(Kind::Double);
        if how.top_p < 1.0 {
            // The smallest set that reaches `top_p`: tokens before which the sum is less.
            let sums = chances.cumsum(-1, Kind::Double);
            let before = sums
                .narrow(-1, 0, sums.size()[1] - 1)
                .constant_pad_nd([1, 0]);
            is_kept = is_kept.logical_and(&before.lt(how.top_p));
        }
        let some_are_out = how.top_p < 1.0 || how.min_p > 0.0;
        let whole = some_are_out
            .then(|| (&chances * &is_kept).sum_dim_intlist([-1i64].as_slice(), true, None));
        Self {
            chances,
            ids,
            is_kept,
            whole,
            has_others,
        }
    }

    /// True for each row whose probabilities are numbers, `[rows]`.
    pub fn are_numbers(&self) -> Tensor {
        self.chances.select(-1, 0).isfinite()
    }

    /// True for each row whose eligible tokens are all here, `[rows]`; `None` if all tokens are here.
    pub fn is_enough(&self, how: &Sampling) -> Option<Tensor> {
        if !self.has_others {
            return None;
        }
        // The first that is not eligible is less likely than all that are; its equals elsewhere could
        // have come before it.
        let last = self.chances.size()[1] - 1;
        let least = self.chances.select(-1, last);
        let is_out = self.is_kept.select(-1, last).logical_not();
        if how.top_p >= 1.0 && how.min_p == 0.0 {
            // Only tokens without any probability can be left.
            return Some(least.eq(0.0));
        }
        let kept = self
            .is_kept
            .sum_dim_intlist([-1i64].as_slice(), true, Kind::Int64);
        let last_kept = self.chances.gather(-1, &(kept - 1).clamp_min(0), false);
        Some(is_out.logical_and(&last_kept.squeeze_dim(-1).gt_tensor(&least)))
    }

    /// Draws from the eligible tokens of each row with its number (`[rows]`, float64), by inverse
    /// transform sampling: `[rows]`, int64.
    pub fn draw(&self, numbers: &Tensor) -> Tensor {
        let sums = (&self.chances * &self.is_kept).cumsum(-1, Kind::Double);
        let target = match &self.whole {
            Some(whole) => numbers.unsqueeze(-1) * whole,
            None => numbers.unsqueeze(-1),
        };
        let dim = [-1i64].as_slice();
        let place = sums
            .le_tensor(&target)
            .sum_dim_intlist(dim, true, Kind::Int64);
        // Rounding may put the draw past the last token.
        let last = self.is_kept.sum_dim_intlist(dim, true, Kind::Int64) - 1;
        let place = place.minimum(&last).clamp_min(0);
        self.ids.gather(-1, &place, false).squeeze_dim(-1)
    }
}

#[cfg(test)]
mod tests {
    use super::super::CANDIDATES;
    use super::super::on_host::draw_all;
    use super::*;

    /// Draws a token the plain way: sort, cut, add up.
    fn plain(chances: &[f32], how: &Sampling, number: f64) -> i64 {
        let mut sorted: Vec<(f32, i64)> = chances.iter().copied().zip(0..).collect();
        sorted.sort_by(|one, other| other.0.total_cmp(&one.0).then(one.1.cmp(&other.1)));
        let least = sorted[0].0 * how.min_p as f32;
        let mut sum = 0.0;
        sorted.retain(|(chance, _)| {
            let is_kept = sum < how.top_p && *chance >= least && *chance > 0.0;
            sum += f64::from(*chance);
            is_kept
        });
        let whole: f64 = match how.top_p < 1.0 || how.min_p > 0.0 {
            true => sorted.iter().map(|(chance, _)| f64::from(*chance)).sum(),
            false => 1.0,
        };
        let mut sum = 0.0;
        let found = sorted.iter().find(|(chance, _)| {
            sum += f64::from(*chance);
            sum > number * whole
        });
        found.or(sorted.last()).unwrap().1
    }

    /// Probabilities with ties, in no order, of more tokens than are considered first: ties at the cut
    /// and draws from the tail come out as by sorting all.
    #[test]
    fn drawing_gives_what_sorting_gives() {
        let vocab = 2 * CANDIDATES + 13;
        let steep = |id: i64| ((id * 7919 % 101) as f32 / 20.0).exp();
        let flat = |id: i64| if id * 7919 % 101 < 3 { 2.0 } else { 1.0 };
        let banned = |id: i64| if id % 3 == 0 { 0.0 } else { 1.0 };
        for (name, weight) in [
            ("steep", &steep as &dyn Fn(i64) -> f32),
            ("flat", &flat),
            ("some without probability", &banned),
        ] {
            let weights: Vec<f32> = (0..vocab).map(weight).collect();
            let whole: f32 = weights.iter().sum();
            let chances: Vec<f32> = weights.iter().map(|weight| weight / whole).collect();
            let chances_there = Tensor::from_slice(&chances).unsqueeze(0);
            for step in 0..200 {
                let number = f64::from(step) / 200.0;
                let how = Sampling {
                    count: 1,
                    temperature: 1.0,
                    top_p: [0.05, 0.4, 0.7, 0.95, 1.0][step as usize % 5],
                    top_k: 0,
                    min_p: [0.0, 0.2, 0.9][step as usize % 3],
                    repetition_penalty: 1.0,
                    max_new_tokens: 1,
                    stop_strings: Vec::new(),
                    stop_token_ids: Vec::new(),
                };
                let numbers = Tensor::from_slice(&[number]);
                let few = Candidates::of(&chances_there, CANDIDATES, &how);
                let is_enough = few.is_enough(&how).unwrap().int64_value(&[0]) != 0;
                let found = if is_enough {
                    few.draw(&numbers)
                } else {
                    Candidates::of(&chances_there, vocab, &how).draw(&numbers)
                };
                let expected = plain(&chances, &how, number);
                assert_eq!(found.int64_value(&[0]), expected, "{name} {how:?} {number}");
                let all = Candidates::of(&chances_there, vocab, &how).draw(&numbers);
                assert_eq!(all.int64_value(&[0]), expected, "{name} {how:?} {number}");
                let on_host = draw_all(&chances_there, &how, &[number]);
                assert_eq!(on_host, [Some(expected)], "{name} {how:?} {number}");
            }
        }
    }
}
