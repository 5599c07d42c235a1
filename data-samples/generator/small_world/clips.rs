//! Clips: short videos in which one thing happens, before encoding.
//!
//! No single frame tells what happens. Nothing of the event is in the first frame; a shape that
//! crosses the clip comes in at one edge and leaves at the other; a shape that changes its color is
//! there only for a while, so that a frame does not tell the earlier color from the later one;
//! shapes that are counted are shown one at a time, together for as long as a single one.

use image::RgbImage;

use super::clip_parts::{self, Direction, FRAMES, Part, SIDE};
use super::random::Random;
use super::render;
use super::scene::{COLORS, Content, GROUNDS, Paint, Pattern, Place, Scene};
use super::shape::Kind;

/// The event of a clip, and the topic of the question about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// A shape appears beside one or two others and stays.
    Appears,
    /// A shape crosses the clip.
    Moves,
    /// A shape is there for a while and changes its color halfway.
    Color,
    /// One to four shapes are shown one after another.
    Count,
}

impl Event {
    pub const ALL: [Self; 4] = [Self::Appears, Self::Moves, Self::Color, Self::Count];

    /// The name of the topic in the ids of records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Appears => "appears",
            Self::Moves => "moves",
            Self::Color => "color",
            Self::Count => "count",
        }
    }
}

/// The content of a clip that its answers depend on: the event, the direction of a movement, the
/// shapes that are there all the time, and those of the event in their order.
pub type ClipContent = (Event, Option<Direction>, Content, Content);

/// A whole clip.
#[derive(Debug, Clone)]
pub struct Clip {
    pub event: Event,
    /// The direction of a crossing shape.
    pub direction: Option<Direction>,
    ground: Paint,
    /// The shapes that are there all the time.
    pub still: Vec<Part>,
    /// The shapes of the event, in the order in which they are shown; a shape that changes its
    /// color is listed once per color.
    pub eventful: Vec<Part>,
}

impl Clip {
    /// Draws clip `number` of a series in which the events alternate, and the answers to the
    /// questions about each event, so that all are about equally frequent.
    pub fn draw(number: usize, random: &mut Random) -> Self {
        let events = Event::ALL.len();
        Self::draw_of(Event::ALL[number % events], number / events, random)
    }

    /// Draws a clip of an event; `turn` decides the answer. The first frame is drawn before it.
    fn draw_of(event: Event, turn: usize, random: &mut Random) -> Self {
        let ground = random.pick(&GROUNDS);
        let mut places = Place::all();
        random.shuffle(&mut places);
        let mut kinds = Kind::ALL;
        random.shuffle(&mut kinds);
        let others = match event {
            Event::Appears => 1 + random.below(2),
            Event::Moves | Event::Color => random.below(2),
            Event::Count => 0,
        };
        let (taken, free) = places.split_at(others);
        let looks = taken.iter().zip(kinds);
        let stand = |(&place, kind)| {
            let color = random.pick(&COLORS);
            Part::standing(kind, color, place, 0..FRAMES, random)
        };
        let still: Vec<Part> = looks.map(stand).collect();
        // Questions name a shape by its kind, so it must be the only one.
        let kinds = &kinds[others..];
        let direction = Direction::ALL[turn % Direction::ALL.len()];
        let eventful = match event {
            Event::Appears => vec![clip_parts::appearing(turn, free[0], random)],
            Event::Moves => vec![clip_parts::crossing(
                kinds[0],
                direction,
                taken.first(),
                random,
            )],
            Event::Color => clip_parts::changing(kinds[0], turn, free[0], random).to_vec(),
            Event::Count => clip_parts::counted(1 + turn % places.len(), kinds, free, random),
        };
        Self {
            event,
            direction: (event == Event::Moves).then_some(direction),
            ground,
            still,
            eventful,
        }
    }

    /// Renders all frames.
    pub fn frames(&self) -> Vec<RgbImage> {
        (0..FRAMES).map(|frame| self.render(frame)).collect()
    }

    fn render(&self, frame: usize) -> RgbImage {
        let parts = self.still.iter().chain(&self.eventful);
        let scene = Scene {
            width: SIDE,
            height: SIDE,
            ground: self.ground,
            pattern: Pattern::Plain,
            groups: Vec::new(),
            objects: parts.filter_map(|part| part.at(frame)).collect(),
        };
        // Random details are those of patterns.
        render::render(&scene, &mut Random::named(0, "plain"))
    }

    /// The content that the answers depend on.
    pub fn content(&self) -> ClipContent {
        let content = |parts: &[Part]| -> Content {
            let objects = parts.iter().map(|part| &part.object);
            let content = objects.map(|object| (object.place, object.kind, object.color));
            content.collect()
        };
        let mut still = content(&self.still);
        still.sort_unstable();
        (self.event, self.direction, still, content(&self.eventful))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clips() -> impl Iterator<Item = Clip> {
        (0..400).map(|number| Clip::draw(number, &mut Random::named(1, &format!("{number}"))))
    }

    #[test]
    fn the_first_frame_is_the_same_for_every_answer() {
        for event in Event::ALL {
            for number in 0..20 {
                let first = |turn| {
                    let mut random = Random::named(2, &format!("{number}"));
                    Clip::draw_of(event, turn, &mut random).render(0)
                };
                for turn in 1..8 {
                    assert_eq!(first(0), first(turn), "{event:?}, clip {number}");
                }
            }
        }
    }

    #[test]
    fn the_event_is_over_or_lasts_and_shapes_stand_apart() {
        for clip in clips() {
            for part in &clip.eventful {
                assert!(part.frames.start >= 1 && part.frames.end <= FRAMES);
                assert!(part.frames.len() >= 2, "{clip:?}");
            }
            let stays = clip.eventful.last().unwrap().frames.end == FRAMES;
            match clip.event {
                Event::Appears => assert!(stays),
                Event::Moves | Event::Color => assert!(!stays),
                Event::Count => {}
            }
            let still = clip.still.iter().map(|part| part.object.place);
            let mut places: Vec<Place> = still.collect();
            let shown = clip.eventful.iter().map(|part| part.object.place);
            places.extend(shown.take(if clip.event == Event::Color { 1 } else { 4 }));
            let count = places.len();
            places.sort_unstable();
            places.dedup();
            assert_eq!(places.len(), count, "{clip:?}");
        }
    }
}
