//! Parity of token probabilities after filtering, and of sampled frequencies.

use std::path::Path;

use tch::{Device, Kind};

use super::{Recorded, Report, compare, json};
use ovchat_models::Sampling;
use ovchat_torch::sampling::{Chooser, uniform};

#[derive(serde::Deserialize)]
struct Cases {
    banned: Vec<i64>,
    how: Vec<How>,
}

#[derive(serde::Deserialize)]
struct How {
    temperature: f64,
    #[serde(default = "one")]
    top_p: f64,
    #[serde(default)]
    top_k: usize,
    #[serde(default)]
    min_p: f64,
    #[serde(default = "one")]
    repetition_penalty: f64,
}

fn one() -> f64 {
    1.0
}

/// A row whose cumulative probability is this close to `top_p` may keep another set in float32.
const EDGE: f64 = 1e-6;
const DRAWS: usize = 20_000;

#[test]
fn tokens_are_drawn_from_the_distribution_of_the_reference() {
    compare("sampling", "sampling", block);
}

fn block(folder: &Path, report: &mut Report) {
    let cases: Cases = json(&folder.join("how.json"));
    let recorded = Recorded::open(&folder.join("expected.safetensors"));
    let (logits, occurred) = (recorded.tensor("logits"), recorded.integers("occurred"));
    let [rows, vocab] = logits.size()[..] else {
        panic!("a matrix")
    };
    for (index, how) in cases.how.iter().enumerate() {
        let how = Sampling {
            count: 1,
            temperature: how.temperature,
            top_p: how.top_p,
            top_k: how.top_k,
            min_p: how.min_p,
            stop_strings: Vec::new(),
            stop_token_ids: Vec::new(),
            repetition_penalty: how.repetition_penalty,
            max_new_tokens: 1,
        };
        let case = format!(
            "temperature {}, top-p {}, top-k {}, min-p {}, repetition penalty {}",
            how.temperature, how.top_p, how.top_k, how.min_p, how.repetition_penalty
        );
        let chooser = |rows| {
            let mut chooser = Chooser::new(&how, vocab, &cases.banned, Device::Cpu);
            chooser.enter(rows, &occurred);
            chooser
        };
        let found = chooser(rows as usize).distribution(&logits);
        let expected = recorded
            .tensor(&format!("probabilities.{index}"))
            .to_kind(Kind::Double);
        let expected = Vec::<Vec<f64>>::try_from(expected).unwrap();
        let edges = recorded.numbers(&format!("edge.{index}"));
        let (mut apart, mut other_sets, mut compared) = (0.0_f64, 0, 0);
        for ((found, expected), edge) in found.iter().zip(&expected).zip(edges) {
            if edge < EDGE {
                continue;
            }
            compared += 1;
            let set = |row: &[f64]| row.iter().map(|&chance| chance > 0.0).collect::<Vec<_>>();
            other_sets += usize::from(set(found) != set(expected));
            let differences = found
                .iter()
                .zip(expected)
                .map(|(one, two)| (one - two).abs());
            apart = differences.fold(apart, f64::max);
        }
        report.equal(format!("{case}: the set kept"), other_sets, compared);
        report.line(
            format!("{case}: probabilities"),
            [apart; 2],
            "1e-6",
            apart <= 1e-6,
        );

        // Draws from the first row, as sampling does.
        let mut counts = vec![0.0; vocab as usize];
        let numbers: Vec<f64> = (0..DRAWS).map(|draw| uniform(5, draw)).collect();
        for numbers in numbers.chunks(1000) {
            let logits = logits
                .narrow(0, 0, 1)
                .expand([numbers.len() as i64, vocab], false);
            for token in chooser(numbers.len()).choose(&logits, numbers).tokens {
                counts[token.unwrap() as usize] += 1.0;
            }
        }
        let deviations = chi_square(&counts, &expected[0]);
        report.line(
            format!("{case}: {DRAWS} draws, chi-square in standard deviations"),
            [deviations.abs(), 0.0],
            "4",
            deviations.abs() <= 4.0,
        );
    }
}

/// The deviation of the chi-square of `counts` from its expectation under `expected`, in standard
/// deviations. Tokens with an expected count below five are merged.
fn chi_square(counts: &[f64], expected: &[f64]) -> f64 {
    let total: f64 = counts.iter().sum();
    let (mut statistic, mut cells) = (0.0, 0.0);
    let mut rare = [0.0, 0.0];
    let mut add = |count: f64, expected: f64| {
        statistic += (count - expected).powi(2) / expected;
        cells += 1.0;
    };
    for (&count, &chance) in counts.iter().zip(expected) {
        if chance * total < 5.0 {
            rare[0] += count;
            rare[1] += chance * total;
        } else {
            add(count, chance * total);
        }
    }
    if rare[1] > 0.0 {
        add(rare[0], rare[1]);
    } else if rare[0] > 0.0 {
        return f64::INFINITY; // a token of probability 0 was drawn
    }
    let freedom: f64 = cells - 1.0;
    if freedom < 1.0 {
        return 0.0;
    }
    (statistic - freedom) / (2.0 * freedom).sqrt()
}
