//! Scenes: the shapes of an image on a grid of two by two places, before rendering.

use super::random::Random;
use super::shape::Kind;

/// A color and its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Paint {
    pub name: &'static str,
    /// sRGB.
    pub rgb: [u8; 3],
}

const fn paint(name: &'static str, rgb: [u8; 3]) -> Paint {
    Paint { name, rgb }
}

impl Paint {
    /// The color that it is confused with: red and orange, yellow and brown, green and blue, purple
    /// and black are confused with each other.
    pub fn confused(self) -> Self {
        const PAIRS: [usize; 8] = [1, 0, 6, 4, 3, 7, 2, 5];
        let index = COLORS.iter().position(|color| *color == self);
        COLORS[PAIRS[index.expect("a color of shapes")]]
    }
}

/// The colors of shapes.
pub const COLORS: [Paint; 8] = [
    paint("red", [214, 48, 49]),
    paint("orange", [240, 128, 30]),
    paint("yellow", [247, 200, 34]),
    paint("green", [46, 160, 67]),
    paint("blue", [38, 108, 210]),
    paint("purple", [132, 62, 180]),
    paint("brown", [125, 78, 42]),
    paint("black", [38, 40, 46]),
];

/// The colors of backgrounds, far from all colors of shapes.
pub const GROUNDS: [Paint; 6] = [
    paint("white", [250, 250, 250]),
    paint("gray", [208, 211, 214]),
    paint("cream", [250, 240, 218]),
    paint("mint", [208, 240, 222]),
    paint("pink", [252, 218, 226]),
    paint("sky", [205, 228, 248]),
];

/// A soft background pattern. Questions never ask about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    Plain,
    /// A gradient, lighter at the top.
    Gradient,
    Dots,
    Stripes,
    /// Smooth noise.
    Clouds,
}

const PATTERNS: [Pattern; 5] = [
    Pattern::Plain,
    Pattern::Gradient,
    Pattern::Dots,
    Pattern::Stripes,
    Pattern::Clouds,
];

/// Image sizes, width before height, in many aspect ratios, so that their tilings differ.
const SIZES: [[u32; 2]; 9] = [
    [144, 108],
    [108, 144],
    [128, 128],
    [160, 100],
    [100, 160],
    [168, 80],
    [80, 168],
    [120, 96],
    [112, 112],
];

/// The longer side of an image of a single shape.
const SIMPLE_SIDE: u32 = 56;

/// The maximum number of groups in an image.
pub const GROUPS_MAX: usize = 3;

/// The maximum number of shapes in an image.
pub const SHAPES_MAX: usize = 4;

/// One of the four places of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The row, 0 is the top.
    pub row: usize,
    /// The column, 0 is the left.
    pub column: usize,
}

impl Place {
    /// All four places, row by row.
    pub fn all() -> [Self; 4] {
        std::array::from_fn(|index| Self {
            row: index / 2,
            column: index % 2,
        })
    }

    /// The place on the other side of the same row.
    pub fn mirrored(self) -> Self {
        Self {
            column: 1 - self.column,
            ..self
        }
    }

    /// The name of the place in questions and answers.
    pub fn name(self) -> &'static str {
        const NAMES: [[&str; 2]; 2] = [["top left", "top right"], ["bottom left", "bottom right"]];
        NAMES[self.row][self.column]
    }
}

/// A shape and its position.
#[derive(Debug, Clone)]
pub struct Object {
    pub kind: Kind,
    pub color: Paint,
    pub place: Place,
    /// The center, in pixels from the top left corner.
    pub center: [f64; 2],
    /// The radius, in pixels.
    pub radius: f64,
    /// Cosine and sine of the rotation angle.
    pub turn: [f64; 2],
}

/// All shapes of one kind and color in an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Group {
    pub kind: Kind,
    pub color: Paint,
    pub count: usize,
}

/// The sorted list of shapes with their colors and places.
pub type Content = Vec<(Place, Kind, Paint)>;

/// A whole image.
#[derive(Debug, Clone)]
pub struct Scene {
    pub width: u32,
    pub height: u32,
    pub ground: Paint,
    pub pattern: Pattern,
    /// The groups of shapes, no two of the same kind and color, in reading order of their first
    /// places.
    pub groups: Vec<Group>,
    /// From back to front; they do not overlap.
    pub objects: Vec<Object>,
}

impl Scene {
    /// Draws a scene.
    pub fn draw(random: &mut Random) -> Self {
        Self::draw_of(draw_groups, 2, random)
    }

    /// Draws a scene of a single shape that fills the image, as large as a place of a larger one.
    pub fn draw_simple(random: &mut Random) -> Self {
        Self::draw_of(|random| vec![draw_group(random, 1)], 1, random)
    }

    /// Draws a scene of one shape repeated at all four places.
    pub fn draw_even(random: &mut Random) -> Self {
        Self::draw_of(|random| vec![draw_group(random, SHAPES_MAX)], 2, random)
    }

    /// Draws a scene of some groups, each shape in a cell of a grid of `cells` by `cells`.
    fn draw_of(
        groups: impl FnOnce(&mut Random) -> Vec<Group>,
        cells: u32,
        random: &mut Random,
    ) -> Self {
        let size = random.pick(&SIZES);
        let longest = size[0].max(size[1]);
        let [width, height] = match cells {
            1 => size.map(|side| side * SIMPLE_SIDE / longest),
            _ => size,
        };
        let ground = random.pick(&GROUNDS);
        let pattern = random.pick(&PATTERNS);
        let mut groups = groups(random);

        let mut places = Place::all();
        if cells > 1 {
            random.shuffle(&mut places);
        }
        let kinds = groups
            .iter()
            .flat_map(|group| std::iter::repeat_n(group, group.count));
        let objects: Vec<Object> = kinds
            .zip(places)
            .map(|(group, place)| put(random, group, place, [width, height], cells))
            .collect();
        let first_place = |group: &Group| {
            let members = objects
                .iter()
                .filter(|object| object.kind == group.kind && object.color == group.color);
            members.map(|object| object.place).min()
        };
        groups.sort_by_key(first_place);
        Self {
            width,
            height,
            ground,
            pattern,
            groups,
            objects,
        }
    }

    /// The content of the image that questions can ask about: shapes with their colors and places.
    /// Two scenes of the same content have the same answers.
    pub fn content(&self) -> Content {
        let mut content: Vec<_> = self
            .objects
            .iter()
            .map(|object| (object.place, object.kind, object.color))
            .collect();
        content.sort_unstable();
        content
    }
}

/// Draws one to three groups of one to three shapes.
fn draw_groups(random: &mut Random) -> Vec<Group> {
    let wanted = 1 + random.below(GROUPS_MAX);
    let mut groups: Vec<Group> = Vec::new();
    let mut free = SHAPES_MAX;
    while groups.len() < wanted && free > 0 {
        // Single shapes are the most frequent, because questions about positions need them.
        let count = random.pick(&[1, 1, 1, 1, 2, 2, 3]).min(free);
        let group = draw_group(random, count);
        if groups
            .iter()
            .any(|other| other.kind == group.kind && other.color == group.color)
        {
            continue;
        }
        groups.push(group);
        free -= count;
    }
    groups
}

fn draw_group(random: &mut Random, count: usize) -> Group {
    Group {
        kind: random.pick(&Kind::ALL),
        color: random.pick(&COLORS),
        count,
    }
}

/// Puts a shape of `group` near the middle of `place`, rotated a little, in an image of `size` with a
/// grid of `cells` by `cells`.
pub fn put(random: &mut Random, group: &Group, place: Place, size: [u32; 2], cells: u32) -> Object {
    let cell = size.map(|side| f64::from(side) / f64::from(cells));
    let room = cell[0].min(cell[1]) / 2.0;
    let radius = room * random.between(0.74, 0.88);
    let mut coordinate = |index: usize, side: f64| {
        let slack = side / 2.0 - radius * 1.08;
        (index as f64 + 0.5) * side
            + random
                .between(-slack, slack)
                .clamp(-side / 24.0, side / 24.0)
    };
    let center = [
        coordinate(place.column, cell[0]),
        coordinate(place.row, cell[1]),
    ];
    // The half-angle form gives a point of the unit circle without a sine.
    let half: f64 = random.between(-0.12, 0.12);
    let turn = [
        (1.0 - half * half) / (1.0 + half * half),
        2.0 * half / (1.0 + half * half),
    ];
    Object {
        kind: group.kind,
        color: group.color,
        place,
        center,
        radius,
        turn,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scenes() -> impl Iterator<Item = Scene> {
        (0..300).map(|number| Scene::draw(&mut Random::named(1, &format!("scene {number}"))))
    }

    #[test]
    fn every_shape_lies_in_its_place_and_no_place_holds_two() {
        for scene in scenes() {
            let mut taken = Vec::new();
            for object in &scene.objects {
                let sides = [f64::from(scene.width) / 2.0, f64::from(scene.height) / 2.0];
                let cell = [object.place.column, object.place.row];
                for axis in 0..2 {
                    let low = cell[axis] as f64 * sides[axis];
                    assert!(object.center[axis] - object.radius >= low);
                    assert!(object.center[axis] + object.radius <= low + sides[axis]);
                }
                assert!(!taken.contains(&object.place));
                taken.push(object.place);
            }
        }
    }

    #[test]
    fn groups_stand_in_reading_order() {
        for scene in scenes() {
            let first = |group: &Group| {
                let mut content = scene.content().into_iter();
                content.position(|(_, kind, color)| kind == group.kind && color == group.color)
            };
            let order: Vec<_> = scene.groups.iter().map(first).collect();
            assert!(order.is_sorted(), "{order:?}");
        }
    }

    #[test]
    fn groups_count_the_objects() {
        for scene in scenes() {
            for group in &scene.groups {
                let same =
                    |object: &&Object| object.kind == group.kind && object.color == group.color;
                assert_eq!(scene.objects.iter().filter(same).count(), group.count);
            }
            let total: usize = scene.groups.iter().map(|group| group.count).sum();
            assert_eq!(total, scene.objects.len());
        }
    }
}
