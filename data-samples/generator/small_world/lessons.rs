//! The training data of the models of the small world: images outside both splits, conversations
//! about them, and preferences. None of it is committed; `pipelines/small-world.yaml` trains on it.
//!
//! The policy's conversations have careless answers ([`Question::careless`]): it learns to see, and
//! to make the mistakes that DPO then corrects. The judge's conversations are true at first. Then
//! they contain wrong words that are corrected at once ([`spoken::corrected`]): to predict a
//! correction, the model has to compare each word with the image. The critic's conversations
//! correct given answers in the same way and end in a verdict. The judge's preferences are a true
//! answer against a false one, in the format of LLaVA-Human-Preference.

use std::collections::BTreeSet;
use std::path::Path;

use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Value, json};

use super::files::{self, Outcome};
use super::questions::{self, Question, Topic};
use super::random::Random;
use super::render::{self, Format};
use super::scene::{Content, Place, Scene};
use super::spoken;

/// Topics of the questions about an image of a single shape, each in a conversation of its own:
/// with earlier answers in the context, the model would copy them instead of looking at the image.
const FIRST_TOPICS: [Topic; 3] = [Topic::Kind, Topic::Color, Topic::Description];

/// The placeholder of an image in a conversation.
const IMAGE: &str = "<image>";

/// Turns of a conversation of the policy.
const TURNS: usize = 6;

/// The question to the critic after a question and an answer; the same as in
/// `data-samples/critic.txt`.
const IS_IT_TRUE: &str = "Is that true?";

/// Preferences per image.
const PREFERENCES: usize = 4;

/// A conversation or a preference in LLaVA's JSON.
#[derive(Clone, Serialize)]
struct Record {
    id: String,
    image: String,
    conversations: Vec<Value>,
    #[serde(flatten)]
    preference: Option<Preference>,
}

#[derive(Clone, Serialize)]
#[expect(clippy::struct_field_names, reason = "the names of the records")]
struct Preference {
    output_1: Value,
    output_2: Value,
    /// The preferred output, 1 or 2.
    preference: u8,
    hallucination: bool,
}

/// Writes images and the records about them to the folder `to`: `first_steps` images of a single
/// shape, and `count` others. No image shows a scene in `taken`.
pub fn write(
    to: &Path,
    seed: u64,
    [first_steps, count]: [usize; 2],
    taken: &BTreeSet<Content>,
) -> Outcome<()> {
    let lessons: Vec<Lesson> = (1..=count)
        .into_par_iter()
        .map(|number| Lesson::write(to, seed, number, taken))
        .collect::<Outcome<_>>()?;
    let mut scans = Vec::with_capacity(count);
    let mut conversations = Vec::with_capacity(count);
    let mut positions = Vec::with_capacity(count);
    let mut true_conversations = Vec::with_capacity(count);
    let mut judgments = Vec::with_capacity(count);
    let mut corrected = [Vec::with_capacity(count), Vec::with_capacity(count)];
    let mut preferences = Vec::with_capacity(count * PREFERENCES);
    for lesson in lessons {
        scans.push(lesson.scan);
        conversations.push(lesson.conversation);
        positions.extend(lesson.positions);
        true_conversations.extend(lesson.true_conversation);
        let [scans, conversations] = &mut corrected;
        scans.push(lesson.corrected_scan);
        conversations.extend(lesson.corrected_conversation);
        judgments.extend(lesson.judgments);
        preferences.extend(lesson.preferences);
    }
    let simple = Scene::draw_simple as fn(&mut Random) -> Scene;
    for (name, scene) in [("first", simple), ("even", Scene::draw_even)] {
        let steps: Vec<Vec<Record>> = (1..=first_steps)
            .into_par_iter()
            .map(|number| first_step(to, seed, &format!("{name}-{number:05}"), scene, taken))
            .collect::<Outcome<_>>()?;
        files::write_json(&to.join(format!("{name}_steps.json")), &steps.concat())?;
    }
    files::write_json(&to.join("scans.json"), &scans)?;
    files::write_json(&to.join("conversations.json"), &conversations)?;
    files::write_json(&to.join("positions.json"), &positions)?;
    files::write_json(&to.join("true_conversations.json"), &true_conversations)?;
    let [corrected_scans, corrected_conversations] = corrected;
    files::write_json(&to.join("corrected_scans.json"), &corrected_scans)?;
    let path = to.join("corrected_conversations.json");
    files::write_json(&path, &corrected_conversations)?;
    files::write_json(&to.join("judgments.json"), &judgments)?;
    files::write_json(&to.join("preferences.json"), &preferences)
}

/// Draws and writes an image of shapes of one kind and color, with true answers to questions about
/// it.
fn first_step(
    to: &Path,
    seed: u64,
    id: &str,
    scene: fn(&mut Random) -> Scene,
    taken: &BTreeSet<Content>,
) -> Outcome<Vec<Record>> {
    let mut random = Random::named(seed, id);
    let scene = draw(scene, taken, &mut random);
    let image = format!("{id}.png");
    let bytes = render::picture(&scene, Format::QuickPng, &mut random)?;
    files::write(&to.join("images").join(&image), &bytes)?;
    let asked = FIRST_TOPICS.map(|topic| {
        loop {
            let question = questions::ask(&scene, topic, &mut random);
            let question = question.expect("these topics fit every scene");
            // A shape that fills the image is at no place of it.
            if !question.text.contains(Place::all()[0].name()) {
                return question;
            }
        }
    });
    let record = |question: &Question| Record {
        id: format!("{id}-{}", question.topic.name()),
        image: image.clone(),
        conversations: spoken(
            IMAGE,
            vec![[question.text.clone(), question.answer.clone()]],
        ),
        preference: None,
    };
    Ok(asked.iter().map(record).collect())
}

/// Draws a scene that is not in `taken`.
fn draw(scene: fn(&mut Random) -> Scene, taken: &BTreeSet<Content>, random: &mut Random) -> Scene {
    loop {
        let scene = scene(random);
        if !taken.contains(&scene.content()) {
            return scene;
        }
    }
}

/// The records about one image.
struct Lesson {
    scan: Record,
    /// The scan with corrected mistakes.
    corrected_scan: Record,
    /// The place of each unique shape, if there is one.
    positions: Option<Record>,
    conversation: Record,
    /// Questions with true answers, if any.
    true_conversation: Option<Record>,
    corrected_conversation: Option<Record>,
    /// A critic's judgments of answers.
    judgments: Option<Record>,
    preferences: Vec<Record>,
}

impl Lesson {
    /// Draws and writes an image, and builds the records about it.
    fn write(to: &Path, seed: u64, number: usize, taken: &BTreeSet<Content>) -> Outcome<Self> {
        let id = format!("lesson-{number:05}");
        let mut random = Random::named(seed, &id);
        let scene = draw(Scene::draw, taken, &mut random);
        let image = format!("{number:05}.png");
        let bytes = render::picture(&scene, Format::QuickPng, &mut random)?;
        files::write(&to.join("images").join(&image), &bytes)?;
        let record = |turns: Vec<[String; 2]>| Record {
            id: id.clone(),
            image: image.clone(),
            conversations: spoken(IMAGE, turns),
            preference: None,
        };
        let mut places = questions::places(&scene);
        random.shuffle(&mut places);
        let scan = record(places.to_vec());
        let conversation = record(careless_turns(&scene, &mut random));
        let mut preferences = Vec::with_capacity(PREFERENCES);
        let mut true_turns = Vec::with_capacity(PREFERENCES);
        for question in ask(&scene, PREFERENCES, &mut random) {
            let Some(wrong) = question.fair else {
                continue;
            };
            true_turns.push([question.text.clone(), question.answer.clone()]);
            let record = record(vec![[question.text, String::new()]]);
            preferences.push(Record {
                preference: Some(prefer(question.answer, wrong, &mut random)),
                ..record
            });
        }
        let mut random = Random::named(seed, &format!("{id}/positions"));
        let mut positions = questions::positions(&scene);
        random.shuffle(&mut positions);
        let mut random = Random::named(seed, &format!("{id}/corrected"));
        let mut corrected = |turns: &[[String; 2]]| {
            let mut turn = |[question, answer]: &[String; 2]| {
                let said = spoken::corrected(question, answer, &mut random);
                [question.clone(), said]
            };
            record(turns.iter().map(&mut turn).collect())
        };
        let mut random = Random::named(seed, &format!("{id}/judged"));
        let mut judge = |[question, answer]: &[String; 2]| {
            let [given, said] = spoken::judged(question, answer, &mut random);
            [format!("{question} {given} {IS_IT_TRUE}"), said]
        };
        let judged: Vec<[String; 2]> = true_turns.iter().map(&mut judge).collect();
        let if_any = |turns: &[[String; 2]]| (!turns.is_empty()).then(|| record(turns.to_vec()));
        Ok(Self {
            scan,
            corrected_scan: corrected(&places),
            positions: if_any(&positions),
            conversation,
            corrected_conversation: (!true_turns.is_empty()).then(|| corrected(&true_turns)),
            judgments: if_any(&judged),
            true_conversation: if_any(&true_turns),
            preferences,
        })
    }
}

/// Returns questions on random topics, no two with the same text.
fn ask(scene: &Scene, count: usize, random: &mut Random) -> Vec<Question> {
    let mut asked: Vec<Question> = Vec::new();
    for _ in 0..count * 4 {
        let topic = random.pick(&Topic::ALL);
        if let Some(question) = questions::ask(scene, topic, random)
            && !asked.iter().any(|other| other.text == question.text)
            && asked.len() < count
        {
            asked.push(question);
        }
    }
    asked
}

fn careless_turns(scene: &Scene, random: &mut Random) -> Vec<[String; 2]> {
    let asked = ask(scene, TURNS, random);
    let turn = |question: Question| {
        let answer = question.careless(random).to_owned();
        [question.text, answer]
    };
    asked.into_iter().map(turn).collect()
}

/// Returns a conversation in LLaVA's JSON: its questions and answers, after the placeholder of an
/// image or a video.
pub fn spoken(placeholder: &str, turns: Vec<[String; 2]>) -> Vec<Value> {
    let mut entries = Vec::with_capacity(turns.len() * 2);
    for (number, [question, answer]) in turns.into_iter().enumerate() {
        let text = match number {
            0 => format!("{placeholder}\n{question}"),
            _ => question,
        };
        entries.push(json!({ "from": "human", "value": text }));
        entries.push(json!({ "from": "gpt", "value": answer }));
    }
    entries
}

fn prefer(answer: String, wrong: String, random: &mut Random) -> Preference {
    let output = |text: String| json!({ "from": "gpt", "value": text });
    let is_first = random.chance(0.5);
    let [output_1, output_2] = if is_first {
        [answer, wrong]
    } else {
        [wrong, answer]
    }
    .map(output);
    Preference {
        output_1,
        output_2,
        preference: if is_first { 1 } else { 2 },
        hallucination: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn careless_writers_are_often_but_not_always_wrong() {
        let mut random = Random::named(0, "careless");
        let [mut wrong, mut all] = [0, 0];
        for number in 0..200 {
            let scene = Scene::draw(&mut Random::named(0, &format!("{number}")));
            for question in ask(&scene, TURNS, &mut random) {
                wrong += usize::from(question.careless(&mut random) != question.answer);
                all += 1;
            }
        }
        assert!(
            (all * 4 / 10..all * 6 / 10).contains(&wrong),
            "{wrong} of {all}"
        );
    }

    #[test]
    fn lessons_do_not_show_what_is_taken() {
        let folder = std::env::temp_dir().join(format!("ovchat-lessons-{}", std::process::id()));
        let scene =
            |number: u32| Scene::draw(&mut Random::named(3, &format!("lesson-{number:05}")));
        let taken = BTreeSet::from([scene(1).content()]);
        write(&folder, 3, [1, 2], &taken).unwrap();
        let text = std::fs::read(folder.join("scans.json")).unwrap();
        let records: Vec<Value> = serde_json::from_slice(&text).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(records.len(), 2);
        let turns = records[0]["conversations"].as_array().unwrap();
        assert!(turns[0]["value"].as_str().unwrap().starts_with("<image>\n"));
        assert!(
            turns[1..]
                .iter()
                .all(|turn| !turn["value"].as_str().unwrap().contains("<image>"))
        );
    }
}
