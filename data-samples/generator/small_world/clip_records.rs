//! The clips of both splits and of the training data, and the JSON files about them.

use std::collections::BTreeSet;
use std::path::Path;

use rayon::prelude::*;
use serde::Serialize;
use serde_json::Value;

use super::clip_questions::{self, ClipQuestion};
use super::clips::{Clip, ClipContent};
use super::files::{self, Outcome};
use super::lessons::spoken;
use super::random::Random;
use super::records::Split;
use super::video;

/// The placeholder of a video in a conversation.
const VIDEO: &str = "<video>";

/// A clip of one of the splits with its questions.
pub struct NumberedClip {
    split: Split,
    /// The id, such as `clip-train-0001`.
    id: String,
    /// The path in the folder of the JSON files, such as `clips/train/0001.mp4`.
    path: String,
    clip: Clip,
    questions: Vec<ClipQuestion>,
}

/// All clips of both splits, and more held-out clips, which only benchmarks use.
pub struct ClipWorld {
    clips: Vec<NumberedClip>,
    more: Vec<NumberedClip>,
}

/// The number of clips that only benchmarks use.
const MORE: usize = 100;

/// A question in the JSON format of the demo; `answer` is the true one.
#[derive(Serialize)]
struct PromptRecord<'a> {
    id: String,
    video: &'a str,
    prompt: &'a str,
    answer: &'a str,
}

/// A conversation in LLaVA's JSON.
#[derive(Serialize)]
struct ConversationRecord {
    id: String,
    video: String,
    conversations: Vec<Value>,
}

/// Draws the clips of both splits, no two with the same content: `counts` are the numbers of
/// training and held-out clips. The held-out clips come first, so that they do not depend on the
/// number of training clips.
pub fn draw_clips(seed: u64, counts: [usize; 2]) -> Outcome<ClipWorld> {
    let mut shown = BTreeSet::new();
    let mut clips = Vec::new();
    for (split, wanted) in Split::ALL.into_iter().zip(counts).rev() {
        for number in 1..=wanted {
            let name = split.name();
            let id = format!("clip-{name}-{number:04}");
            let clip = draw(seed, &id, number, &shown)?;
            shown.insert(clip.content());
            let mut questions = clip_questions::ask(&clip);
            // Held-out clips have one question each, so that all topics weigh the same.
            if split == Split::HeldOut {
                questions.truncate(1);
            }
            clips.push(NumberedClip {
                split,
                path: format!("clips/{name}/{number:04}.mp4"),
                id,
                clip,
                questions,
            });
        }
    }
    // The last ones drawn, so that no other clip depends on them.
    let mut more = Vec::new();
    for number in 1..=MORE {
        let id = format!("clip-benchmark-{number:04}");
        let clip = draw(seed, &id, number, &shown)?;
        shown.insert(clip.content());
        let mut questions = clip_questions::ask(&clip);
        questions.truncate(1);
        more.push(NumberedClip {
            split: Split::HeldOut,
            path: format!("clips/benchmark/{number:04}.mp4"),
            id,
            clip,
            questions,
        });
    }
    Ok(ClipWorld { clips, more })
}

/// Draws clip `number` of a series, with a content that is not in `taken`.
fn draw(seed: u64, id: &str, number: usize, taken: &BTreeSet<ClipContent>) -> Outcome<Clip> {
    /// Clips to try before the contents are considered exhausted.
    const TRIES: usize = 1000;

    let drawn = (0..TRIES).find_map(|attempt| {
        let mut random = Random::named(seed, &format!("{id}/{attempt}"));
        let clip = Clip::draw(number - 1, &mut random);
        (!taken.contains(&clip.content())).then_some(clip)
    });
    Ok(drawn.ok_or_else(|| format!("{id}: no unused scene is left; ask for fewer clips"))?)
}

impl ClipWorld {
    /// The clips of one split.
    pub fn clips(&self, split: Split) -> impl Iterator<Item = &NumberedClip> {
        self.clips.iter().filter(move |clip| clip.split == split)
    }

    /// Writes the clips and their questions to the folder `to`.
    pub fn write(&self, to: &Path) -> Outcome<()> {
        let all: Vec<&NumberedClip> = self.clips.iter().chain(&self.more).collect();
        all.par_iter()
            .try_for_each(|clip| video::write(&to.join(&clip.path), &clip.clip.frames()))?;
        let train = prompts(self.clips(Split::Train));
        files::write_json(&to.join("clips.json"), &train)?;
        let held_out = prompts(self.clips(Split::HeldOut));
        files::write_json(&to.join("heldout_clips.json"), &held_out)?;
        let of_benchmark = prompts(self.clips(Split::HeldOut).chain(&self.more));
        files::write_json(&to.join("benchmark_clips.json"), &of_benchmark)
    }

    /// The contents of all clips; the training data shows none of them.
    pub fn contents(&self) -> BTreeSet<ClipContent> {
        let all = self.clips.iter().chain(&self.more);
        all.map(|clip| clip.clip.content()).collect()
    }
}

/// Returns the questions about some clips.
fn prompts<'a>(clips: impl Iterator<Item = &'a NumberedClip>) -> Vec<PromptRecord<'a>> {
    let records = clips.flat_map(|clip| {
        clip.questions.iter().map(|question| PromptRecord {
            id: format!("{}-{}", clip.id, question.topic.name()),
            video: &clip.path,
            prompt: &question.text,
            answer: &question.answer,
        })
    });
    records.collect()
}

/// Writes `count` clips and the conversations about them to the folder `to`: `lessons.json` with
/// true answers, and `careless.json` with careless ones. No clip has a content in `taken`.
pub fn write_lessons(
    to: &Path,
    seed: u64,
    count: usize,
    taken: &BTreeSet<ClipContent>,
) -> Outcome<()> {
    let written: Vec<[ConversationRecord; 2]> = (1..=count)
        .into_par_iter()
        .map(|number| write_lesson(to, seed, number, taken))
        .collect::<Outcome<_>>()?;
    let (lessons, careless): (Vec<_>, Vec<_>) = written.into_iter().map(<_>::into).unzip();
    files::write_json(&to.join("lessons.json"), &lessons)?;
    files::write_json(&to.join("careless.json"), &careless)
}

/// Draws and writes a clip, and returns a conversation with true answers and one with careless
/// answers. The question about the event comes first: with earlier answers in the context, the model
/// would copy them instead of looking at the clip.
fn write_lesson(
    to: &Path,
    seed: u64,
    number: usize,
    taken: &BTreeSet<ClipContent>,
) -> Outcome<[ConversationRecord; 2]> {
    let id = format!("lesson-clip-{number:05}");
    let clip = draw(seed, &id, number, taken)?;
    let path = format!("clips/{number:05}.mp4");
    video::write(&to.join(&path), &clip.frames())?;
    let mut random = Random::named(seed, &format!("{id}/asked"));
    let questions = clip_questions::ask(&clip);
    let mut careless = Vec::with_capacity(questions.len());
    let mut turns = Vec::with_capacity(questions.len());
    for question in questions {
        careless.push([
            question.text.clone(),
            question.careless(&mut random).to_owned(),
        ]);
        turns.push([question.text, question.answer]);
    }
    turns.extend(clip_questions::details(&clip, &mut random));
    let record = |turns| ConversationRecord {
        id: id.clone(),
        video: path.clone(),
        conversations: spoken(VIDEO, turns),
    };
    Ok([record(turns), record(careless)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::small_world::clips::Event;

    #[test]
    fn more_training_clips_leave_the_other_ones_as_they_were() {
        let [few, more] = [[3, 2], [9, 2]].map(|counts| draw_clips(7, counts).unwrap());
        for (first, second) in few.0.iter().zip(&more.0) {
            assert_eq!(first.id, second.id);
            assert_eq!(first.clip.frames(), second.clip.frames());
            assert_eq!(first.questions, second.questions);
        }
    }

    #[test]
    fn no_two_clips_have_the_same_content() {
        let world = draw_clips(17, [220, 110]).unwrap();
        assert_eq!(world.contents().len(), 330);
        for split in Split::ALL {
            let ids: BTreeSet<String> = world
                .prompts(split)
                .into_iter()
                .map(|record| record.id)
                .collect();
            assert_eq!(ids.len(), world.prompts(split).len());
        }
        assert_eq!(world.prompts(Split::HeldOut).len(), 110);
        // A change of color has a second question.
        assert_eq!(world.prompts(Split::Train).len(), 220 + 55);
    }

    #[test]
    fn training_data_shows_nothing_that_is_taken() {
        let draw_first = |taken| draw(5, "lesson-clip-00001", 1, &taken).unwrap().content();
        let first = draw_first(BTreeSet::new());
        assert_eq!(first.0, Event::Appears);
        assert_ne!(draw_first(BTreeSet::from([first.clone()])), first);
    }
}
