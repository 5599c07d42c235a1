//! Reading of the health of a run: its rows by round, the best round, and numbers as they are shown.

use ovchat_data::store::{RunFolder, StoreError, read_file};
use ovchat_data::tables::{Health, Row};

/// The metric of the value of `rounds.by`.
pub const KEPT_BY: &str = "kept_by";

/// The best round of a run, by `rounds.by`.
#[derive(Debug, Clone, PartialEq)]
pub struct BestRound {
    pub round: u32,
    pub value: f64,
    /// The values of all rounds that have a checkpoint.
    pub values: Vec<(u32, f64)>,
}

/// Returns the rows of the table `health` of a run, by round.
pub fn health_of(run: &RunFolder) -> Result<Vec<(u32, Vec<Health>)>, StoreError> {
    let mut rounds = Vec::new();
    for made in &run.manifest().made {
        if let (true, Some(Health::KIND), Some(round)) =
            (made.complete, made.kind.as_deref(), made.round)
        {
            let mut rows = Vec::new();
            for file in made.files() {
                rows.extend(read_file::<Health>(&run.root().join(&file.file))?);
            }
            rounds.push((round, rows));
        }
    }
    rounds.sort_by_key(|(round, _)| *round);
    Ok(rounds)
}

/// Returns the best round of a run; `None` if its pipeline does not have `keep: best`. Of rounds with
/// equal values, the earliest is the best.
pub fn best_round(run: &RunFolder) -> Result<Option<BestRound>, StoreError> {
    let trained = |round| {
        let mut made = run.manifest().made.iter();
        made.any(|made| made.round == Some(round) && made.checkpoint.is_some())
    };
    let rounds = health_of(run)?;
    let of = |rows: &'_ [Health]| rows.iter().find(|row| row.metric == KEPT_BY).cloned();
    // After a change of the query, the values of rounds that were not computed again do not count.
    let query = rounds
        .last()
        .and_then(|(_, rows)| of(rows))
        .map(|row| row.source);
    let mut values = Vec::new();
    for (round, rows) in &rounds {
        let row = of(rows).filter(|row| Some(&row.source) == query.as_ref());
        if let Some(value) = row.and_then(|row| row.value)
            && trained(*round)
        {
            values.push((*round, value));
        }
    }
    let best = values
        .iter()
        .copied()
        .reduce(|best, next| if next.1 > best.1 { next } else { best });
    Ok(best.map(|(round, value)| BestRound {
        round,
        value,
        values,
    }))
}

/// Returns a number with three significant digits.
pub fn rounded(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return format!("{value}");
    }
    if value.abs() < 1e-4 || value.abs() >= 1e15 {
        let text = format!("{value:.2e}");
        let (digits, power) = text.split_once('e').expect("an exponent");
        let digits = digits.trim_end_matches('0').trim_end_matches('.');
        return format!("{digits}e{power}");
    }
    let digits = (2 - value.abs().log10().floor() as i32).clamp(0, 6) as usize;
    let text = format!("{value:.digits$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::rounded;

    #[test]
    fn numbers_have_three_digits_and_are_never_rounded_to_zero() {
        let cases = [
            (0.0, "0"),
            (-0.2593, "-0.259"),
            (1234.5, "1234"),
            (0.000_157_2, "0.000157"),
            (1e-7, "1e-7"),
            (-3.14e-9, "-3.14e-9"),
            (9.9999, "10"),
            (1e38, "1e38"),
        ];
        for (value, text) in cases {
            assert_eq!(rounded(value), text);
        }
    }
}
