//! Questions about a clip, each with a true and a careless answer.

use super::clip_parts::FRAMES;
use super::clips::{Clip, Event};
use super::questions::careless;
use super::random::Random;
use super::scene::{Object, Place};

/// A question with its answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClipQuestion {
    pub topic: Event,
    pub text: String,
    /// The answer that is true of the clip.
    pub answer: String,
    /// The mistake in careless answers, always the same for a clip: the opposite direction,
    /// confused kinds and colors, one too many.
    pub slip: String,
}

impl ClipQuestion {
    fn new(topic: Event, text: String, [answer, slip]: [String; 2]) -> Self {
        Self {
            topic,
            text,
            answer,
            slip,
        }
    }

    /// Returns a careless answer.
    pub fn careless(&self, random: &mut Random) -> &str {
        careless(&self.answer, &self.slip, random)
    }
}

/// Asks about the event of a clip. A shape that changes its color also appears; that is the second
/// question.
pub fn ask(clip: &Clip) -> Vec<ClipQuestion> {
    let first = &clip.eventful[0].object;
    let last = &clip.eventful[clip.eventful.len() - 1].object;
    let kind = first.kind.singular();
    match clip.event {
        Event::Appears => vec![what_appears(first)],
        Event::Moves => {
            let direction = clip.direction.expect("a crossing shape has a direction");
            let answer = |direction: &str| format!("The {kind} moves {direction}.");
            let answers = [direction, direction.opposite()].map(|way| answer(way.name()));
            let text = format!("Which way does the {kind} move?");
            vec![ClipQuestion::new(Event::Moves, text, answers)]
        }
        Event::Color => {
            let answers = [last.color, last.color.confused()]
                .map(|color| format!("The {kind} turns {}.", color.name));
            let text = format!("Which color does the {kind} turn?");
            let question = ClipQuestion::new(Event::Color, text, answers);
            vec![question, what_appears(first)]
        }
        Event::Count => {
            let count = clip.eventful.len();
            let text = "How many shapes are there in all?".to_owned();
            let answers = [count, count + 1].map(|count| match count {
                1 => "There is 1 shape in all.".to_owned(),
                _ => format!("There are {count} shapes in all."),
            });
            vec![ClipQuestion::new(Event::Count, text, answers)]
        }
    }
}

fn what_appears(object: &Object) -> ClipQuestion {
    let answers = [object.kind, object.kind.confused()].map(|kind| {
        let seen = Object {
            kind,
            ..object.clone()
        };
        format!("{} appears.", name(&seen))
    });
    ClipQuestion::new(Event::Appears, "What appears?".to_owned(), answers)
}

/// Returns more questions with true answers, for training: about the steps of the event, and about a
/// place in the first and in the last frame.
pub fn details(clip: &Clip, random: &mut Random) -> Vec<[String; 2]> {
    let first = &clip.eventful[0].object;
    let kind = first.kind.singular();
    let turn = |question: String, answer: String| [question, answer];
    let mut asked = match clip.event {
        Event::Appears => Vec::new(),
        Event::Moves => {
            let direction = clip.direction.expect("a crossing shape has a direction");
            let [from, to] = [first.place, direction.end(first.place)].map(Place::name);
            vec![
                turn("What moves?".to_owned(), format!("{} moves.", name(first))),
                turn(
                    format!("Where does the {kind} come in?"),
                    format!("The {kind} comes in at the {from}."),
                ),
                turn(
                    format!("Where does the {kind} go out?"),
                    format!("The {kind} goes out at the {to}."),
                ),
            ]
        }
        Event::Color => vec![turn(
            format!("Which color is the {kind} at first?"),
            format!("The {kind} is {} at first.", first.color.name),
        )],
        Event::Count => in_order(clip),
    };
    let place = random.pick(&Place::all());
    asked.extend([true, false].map(|is_first| what_is_in(clip, place, is_first)));
    random.shuffle(&mut asked);
    asked
}

/// Asks for each of the shapes that are counted, and for one more.
fn in_order(clip: &Clip) -> Vec<[String; 2]> {
    const NUMBERS: [&str; 4] = ["first", "second", "third", "fourth"];
    let shown = clip.eventful.iter().map(|part| name(&part.object));
    let shown = shown.chain(["Nothing".to_owned()]);
    let turn = |(name, number)| {
        [
            format!("What comes {number}?"),
            format!("{name} comes {number}."),
        ]
    };
    shown.zip(NUMBERS).map(turn).collect()
}

/// Asks for the shape at a place in the first or in the last frame, as questions about images do.
fn what_is_in(clip: &Clip, place: Place, is_first: bool) -> [String; 2] {
    let (frame, when) = if is_first {
        (0, "at first")
    } else {
        (FRAMES - 1, "at the end")
    };
    let parts = clip.still.iter().chain(&clip.eventful);
    let mut shown = parts.filter(|part| part.frames.contains(&frame));
    let found = shown.find(|part| part.object.place == place);
    let answer = match found {
        Some(part) => {
            let (color, kind) = (part.object.color.name, part.object.kind.singular());
            format!("There is one {color} {kind}.")
        }
        None => "There is nothing.".to_owned(),
    };
    [format!("What is in the {} {when}?", place.name()), answer]
}

/// Color and kind, with an article: "An orange star".
fn name(object: &Object) -> String {
    let (color, kind) = (object.color.name, object.kind.singular());
    let article = if color.starts_with('o') { "An" } else { "A" };
    format!("{article} {color} {kind}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn clips() -> impl Iterator<Item = Clip> {
        (0..384).map(|number| Clip::draw(number, &mut Random::named(4, &format!("{number}"))))
    }

    #[test]
    fn the_answers_about_an_event_are_equally_frequent() {
        let mut last_words: BTreeMap<(Event, String), usize> = BTreeMap::new();
        for clip in clips() {
            let question = &ask(&clip)[0];
            assert_eq!(question.topic, clip.event);
            let words: Vec<&str> = question.answer.split(' ').collect();
            let told = match clip.event {
                Event::Appears => words[1..3].join(" "),
                Event::Moves | Event::Color => words[3].to_owned(),
                Event::Count => words[2].to_owned(),
            };
            *last_words.entry((clip.event, told)).or_default() += 1;
        }
        for ((event, told), times) in &last_words {
            let answers = match event {
                Event::Appears => 48,
                Event::Color => 8,
                Event::Moves | Event::Count => 4,
            };
            assert_eq!(*times, 96 / answers, "{event:?}: {told}");
        }
        assert_eq!(last_words.len(), 48 + 8 + 4 + 4);
    }

    #[test]
    fn careless_answers_are_wrong_about_every_second_time() {
        let mut random = Random::named(0, "careless");
        let [mut wrong, mut all] = [0, 0];
        for question in clips().flat_map(|clip| ask(&clip)) {
            assert_ne!(question.answer, question.slip);
            wrong += usize::from(question.careless(&mut random) != question.answer);
            all += 1;
        }
        assert!(
            (all * 4 / 10..all * 6 / 10).contains(&wrong),
            "{wrong} of {all}"
        );
    }

    #[test]
    fn a_place_is_named_by_what_is_there() {
        for clip in clips().filter(|clip| clip.event == Event::Appears) {
            let object = &clip.eventful[0].object;
            let [_, before] = what_is_in(&clip, object.place, true);
            let [_, after] = what_is_in(&clip, object.place, false);
            assert_eq!(before, "There is nothing.");
            let (color, kind) = (object.color.name, object.kind.singular());
            assert_eq!(after, format!("There is one {color} {kind}."));
        }
    }
}
