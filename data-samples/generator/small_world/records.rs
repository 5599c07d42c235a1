//! The images of both splits, and the JSON files about them.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Serialize;

use super::files::{self, Outcome};
use super::questions::{self, Question, Topic};
use super::random::Random;
use super::render::{self, Format};
use super::scene::{Content, Scene};

/// The split of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    Train,
    HeldOut,
}

impl Split {
    pub const ALL: [Self; 2] = [Self::Train, Self::HeldOut];

    /// The name of the image folder, and the prefix of the ids.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::HeldOut => "heldout",
        }
    }
}

/// The numbers of images, questions and preferences.
#[derive(Debug, Clone, Copy)]
pub struct Counts {
    /// Training images, held-out images.
    pub pictures: [usize; 2],
    /// Questions per image, one per topic; fewer if a topic does not fit.
    pub questions: usize,
    /// Preferences per image.
    pub preferences: usize,
}

/// An image with its questions and preferences.
pub struct Picture {
    split: Split,
    /// The id, such as `train-0001`.
    id: String,
    /// The path below the folder `images`, such as `train/0001.png`.
    path: String,
    bytes: Vec<u8>,
    questions: Vec<Question>,
    /// Each with its rejected answer.
    preferences: Vec<(Question, String)>,
    content: Content,
}

/// All images.
pub struct World(Vec<Picture>);

/// A question in the JSON format of the demo; `answer` is the true one.
#[derive(Serialize)]
struct PromptRecord<'a> {
    id: String,
    image: &'a str,
    prompt: &'a str,
    answer: &'a str,
}

/// A preference in the JSON format of the demo.
#[derive(Serialize)]
struct PreferenceRecord<'a> {
    id: String,
    image: &'a str,
    prompt: &'a str,
    chosen: &'a str,
    rejected: &'a str,
}

/// Draws all images, no two with the same content. The held-out images come first, so that they do
/// not depend on the number of training images.
pub fn draw_world(seed: u64, counts: Counts) -> Outcome<World> {
    /// Scenes to try per image before the scenes are considered exhausted.
    const TRIES: usize = 1000;

    let mut shown = BTreeSet::new();
    let mut pictures = Vec::new();
    for (split, wanted) in Split::ALL.into_iter().zip(counts.pictures).rev() {
        for number in 1..=wanted {
            let id = format!("{}-{number:04}", split.name());
            let drawn = (0..TRIES).find_map(|attempt| {
                let mut random = Random::named(seed, &format!("{id}/{attempt}"));
                let scene = Scene::draw(&mut random);
                shown.insert(scene.content()).then_some((scene, random))
            });
            let (scene, mut random) = drawn
                .ok_or_else(|| format!("{id}: no unused scene is left; ask for fewer images"))?;
            pictures.push(draw_picture(
                split,
                number,
                id,
                &scene,
                counts,
                &mut random,
            )?);
        }
    }
    Ok(World(pictures))
}

/// Renders a scene and asks about it; the topic of the first question differs from image to image.
fn draw_picture(
    split: Split,
    number: usize,
    id: String,
    scene: &Scene,
    counts: Counts,
    random: &mut Random,
) -> Outcome<Picture> {
    let format = if number.is_multiple_of(6) {
        Format::Jpeg
    } else {
        Format::Png
    };
    let bytes = render::picture(scene, format, random)?;
    let topics = Topic::ALL
        .into_iter()
        .cycle()
        .skip(number % Topic::ALL.len());
    let mut ask = |topic| questions::ask(scene, topic, random);
    let questions: Vec<Question> = topics
        .clone()
        .take(Topic::ALL.len())
        .filter_map(&mut ask)
        .take(counts.questions)
        .collect();
    // Preferences start with the topics that the questions of this image leave out.
    let judged: Vec<Question> = topics
        .skip(counts.questions)
        .filter_map(ask)
        .take(counts.preferences)
        .collect();
    let preferences = judged.into_iter().filter_map(|question| {
        let wrong = question.fair.clone()?;
        Some((question, wrong))
    });
    let preferences = preferences.collect();
    Ok(Picture {
        split,
        path: format!("{}/{number:04}.{}", split.name(), format.extension()),
        bytes,
        questions,
        preferences,
        content: scene.content(),
        id,
    })
}

impl World {
    /// The images of one split.
    pub fn pictures(&self, split: Split) -> impl Iterator<Item = &Picture> {
        self.0.iter().filter(move |picture| picture.split == split)
    }

    /// Writes the images and their records to the folder `to`.
    pub fn write(&self, to: &Path) -> Outcome<()> {
        for picture in &self.0 {
            files::write(&to.join("images").join(&picture.path), &picture.bytes)?;
        }
        files::write_json(&to.join("prompts.json"), &self.prompts(Split::Train))?;
        files::write_json(&to.join("heldout.json"), &self.prompts(Split::HeldOut))?;
        let feedback = |split| self.feedback(split);
        files::write_json(&to.join("feedback.json"), &feedback(Split::Train))?;
        files::write_json(&to.join("heldout_feedback.json"), &feedback(Split::HeldOut))
    }

    /// The scenes of the held-out images; the training data shows none of them.
    pub fn held_out(&self) -> BTreeSet<Content> {
        let pictures = self.pictures(Split::HeldOut);
        pictures.map(|picture| picture.content.clone()).collect()
    }

    fn prompts(&self, split: Split) -> Vec<PromptRecord<'_>> {
        let mut records = Vec::new();
        for picture in self.pictures(split) {
            records.extend(picture.questions.iter().map(|question| PromptRecord {
                id: format!("{}-{}", picture.id, question.topic.name()),
                image: &picture.path,
                prompt: &question.text,
                answer: &question.answer,
            }));
        }
        records
    }

    fn feedback(&self, split: Split) -> Vec<PreferenceRecord<'_>> {
        let mut records = Vec::new();
        for picture in self.pictures(split) {
            let numbered = (1..).zip(&picture.preferences);
            records.extend(
                numbered.map(|(number, (question, wrong))| PreferenceRecord {
                    id: format!("{}-{}-{number}", picture.id, question.topic.name()),
                    image: &picture.path,
                    prompt: &question.text,
                    chosen: &question.answer,
                    rejected: wrong,
                }),
            );
        }
        records
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(train: usize, held_out: usize) -> World {
        draw_world(
            7,
            Counts {
                pictures: [train, held_out],
                questions: 5,
                preferences: 1,
            },
        )
        .unwrap()
    }

    #[test]
    fn more_training_pictures_leave_the_first_ones_as_they_were() {
        let (few, more) = (world(3, 0), world(5, 0));
        for (first, second) in few.0.iter().zip(&more.0) {
            assert_eq!(first.bytes, second.bytes);
            assert_eq!(first.questions, second.questions);
        }
    }

    #[test]
    fn ids_of_questions_are_unique() {
        let world = world(20, 5);
        let mut ids = BTreeSet::new();
        for split in Split::ALL {
            for record in world.prompts(split) {
                assert!(ids.insert(record.id.clone()), "{} comes twice", record.id);
            }
        }
        // Scenes without a unique shape have no question about positions.
        assert!((25 * 4..=25 * 5).contains(&ids.len()));
    }
}
