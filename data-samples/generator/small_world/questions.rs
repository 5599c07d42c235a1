//! Questions about a scene, each with a true, a false and a careless answer.

use super::random::Random;
use super::scene::{COLORS, GROUPS_MAX, Group, Object, Paint, Place, Scene};
use super::shape::Kind;

/// The topic of a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Topic {
    Kind,
    Color,
    Count,
    Position,
    Description,
}

impl Topic {
    pub const ALL: [Self; 5] = [
        Self::Kind,
        Self::Color,
        Self::Count,
        Self::Position,
        Self::Description,
    ];

    /// The topic's name in the ids of records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kind => "kind",
            Self::Color => "color",
            Self::Count => "count",
            Self::Position => "position",
            Self::Description => "description",
        }
    }
}

/// The probability that a careless answer has the mistake of [`Question::slip`].
const CARELESSNESS: f64 = 0.55;

/// A question with its answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    pub topic: Topic,
    pub text: String,
    /// The answer that is true of the scene.
    pub answer: String,
    /// An answer of the same form that is not true of the scene.
    pub wrong: String,
    /// The mistake in careless answers, always the same for a scene: confused kinds and colors, one
    /// too many, left for right, an absent shape.
    pub slip: String,
    /// A false answer that the text alone does not give away: over many scenes, it and the true one
    /// occur equally often the other way round. `None` if there is none for this scene.
    pub fair: Option<String>,
}

impl Question {
    fn new(topic: Topic, text: String, answers: [String; 3], fair: Option<String>) -> Self {
        let [answer, wrong, slip] = answers;
        Self {
            fair: fair.filter(|fair| *fair != answer),
            topic,
            text,
            answer,
            wrong,
            slip,
        }
    }

    /// Returns a careless answer.
    pub fn careless(&self, random: &mut Random) -> &str {
        careless(&self.answer, &self.slip, random)
    }
}

/// Returns the true answer, or the mistake in careless ones.
pub fn careless<'a>(answer: &'a str, slip: &'a str, random: &mut Random) -> &'a str {
    if random.chance(CARELESSNESS) {
        slip
    } else {
        answer
    }
}

/// Asks about `topic`. Returns `None` if the scene allows no unambiguous question about it.
pub fn ask(scene: &Scene, topic: Topic, random: &mut Random) -> Option<Question> {
    match topic {
        Topic::Kind => Some(ask_kind(scene, random)),
        Topic::Color => Some(ask_color(scene, random)),
        Topic::Count => Some(ask_count(scene, random)),
        Topic::Position => ask_position(scene, random),
        Topic::Description => Some(ask_description(scene, random)),
    }
}

/// Returns a question about each place with its true answer. No answer reveals another place.
pub fn places(scene: &Scene) -> [[String; 2]; 4] {
    Place::all().map(|place| {
        let text = format!("What is in the {}?", place.name());
        let mut objects = scene.objects.iter();
        let answer = match objects.find(|object| object.place == place) {
            Some(object) => {
                let (color, kind) = (object.color.name, object.kind.singular());
                there_are(1, &format!("{color} {kind}"), "")
            }
            None => "There is nothing.".to_owned(),
        };
        [text, answer]
    })
}

/// Returns a question about the place of each unique shape, with its true answer.
pub fn positions(scene: &Scene) -> Vec<[String; 2]> {
    let lone = lone_objects(scene).into_iter();
    let turn = |object: &Object| {
        let (color, kind) = (object.color.name, object.kind.singular());
        let text = format!("Where is the {color} {kind}?");
        [text, where_it_is(object, object.place)]
    };
    lone.map(turn).collect()
}

/// Asks for the kind of the shape at a place, or of the shapes of a color.
fn ask_kind(scene: &Scene, random: &mut Random) -> Question {
    let colors_of_one_kind: Vec<&Group> = scene
        .groups
        .iter()
        .filter(|group| {
            scene
                .groups
                .iter()
                .filter(|other| other.color == group.color)
                .count()
                == 1
        })
        .collect();
    if !colors_of_one_kind.is_empty() && random.chance(0.5) {
        let group = random.pick(&colors_of_one_kind);
        let color = group.color.name;
        let kinds = kinds(group.kind, random);
        return if group.count == 1 {
            let text = format!("What is the {color} shape?");
            let answer = |kind: Kind| format!("The {color} shape is a {}.", kind.singular());
            even(Topic::Kind, text, kinds.map(answer), random)
        } else {
            let text = format!("What are the {color} shapes?");
            let answer = |kind: Kind| format!("The {color} shapes are {}.", kind.plural());
            even(Topic::Kind, text, kinds.map(answer), random)
        };
    }
    let object = &scene.objects[random.below(scene.objects.len())];
    let kinds = kinds(object.kind, random);
    let place = object.place.name();
    let text = format!("What kind of shape is in the {place}?");
    let answers = kinds.map(|kind| format!("It is a {}.", kind.singular()));
    even(Topic::Kind, text, answers, random)
}

/// Asks for the color of the shape at a place, or of the shapes of a kind.
fn ask_color(scene: &Scene, random: &mut Random) -> Question {
    let kinds_of_one_color: Vec<&Group> = scene
        .groups
        .iter()
        .filter(|group| {
            scene
                .groups
                .iter()
                .filter(|other| other.kind == group.kind)
                .count()
                == 1
        })
        .collect();
    if !kinds_of_one_color.is_empty() && random.chance(0.7) {
        let group = random.pick(&kinds_of_one_color);
        let colors = colors(group.color, random);
        let (is, kind) = match group.count {
            1 => ("is", group.kind.singular()),
            _ => ("are", group.kind.plural()),
        };
        let text = format!("What color {is} the {kind}?");
        let answer = colors.map(|color| format!("The {kind} {is} {}.", color.name));
        return even(Topic::Color, text, answer, random);
    }
    let object = &scene.objects[random.below(scene.objects.len())];
    let colors = colors(object.color, random);
    let text = format!("What color is the shape in the {}?", object.place.name());
    let answers = colors.map(|color| format!("It is {}.", color.name));
    even(Topic::Color, text, answers, random)
}

/// Asks for the number of shapes of a kind, of a color, or in total.
fn ask_count(scene: &Scene, random: &mut Random) -> Question {
    let group = random.pick(&scene.groups);
    let count = |wanted: &dyn Fn(&Object) -> bool| {
        scene.objects.iter().filter(|object| wanted(object)).count()
    };
    // The count in another scene: over many scenes, it is as frequent as the true one.
    let mut aside = random.clone();
    let other = Scene::draw(&mut aside);
    let theirs = aside.pick(&other.groups);
    let form = random.below(3);
    let there = match form {
        0 => other
            .objects
            .iter()
            .filter(|object| object.kind == theirs.kind)
            .count(),
        1 => other
            .objects
            .iter()
            .filter(|object| object.color == theirs.color)
            .count(),
        _ => other.objects.len(),
    };
    let (count, one, many) = match form {
        0 => {
            let kind = group.kind;
            let count = count(&|object| object.kind == kind);
            (count, kind.singular().to_owned(), kind.plural().to_owned())
        }
        1 => {
            let color = group.color;
            let count = count(&|object| object.color == color);
            (
                count,
                format!("{} shape", color.name),
                format!("{} shapes", color.name),
            )
        }
        _ => (scene.objects.len(), "shape".to_owned(), "shapes".to_owned()),
    };
    let counts = [count, other_than(&[1, 2, 3, 4], count, random), count + 1];
    let text = format!("How many {many} are there?");
    Question::new(
        Topic::Count,
        text,
        counts.map(|count| there_are(count, &one, &many)),
        Some(there_are(there, &one, &many)),
    )
}

/// Asks for the place of a unique shape.
fn ask_position(scene: &Scene, random: &mut Random) -> Option<Question> {
    let lone = lone_objects(scene);
    if lone.is_empty() {
        return None;
    }
    let object = random.pick(&lone);
    let places = [
        object.place,
        other_than(&Place::all(), object.place, random),
        object.place.mirrored(),
    ];
    let text = format!(
        "Where is the {} {}?",
        object.color.name,
        object.kind.singular()
    );
    let answers = places.map(|place| where_it_is(object, place));
    Some(even(Topic::Position, text, answers, random))
}

/// Asks for a description of the scene. The false answer has one wrong group.
fn ask_description(scene: &Scene, random: &mut Random) -> Question {
    let mut wrong = scene.groups.clone();
    let changed = random.below(wrong.len());
    let group = wrong[changed];
    wrong[changed] = loop {
        let other = match random.below(3) {
            0 => Group {
                kind: other_than(&Kind::ALL, group.kind, random),
                ..group
            },
            1 => Group {
                color: other_than(&COLORS, group.color, random),
                ..group
            },
            _ => Group {
                count: other_than(&[1, 2, 3, 4], group.count, random),
                ..group
            },
        };
        // Two groups of one kind and color would read oddly.
        let same = |(index, given): (usize, &Group)| {
            index != changed && given.kind == other.kind && given.color == other.color
        };
        if !scene.groups.iter().enumerate().any(same) {
            break other;
        }
    };
    let text = random
        .pick(&["Describe the picture.", "What is in the picture?"])
        .to_owned();
    let answer = |groups: &[Group]| format!("The picture shows {}.", list(groups));
    let mut slip = scene.groups.clone();
    slip.push(not_there(scene));
    let groups = [&scene.groups, &wrong, &slip];
    let fair = changed_evenly(scene, &mut random.clone());
    let fair = fair.map(|groups| answer(&groups));
    let answers = groups.map(|groups| answer(groups));
    Question::new(Topic::Description, text, answers, fair)
}

/// Returns the groups with one more, one less, or one of another kind or color. `None` if the drawn
/// change does not fit the scene: only reversible changes are made.
fn changed_evenly(scene: &Scene, random: &mut Random) -> Option<Vec<Group>> {
    let mut groups = scene.groups.clone();
    let changed = random.below(groups.len());
    match random.below(4) {
        0 if groups.len() < GROUPS_MAX => groups.push(not_there(scene)),
        1 if groups.len() > 1 => {
            groups.remove(changed);
        }
        2 => groups[changed].kind = other_than(&Kind::ALL, groups[changed].kind, random),
        3 => groups[changed].color = other_than(&COLORS, groups[changed].color, random),
        _ => return None,
    }
    Some(groups)
}

/// Builds a question whose possible answers are all equally frequent, so that any false one is
/// fair.
fn even(topic: Topic, text: String, answers: [String; 3], random: &Random) -> Question {
    let fair = answers[1 + random.clone().below(2)].clone();
    Question::new(topic, text, answers, Some(fair))
}

/// A single shape that the scene does not have: its first shape with confused kind and color, in
/// the next color that is free.
fn not_there(scene: &Scene) -> Group {
    let first = scene.groups[0];
    let kind = first.kind.confused();
    let start = COLORS
        .iter()
        .position(|color| *color == first.color.confused());
    let colors = COLORS
        .iter()
        .cycle()
        .skip(start.expect("a color of shapes"));
    let is_free = |color: &&Paint| {
        let same = |group: &Group| group.kind == kind && group.color == **color;
        !scene.groups.iter().any(same)
    };
    let color = *colors
        .take(COLORS.len())
        .find(is_free)
        .expect("a scene has fewer groups than there are colors");
    Group {
        kind,
        color,
        count: 1,
    }
}

/// The kind, another one, and the one that it is confused with.
fn kinds(kind: Kind, random: &mut Random) -> [Kind; 3] {
    [kind, other_than(&Kind::ALL, kind, random), kind.confused()]
}

/// The color, another one, and the one that it is confused with.
fn colors(color: Paint, random: &mut Random) -> [Paint; 3] {
    [color, other_than(&COLORS, color, random), color.confused()]
}

/// The shapes that no other shape equals in kind and color.
fn lone_objects(scene: &Scene) -> Vec<&Object> {
    let lone = |object: &&Object| {
        let equal = |other: &&Object| other.kind == object.kind && other.color == object.color;
        scene.objects.iter().filter(equal).count() == 1
    };
    scene.objects.iter().filter(lone).collect()
}

fn where_it_is(object: &Object, place: Place) -> String {
    let (color, kind) = (object.color.name, object.kind.singular());
    format!("The {color} {kind} is in the {}.", place.name())
}

fn there_are(count: usize, one: &str, many: &str) -> String {
    match count {
        1 => format!("There is one {one}."),
        _ => format!("There are {} {many}.", number(count)),
    }
}

/// Lists groups in words: "three red circles, one blue star and two green rings".
fn list(groups: &[Group]) -> String {
    let named: Vec<String> = groups
        .iter()
        .map(|group| {
            let kind = match group.count {
                1 => group.kind.singular(),
                _ => group.kind.plural(),
            };
            format!("{} {} {kind}", number(group.count), group.color.name)
        })
        .collect();
    match named.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
        None => "nothing".to_owned(),
    }
}

fn number(count: usize) -> &'static str {
    const WORDS: [&str; 6] = ["no", "one", "two", "three", "four", "five"];
    WORDS[count]
}

/// Returns one of `items` other than `given`.
fn other_than<T: Copy + PartialEq>(items: &[T], given: T, random: &mut Random) -> T {
    let others: Vec<T> = items
        .iter()
        .copied()
        .filter(|&item| item != given)
        .collect();
    random.pick(&others)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A scene of the given shapes; questions do not depend on the position within a place.
    fn scene(groups: &[(Kind, usize, usize)]) -> Scene {
        let mut scene = Scene::draw(&mut Random::named(0, "any"));
        scene.groups = groups
            .iter()
            .map(|&(kind, color, count)| Group {
                kind,
                color: COLORS[color],
                count,
            })
            .collect();
        let model = scene.objects[0].clone();
        let shapes: Vec<(Kind, Paint)> = scene
            .groups
            .iter()
            .flat_map(|group| std::iter::repeat_n((group.kind, group.color), group.count))
            .collect();
        scene.objects = shapes
            .into_iter()
            .zip(Place::all())
            .map(|((kind, color), place)| Object {
                kind,
                color,
                place,
                ..model.clone()
            })
            .collect();
        scene
    }

    #[test]
    fn a_scene_without_a_lone_shape_is_not_asked_for_a_position() {
        let scene = scene(&[(Kind::Cross, 3, 2)]);
        assert_eq!(
            ask(&scene, Topic::Position, &mut Random::named(0, "ask")),
            None
        );
    }

    #[test]
    fn counts_by_kind_span_colors() {
        let scene = scene(&[(Kind::Ring, 0, 1), (Kind::Ring, 1, 3)]);
        for number in 0..50 {
            let mut random = Random::named(0, &format!("{number}"));
            let question = ask(&scene, Topic::Count, &mut random).unwrap();
            if question.text == "How many rings are there?" {
                assert_eq!(question.answer, "There are four rings.");
            }
        }
    }

    #[test]
    fn false_answers_differ_from_true_ones() {
        for number in 0..500 {
            let mut random = Random::named(5, &format!("{number}"));
            let scene = Scene::draw(&mut random);
            for topic in Topic::ALL {
                if let Some(question) = ask(&scene, topic, &mut random) {
                    assert_ne!(question.answer, question.wrong);
                    assert_ne!(question.answer, question.slip);
                    assert!(question.text.ends_with(['?', '.']));
                }
            }
        }
    }
}
