//! The geometry of the shapes: distances from a point to the edge of a shape.
//!
//! Every shape has about the same area and fits into the circle of radius 1 around the origin, y
//! pointing down as in an image. Distances are negative inside.

/// A kind of shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Circle,
    Square,
    Triangle,
    Star,
    Cross,
    Ring,
}

impl Kind {
    pub const ALL: [Self; 6] = [
        Self::Circle,
        Self::Square,
        Self::Triangle,
        Self::Star,
        Self::Cross,
        Self::Ring,
    ];

    /// The kind that it is confused with.
    pub fn confused(self) -> Self {
        match self {
            Self::Circle => Self::Ring,
            Self::Ring => Self::Circle,
            Self::Square => Self::Triangle,
            Self::Triangle => Self::Square,
            Self::Star => Self::Cross,
            Self::Cross => Self::Star,
        }
    }

    /// The singular name.
    pub fn singular(self) -> &'static str {
        match self {
            Self::Circle => "circle",
            Self::Square => "square",
            Self::Triangle => "triangle",
            Self::Star => "star",
            Self::Cross => "cross",
            Self::Ring => "ring",
        }
    }

    /// The plural name.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Circle => "circles",
            Self::Square => "squares",
            Self::Triangle => "triangles",
            Self::Star => "stars",
            Self::Cross => "crosses",
            Self::Ring => "rings",
        }
    }

    /// The distance from `point` to the shape's edge, negative inside.
    pub fn distance(self, point: [f64; 2]) -> f64 {
        let from_center = (point[0] * point[0] + point[1] * point[1]).sqrt();
        match self {
            Self::Circle => from_center - 0.9,
            Self::Ring => (from_center - 0.72).abs() - 0.22,
            Self::Square => polygon(&SQUARE, point) - ROUND,
            Self::Triangle => polygon(&TRIANGLE, point) - ROUND,
            Self::Cross => polygon(&CROSS, point) - ROUND,
            Self::Star => polygon(&star(), point) - ROUND,
        }
    }
}

/// The radius of rounded corners: a smaller polygon grows by this.
const ROUND: f64 = 0.05;

const SQUARE: [[f64; 2]; 4] = [[-0.74, -0.74], [0.74, -0.74], [0.74, 0.74], [-0.74, 0.74]];
const TRIANGLE: [[f64; 2]; 3] = [[0.0, -0.92], [0.95, 0.74], [-0.95, 0.74]];
const CROSS: [[f64; 2]; 12] = [
    [-0.25, -0.9],
    [0.25, -0.9],
    [0.25, -0.25],
    [0.9, -0.25],
    [0.9, 0.25],
    [0.25, 0.25],
    [0.25, 0.9],
    [-0.25, 0.9],
    [-0.25, 0.25],
    [-0.9, 0.25],
    [-0.9, -0.25],
    [-0.25, -0.25],
];

/// The corners of a five-pointed star, one point up.
fn star() -> [[f64; 2]; 10] {
    // The cosine and the sine of 36 degrees.
    let cosine = f64::midpoint(1.0, 5.0_f64.sqrt()) / 2.0;
    let sine = (1.0 - cosine * cosine).sqrt();
    let mut direction = [0.0, -1.0];
    std::array::from_fn(|corner| {
        let radius = if corner % 2 == 0 { 0.98 } else { 0.43 };
        let here = direction.map(|part| part * radius);
        direction = [
            direction[0] * cosine - direction[1] * sine,
            direction[0] * sine + direction[1] * cosine,
        ];
        here
    })
}

/// The distance from `point` to a polygon's edge, negative inside (even-odd rule).
fn polygon(corners: &[[f64; 2]], point: [f64; 2]) -> f64 {
    let mut squared_min = f64::INFINITY;
    let mut inside = false;
    for (index, &from) in corners.iter().enumerate() {
        let to = corners[(index + 1) % corners.len()];
        let edge = [to[0] - from[0], to[1] - from[1]];
        let offset = [point[0] - from[0], point[1] - from[1]];
        let along =
            (offset[0] * edge[0] + offset[1] * edge[1]) / (edge[0] * edge[0] + edge[1] * edge[1]);
        let along = along.clamp(0.0, 1.0);
        let gap = [offset[0] - edge[0] * along, offset[1] - edge[1] * along];
        squared_min = squared_min.min(gap[0] * gap[0] + gap[1] * gap[1]);

        let crosses_height = (from[1] > point[1]) != (to[1] > point[1]);
        if crosses_height && offset[0] < edge[0] * offset[1] / edge[1] {
            inside = !inside;
        }
    }
    if inside {
        -squared_min.sqrt()
    } else {
        squared_min.sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_fits_the_unit_circle_and_only_the_ring_is_hollow() {
        for kind in Kind::ALL {
            assert_eq!(
                kind.distance([0.0, 0.0]) > 0.0,
                kind == Kind::Ring,
                "{kind:?}"
            );
            for step in -40_i32..=40 {
                let offset = f64::from(step) * 0.05;
                for point in [
                    [offset, 1.25],
                    [1.25, offset],
                    [offset, -1.25],
                    [-1.25, offset],
                ] {
                    assert!(kind.distance(point) > 0.0, "{kind:?} holds {point:?}");
                }
            }
        }
    }

    #[test]
    fn distances_to_a_square_are_exact() {
        let distance = polygon(&SQUARE, [1.74, 0.0]);
        assert!((distance - 1.0).abs() < 1e-12);
        let distance = polygon(&SQUARE, [0.0, 0.5]);
        assert!((distance + 0.24).abs() < 1e-12);
    }
}
