//! Answers with corrected mistakes, and the judgments of a critic.

use super::random::Random;
use super::scene::COLORS;
use super::shape::Kind;

/// The probability that a wrong word precedes the right one, see [`corrected`]; `SMALL_SLIPS` is
/// that of function words.
const SLIPS: f64 = 0.4;
const SMALL_SLIPS: f64 = 0.4 * SLIPS;

/// The word that retracts the previous word.
const TAKEN_BACK: &str = "No";

/// Returns a true answer with wrong words now and then, each corrected at once: "The star is blue
/// No red." Words that the question gives are always right.
pub fn corrected(question: &str, answer: &str, random: &mut Random) -> String {
    let spoken = speak(question, answer, random);
    let said = spoken.iter().flat_map(|word| match word.instead {
        Some(wrong) => vec![wrong, TAKEN_BACK, word.right],
        None => vec![word.right],
    });
    sentence(said)
}

/// Returns an answer that is true half of the time, and a critic's judgment of it: the answer with
/// its wrong words corrected, and 1 if it is true or 0 if not.
pub fn judged(question: &str, answer: &str, random: &mut Random) -> [String; 2] {
    /// Attempts to introduce a mistake before the answer stays as it is.
    const TRIES: usize = 20;
    let untouched = || {
        let words = words_of(answer).into_iter();
        words
            .map(|right| Spoken {
                right,
                instead: None,
            })
            .collect()
    };
    let mut spoken: Vec<Spoken<'_>> = untouched();
    if random.chance(0.5) {
        for _ in 0..TRIES {
            spoken = speak(question, answer, random);
            if spoken.iter().any(|word| word.instead.is_some()) {
                break;
            }
        }
    }
    let mut given = Vec::with_capacity(spoken.len());
    let mut said = Vec::with_capacity(spoken.len() * 2);
    let mut is_cut_off = false;
    for word in &spoken {
        said.extend(word.instead.iter().flat_map(|wrong| [*wrong, TAKEN_BACK]));
        said.push(word.right);
        if is_cut_off {
            continue;
        }
        given.push(word.instead.unwrap_or(word.right));
        match word.instead {
            // The answer describes fewer or more shapes than there are.
            Some(".") => is_cut_off = true,
            Some("and") => {
                let more = [
                    "one",
                    random.pick(&COLORS).name,
                    random.pick(&Kind::ALL).singular(),
                    ".",
                ];
                given.extend(more);
            }
            _ => {}
        }
    }
    let is_true = spoken.iter().all(|word| word.instead.is_none());
    let verdict = if is_true { "1" } else { "0" };
    [sentence(given), format!("{} {verdict}", sentence(said))]
}

/// A word of an answer, and the wrong word in its place, if any.
struct Spoken<'a> {
    right: &'a str,
    instead: Option<&'a str>,
}

fn speak<'a>(question: &str, answer: &'a str, random: &mut Random) -> Vec<Spoken<'a>> {
    let words = words_of(answer);
    let given = words_of(question);
    let is_description = answer.starts_with("The picture shows");
    let mut spoken = Vec::with_capacity(words.len());
    for (index, &right) in words.iter().enumerate() {
        let before = index.checked_sub(1).map(|index| words[index]);
        let is_given = given.contains(&right) || before == Some("The");
        let wrong = match right {
            "nothing" => Some(("one", SLIPS)),
            "one" if answer.starts_with("There is one") => Some(("nothing", SLIPS)),
            "is" if before == Some("There") => Some(("are", SMALL_SLIPS)),
            "are" if before == Some("There") => Some(("is", SMALL_SLIPS)),
            "," | "and" if is_description => Some((".", SMALL_SLIPS)),
            "." if is_description && !words.contains(&"and") => Some(("and", SMALL_SLIPS)),
            _ if is_given => None,
            _ => others_of(right, random).map(|other| (other, SLIPS)),
        };
        let instead = wrong.filter(|(_, share)| random.chance(*share));
        spoken.push(Spoken {
            right,
            instead: instead.map(|(wrong, _)| wrong),
        });
    }
    spoken
}

fn sentence<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    let words: Vec<&str> = words.into_iter().collect();
    words.join(" ").replace(" .", ".").replace(" ,", ",")
}

/// Splits a text into words and punctuation marks.
fn words_of(text: &str) -> Vec<&str> {
    let mut words = Vec::new();
    for word in text.split_whitespace() {
        let bare = word.trim_end_matches(['.', ',', '?']);
        words.push(bare);
        if bare.len() < word.len() {
            words.push(&word[bare.len()..]);
        }
    }
    words
}

/// Returns another word of the same class as `word`.
fn others_of(word: &str, random: &mut Random) -> Option<&'static str> {
    let alike: [Vec<&'static str>; 6] = [
        COLORS.iter().map(|color| color.name).collect(),
        Kind::ALL.iter().map(|kind| kind.singular()).collect(),
        Kind::ALL.iter().map(|kind| kind.plural()).collect(),
        vec!["two", "three", "four"],
        vec!["top", "bottom"],
        vec!["left", "right"],
    ];
    let words = alike.into_iter().find(|words| words.contains(&word))?;
    let others: Vec<&str> = words.into_iter().filter(|other| *other != word).collect();
    Some(random.pick(&others))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_back_is_followed_by_what_is_true() {
        let mut random = Random::named(0, "corrected");
        let (question, answer) = ("What color is the star?", "The star is red.");
        let mut slips = 0;
        for _ in 0..400 {
            let said = corrected(question, answer, &mut random);
            let words = words_of(&said);
            let mut kept: Vec<&str> = Vec::new();
            for word in words {
                if word == TAKEN_BACK {
                    slips += 1;
                    let wrong = kept.pop().unwrap();
                    assert_ne!(wrong, "red");
                    assert!(COLORS.iter().any(|color| color.name == wrong), "{said}");
                } else {
                    kept.push(word);
                }
            }
            assert_eq!(kept, words_of(answer), "{said}");
        }
        assert!((120..200).contains(&slips), "{slips} of 400");
    }

    #[test]
    fn a_critic_says_1_of_what_is_true_and_0_of_what_is_not() {
        let mut random = Random::named(0, "judged");
        let (question, answer) = ("What color is the star?", "The star is red.");
        let mut right = 0;
        for _ in 0..400 {
            let [given, said] = judged(question, answer, &mut random);
            let is_true = given == answer;
            right += usize::from(is_true);
            assert!(
                said.ends_with(if is_true { " 1" } else { " 0" }),
                "{given}: {said}"
            );
            assert_eq!(said.contains(TAKEN_BACK), !is_true);
        }
        assert!((170..240).contains(&right), "{right} of 400");
    }
}
