//! What a picture shows, before any pixel of it: shapes on a grid of three by three places.

use super::random::Random;
use super::shape::Kind;

/// A color and the word for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Paint {
    pub name: &'static str,
    /// sRGB.
    pub rgb: [u8; 3],
}

const fn paint(name: &'static str, rgb: [u8; 3]) -> Paint {
    Paint { name, rgb }
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

/// How a background is decorated, softly. Questions never ask about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    Plain,
    /// Lighter above, darker below.
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

/// Sizes of pictures, width before height, in many aspect ratios, so that their tilings differ.
const SIZES: [[u32; 2]; 9] = [
    [240, 180],
    [180, 240],
    [200, 200],
    [320, 180],
    [256, 144],
    [150, 225],
    [120, 90],
    [300, 120],
    [132, 132],
];

/// Most shapes in a picture.
const SHAPES_MAX: usize = 7;

/// One of the nine places of a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// 0 is the top.
    pub row: usize,
    /// 0 is the left.
    pub column: usize,
}

impl Place {
    /// All nine, row by row.
    pub fn all() -> [Self; 9] {
        std::array::from_fn(|index| Self {
            row: index / 3,
            column: index % 3,
        })
    }

    /// What people call it.
    pub fn name(self) -> &'static str {
        const NAMES: [[&str; 3]; 3] = [
            ["top left", "top center", "top right"],
            ["middle left", "center", "middle right"],
            ["bottom left", "bottom center", "bottom right"],
        ];
        NAMES[self.row][self.column]
    }
}

/// One shape where it is.
#[derive(Debug, Clone)]
pub struct Object {
    pub kind: Kind,
    pub color: Paint,
    pub place: Place,
    /// The middle, in pixels from the top left corner.
    pub center: [f64; 2],
    /// In pixels.
    pub radius: f64,
    /// Cosine and sine of the angle by which it is turned.
    pub turn: [f64; 2],
}

/// All shapes of one kind and color in a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Group {
    pub kind: Kind,
    pub color: Paint,
    pub count: usize,
}

/// A whole picture.
#[derive(Debug, Clone)]
pub struct Scene {
    pub width: u32,
    pub height: u32,
    pub ground: Paint,
    pub pattern: Pattern,
    /// The groups that the shapes make, no two of the same kind and color.
    pub groups: Vec<Group>,
    /// From back to front; they do not overlap.
    pub objects: Vec<Object>,
}

impl Scene {
    /// Draws a scene.
    pub fn draw(random: &mut Random) -> Self {
        let [width, height] = random.pick(&SIZES);
        let ground = random.pick(&GROUNDS);
        let pattern = random.pick(&PATTERNS);
        let groups = draw_groups(random);

        let mut places = Place::all();
        random.shuffle(&mut places);
        let kinds = groups
            .iter()
            .flat_map(|group| std::iter::repeat_n(group, group.count));
        let objects = kinds
            .zip(places)
            .map(|(group, place)| put(random, group, place, [width, height]))
            .collect();
        Self {
            width,
            height,
            ground,
            pattern,
            groups,
            objects,
        }
    }

    /// What the picture shows as far as questions go: which shape in which color at which place.
    /// Two scenes of the same content have the same answers.
    pub fn content(&self) -> Vec<(Place, Kind, Paint)> {
        let mut content: Vec<_> = self
            .objects
            .iter()
            .map(|object| (object.place, object.kind, object.color))
            .collect();
        content.sort_unstable();
        content
    }
}

/// Draws one to three groups of one to four shapes.
fn draw_groups(random: &mut Random) -> Vec<Group> {
    let wanted = 1 + random.below(3);
    let mut groups: Vec<Group> = Vec::new();
    let mut free = SHAPES_MAX;
    while groups.len() < wanted && free > 0 {
        let kind = random.pick(&Kind::ALL);
        let color = random.pick(&COLORS);
        if groups
            .iter()
            .any(|group| group.kind == kind && group.color == color)
        {
            continue;
        }
        // Single shapes are the most frequent: only they can be asked for their place.
        let count = random.pick(&[1, 1, 1, 2, 2, 3, 4]).min(free);
        groups.push(Group { kind, color, count });
        free -= count;
    }
    groups
}

/// Puts a shape of `group` somewhere about the middle of `place`, turned a little.
fn put(random: &mut Random, group: &Group, place: Place, size: [u32; 2]) -> Object {
    let cell = size.map(|side| f64::from(side) / 3.0);
    let room = cell[0].min(cell[1]) / 2.0;
    let radius = room * random.between(0.62, 0.88);
    let mut coordinate = |index: usize, side: f64| {
        let slack = side / 2.0 - radius * 1.08;
        (index as f64 + 0.5) * side + random.between(-slack, slack).clamp(-side / 7.0, side / 7.0)
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
                let sides = [f64::from(scene.width) / 3.0, f64::from(scene.height) / 3.0];
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
