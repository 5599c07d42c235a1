//! The parts of a clip: shapes in some of its frames, and the direction in which one moves.

use std::ops::Range;

use super::random::Random;
use super::scene::{self, COLORS, Group, Object, Paint, Place};
use super::shape::Kind;

/// The width and the height of a clip, in pixels: one tile of the policy's tower, which turns each
/// place of a frame into one token.
pub const SIDE: u32 = 56;

/// The number of frames of a clip.
pub const FRAMES: usize = 16;

/// The distance from the edge of the clip to the center of a crossing shape in the first and the
/// last frame that show it, in pixels. About a third of the shape is inside.
const OUTSIDE: f64 = 4.0;

/// A direction of movement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    Left,
    Right,
    Up,
    Down,
}

impl Direction {
    pub const ALL: [Self; 4] = [Self::Left, Self::Right, Self::Up, Self::Down];

    /// The name of the direction in answers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Right => "right",
            Self::Up => "up",
            Self::Down => "down",
        }
    }

    /// The opposite direction.
    pub fn opposite(self) -> Self {
        match self {
            Self::Left => Self::Right,
            Self::Right => Self::Left,
            Self::Up => Self::Down,
            Self::Down => Self::Up,
        }
    }

    fn is_horizontal(self) -> bool {
        matches!(self, Self::Left | Self::Right)
    }

    /// The first and the last column or row of a movement.
    fn ends(self) -> [usize; 2] {
        match self {
            Self::Right | Self::Down => [0, 1],
            Self::Left | Self::Up => [1, 0],
        }
    }

    /// The place in the same row (of a horizontal movement) or column, at an index of the other one.
    fn moved(self, place: Place, index: usize) -> Place {
        if self.is_horizontal() {
            Place {
                column: index,
                ..place
            }
        } else {
            Place {
                row: index,
                ..place
            }
        }
    }

    /// The place at which a crossing shape leaves that comes in at `place`.
    pub fn end(self, place: Place) -> Place {
        self.moved(place, self.ends()[1])
    }
}

/// A shape in some of the frames.
#[derive(Debug, Clone)]
pub struct Part {
    /// The shape in the first of these frames; a crossing shape is at the place where it comes in.
    pub object: Object,
    pub frames: Range<usize>,
    /// The movement from frame to frame, in pixels.
    step: [f64; 2],
}

impl Part {
    /// Puts a shape at a place.
    pub fn standing(
        kind: Kind,
        color: Paint,
        place: Place,
        frames: Range<usize>,
        random: &mut Random,
    ) -> Self {
        let group = Group {
            kind,
            color,
            count: 1,
        };
        Self {
            object: scene::put(random, &group, place, [SIDE, SIDE], 2),
            frames,
            step: [0.0, 0.0],
        }
    }

    /// Moves the shape along its row or column, from one edge of the clip to the other.
    fn crossing(mut self, direction: Direction) -> Self {
        let edges = [-OUTSIDE, f64::from(SIDE) + OUTSIDE];
        let [from, to] = direction.ends();
        let axis = usize::from(!direction.is_horizontal());
        self.object.place = direction.moved(self.object.place, from);
        self.object.center[axis] = edges[from];
        self.step[axis] = (edges[to] - edges[from]) / (self.frames.len() - 1) as f64;
        self
    }

    /// The shape in a frame, if it is there.
    pub fn at(&self, frame: usize) -> Option<Object> {
        let elapsed = self
            .frames
            .contains(&frame)
            .then(|| frame - self.frames.start)?;
        let mut object = self.object.clone();
        for (coordinate, step) in object.center.iter_mut().zip(self.step) {
            *coordinate += elapsed as f64 * step;
        }
        Some(object)
    }
}

/// A shape that appears in the middle and stays.
pub fn appearing(turn: usize, place: Place, random: &mut Random) -> Part {
    // Every kind with every color, in an order in which both alternate.
    let kind = Kind::ALL[turn % Kind::ALL.len()];
    let color = COLORS[(turn + turn / 24) % COLORS.len()];
    let start = 5 + random.below(7);
    Part::standing(kind, color, place, start..FRAMES, random)
}

/// A shape that crosses the clip in a row or column without another shape.
pub fn crossing(
    kind: Kind,
    direction: Direction,
    other: Option<&Place>,
    random: &mut Random,
) -> Part {
    let any = random.pick(&Place::all());
    let place = other.map_or(any, |other| Place {
        row: 1 - other.row,
        column: 1 - other.column,
    });
    let color = random.pick(&COLORS);
    let length = 8 + random.below(5);
    let start = 1 + random.below(FRAMES - 1 - length);
    let part = Part::standing(kind, color, place, start..start + length, random);
    part.crossing(direction)
}

/// A shape that is there for a while and changes its color halfway.
pub fn changing(kind: Kind, turn: usize, place: Place, random: &mut Random) -> [Part; 2] {
    let color = COLORS[turn % COLORS.len()];
    let before = loop {
        let before = random.pick(&COLORS);
        if before != color {
            break before;
        }
    };
    let lengths = [3 + random.below(3), 3 + random.below(3)];
    let start = 1 + random.below(FRAMES - 1 - lengths[0] - lengths[1]);
    let change = start + lengths[0];
    let first = Part::standing(kind, before, place, start..change, random);
    let mut second = first.clone();
    second.object.color = color;
    second.frames = change..change + lengths[1];
    [first, second]
}

/// Shapes that are shown one after another, each of another kind at another place.
pub fn counted(count: usize, kinds: &[Kind], places: &[Place], random: &mut Random) -> Vec<Part> {
    /// The fewest frames that show a shape.
    const SHOWN_MIN: usize = 2;

    let mut shown = vec![SHOWN_MIN; count];
    // The frames without a shape before each one and after the last; the first frame is empty.
    let mut empty = vec![0; count + 1];
    empty[0] = 1;
    // All shapes together are shown for as long as a single one.
    let total = 10 + random.below(4);
    for _ in count * SHOWN_MIN..total {
        shown[random.below(count)] += 1;
    }
    for _ in 1 + total..FRAMES {
        empty[random.below(count + 1)] += 1;
    }
    let mut start = 0;
    let mut parts = Vec::with_capacity(count);
    for (index, length) in shown.into_iter().enumerate() {
        start += empty[index];
        let color = random.pick(&COLORS);
        let frames = start..start + length;
        start = frames.end;
        parts.push(Part::standing(
            kinds[index],
            color,
            places[index],
            frames,
            random,
        ));
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crossing_shape_comes_in_at_one_edge_and_leaves_at_the_opposite_one() {
        for number in 0..40 {
            let mut random = Random::named(1, &format!("{number}"));
            let direction = Direction::ALL[number % 4];
            let part = crossing(Kind::Star, direction, None, &mut random);
            let ends = [part.frames.start, part.frames.end - 1];
            let [from, to] = ends.map(|frame| part.at(frame).unwrap().center);
            let moved = [to[0] - from[0], to[1] - from[1]];
            let distance = f64::from(SIDE) + 2.0 * OUTSIDE;
            let expected = match direction {
                Direction::Left => [-distance, 0.0],
                Direction::Right => [distance, 0.0],
                Direction::Up => [0.0, -distance],
                Direction::Down => [0.0, distance],
            };
            for (moved, expected) in moved.into_iter().zip(expected) {
                assert!((moved - expected).abs() < 1e-9, "{moved} for {expected}");
            }
            let place = part.object.place;
            assert_ne!(direction.end(place), place);
            assert_eq!(direction.opposite().end(direction.end(place)), place);
        }
    }

    #[test]
    fn counted_shapes_are_shown_one_at_a_time_for_as_long_as_a_single_one() {
        for count in 1..=4 {
            let mut shown = 0;
            for number in 0..100 {
                let mut random = Random::named(2, &format!("{number}"));
                let parts = counted(count, &Kind::ALL, &Place::all(), &mut random);
                assert_eq!(parts.len(), count);
                assert!(parts.is_sorted_by(|one, next| one.frames.end <= next.frames.start));
                shown += parts.iter().map(|part| part.frames.len()).sum::<usize>();
            }
            assert!((1120..1180).contains(&shown), "{shown} frames of {count}");
        }
    }
}
