//! Known words for messages: the one that is nearest to a misspelled word, and lists.

/// The maximum length, in characters, of a word that gets a suggestion.
const LETTERS_MAX: usize = 100;

/// Returns the known word most similar to `word`, if it is similar enough: at most a third of its
/// letters are wrong, missing, superfluous or swapped.
pub fn suggest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if word.chars().nth(LETTERS_MAX).is_some() {
        return None;
    }
    let allowed = (word.chars().count() / 3).max(1);
    let distance =
        |candidate: &&str| edit_distance(&word.to_lowercase(), &candidate.to_lowercase());
    let nearest = known.into_iter().min_by_key(distance)?;
    (distance(&nearest) <= allowed).then_some(nearest)
}

/// Counts the inserted, deleted, replaced and swapped letters from `a` to `b` (optimal string
/// alignment distance).
fn edit_distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().collect();
    let b: Vec<char> = b.chars().collect();
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    rows[0] = (0..=b.len()).collect();
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut least = replaced.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = least;
        }
    }
    rows[a.len()][b.len()]
}

/// Names joined for a message: "`a`, `b`".
pub fn listed<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let quoted: Vec<_> = names.into_iter().map(|name| format!("`{name}`")).collect();
    quoted.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_counts_a_swap_once() {
        assert_eq!(edit_distance("temprature", "temperature"), 1);
        assert_eq!(edit_distance("sapmle", "sample"), 1);
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(edit_distance("kitten", "sitting"), 3);
    }

    #[test]
    fn only_near_words_are_guessed() {
        let known = ["prompts", "model", "temperature"];
        assert_eq!(suggest("promts", known), Some("prompts"));
        assert_eq!(suggest("Model", known), Some("model"));
        assert_eq!(suggest("weights", known), None);
        assert_eq!(suggest("x", []), None);
        let long = "x".repeat(1 << 20);
        assert_eq!(suggest(&long, [long.as_str()]), None);
    }
}
