//! Rendering of a scene to the bytes of an image file.

use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{Rgb, RgbImage};

use super::files::Outcome;
use super::random::Random;
use super::scene::{Object, Paint, Pattern, Scene};

/// A color during blending: sRGB, 0 to 255.
type Color = [f64; 3];

/// The format of an image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Png,
    /// PNG with fast compression: larger files in a tenth of the time.
    QuickPng,
    Jpeg,
}

impl Format {
    /// The file extension.
    pub fn extension(self) -> &'static str {
        match self {
            Self::Png | Self::QuickPng => "png",
            Self::Jpeg => "jpg",
        }
    }
}

/// Renders `scene` and encodes it as `format`. `random` decides the details of the background.
pub fn picture(scene: &Scene, format: Format, random: &mut Random) -> Outcome<Vec<u8>> {
    let pixels = render(scene, random);
    let mut bytes = Vec::new();
    match format {
        Format::Png => pixels.write_with_encoder(PngEncoder::new_with_quality(
            &mut bytes,
            CompressionType::Best,
            FilterType::Adaptive,
        ))?,
        Format::QuickPng => pixels.write_with_encoder(PngEncoder::new_with_quality(
            &mut bytes,
            CompressionType::Fast,
            FilterType::Sub,
        ))?,
        Format::Jpeg => pixels.write_with_encoder(JpegEncoder::new_with_quality(&mut bytes, 90))?,
    }
    Ok(bytes)
}

/// Renders `scene`. `random` decides the details of the background.
pub fn render(scene: &Scene, random: &mut Random) -> RgbImage {
    let ground = Ground::new(scene, random);
    RgbImage::from_fn(scene.width, scene.height, |x, y| {
        let point = [f64::from(x) + 0.5, f64::from(y) + 0.5];
        let mut color = ground.color(point);
        for object in &scene.objects {
            color = shade(color, object, point);
        }
        Rgb(color.map(|level| level.round().clamp(0.0, 255.0) as u8))
    })
}

/// Draws `object` and its soft shadow over `below` at `point`.
fn shade(below: Color, object: &Object, point: [f64; 2]) -> Color {
    let softness = object.radius * 0.22;
    let shadow_at = [
        point[0] - object.radius * 0.07,
        point[1] - object.radius * 0.12,
    ];
    let shadow = 0.22 * smooth_step(softness, -softness, edge_distance(object, shadow_at));
    let below = mix(below, [30.0, 34.0, 48.0], shadow);

    // Antialiasing: a pixel at the edge is covered in part.
    let covered = (0.5 - edge_distance(object, point)).clamp(0.0, 1.0);
    let height = (point[1] - object.center[1]) / object.radius;
    let light = 1.0 - 0.09 * height.clamp(-1.0, 1.0);
    mix(
        below,
        levels(object.color).map(|level| level * light),
        covered,
    )
}

/// The distance from `point` to the object's edge, in pixels, negative inside.
fn edge_distance(object: &Object, point: [f64; 2]) -> f64 {
    let [x, y] = [0, 1].map(|axis| (point[axis] - object.center[axis]) / object.radius);
    // Nearly all pixels are farther away, where the shadow has faded too.
    if x.abs().max(y.abs()) > 1.5 {
        return object.radius;
    }
    let [cosine, sine] = object.turn;
    object
        .kind
        .distance([x * cosine + y * sine, y * cosine - x * sine])
        * object.radius
}

/// A background.
struct Ground {
    base: Color,
    pattern: Pattern,
    height: f64,
    /// The period of the pattern, in pixels.
    period: f64,
    /// The amplitude of the pattern, in color levels.
    strength: f64,
    /// Random numbers from 0 to 1 on a periodic grid of 16 by 16: the corners of clouds.
    corners: Vec<f64>,
}

impl Ground {
    fn new(scene: &Scene, random: &mut Random) -> Self {
        Self {
            base: levels(scene.ground),
            pattern: scene.pattern,
            height: f64::from(scene.height),
            period: random.between(14.0, 26.0).round(),
            strength: random.between(5.0, 10.0).round(),
            corners: (0..256).map(|_| random.unit()).collect(),
        }
    }

    fn color(&self, point: [f64; 2]) -> Color {
        let shade = match self.pattern {
            Pattern::Plain => 0.0,
            Pattern::Gradient => 0.5 - point[1] / self.height,
            Pattern::Dots => {
                let [x, y] = point.map(|at| (at / self.period).fract() - 0.5);
                let from_dot = (x * x + y * y).sqrt();
                -smooth_step(0.30, 0.18, from_dot)
            }
            Pattern::Stripes => {
                let across = ((point[0] + point[1]) / (2.0 * self.period)).fract();
                -smooth_step(0.20, 0.30, (across - 0.5).abs())
            }
            Pattern::Clouds => self.cloud(point) - 0.5,
        };
        self.base.map(|level| level + shade * self.strength * 1.5)
    }

    /// Value noise: smooth interpolation between random corners.
    fn cloud(&self, point: [f64; 2]) -> f64 {
        let scaled = point.map(|at| at / (self.period * 1.5));
        let [column, row] = scaled.map(|at| at as usize);
        let [right, down] = scaled.map(|at| smooth_step(0.0, 1.0, at.fract()));
        let corner = |row: usize, column: usize| self.corners[row % 16 * 16 + column % 16];
        let above = corner(row, column) * (1.0 - right) + corner(row, column + 1) * right;
        let below = corner(row + 1, column) * (1.0 - right) + corner(row + 1, column + 1) * right;
        above * (1.0 - down) + below * down
    }
}

fn levels(paint: Paint) -> Color {
    paint.rgb.map(f64::from)
}

/// Blends `share` of `over` with the rest of `under`.
fn mix(under: Color, over: Color, share: f64) -> Color {
    std::array::from_fn(|channel| under[channel] + (over[channel] - under[channel]) * share)
}

/// Smoothstep: rises from 0 at `from` to 1 at `to`.
fn smooth_step(from: f64, to: f64, at: f64) -> f64 {
    let share = ((at - from) / (to - from)).clamp(0.0, 1.0);
    share * share * (3.0 - 2.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::small_world::shape::Kind;

    #[test]
    fn the_middle_of_every_filled_shape_has_its_color() {
        for number in 0..20 {
            let mut random = Random::named(2, &format!("{number}"));
            let scene = Scene::draw(&mut random);
            let pixels = render(&scene, &mut random);
            assert_eq!(pixels.dimensions(), (scene.width, scene.height));
            for object in scene
                .objects
                .iter()
                .filter(|object| object.kind != Kind::Ring)
            {
                let [x, y] = object.center.map(|at| at as u32);
                let Rgb(seen) = *pixels.get_pixel(x, y);
                for (seen, meant) in seen.into_iter().zip(object.color.rgb) {
                    assert!(seen.abs_diff(meant) <= 12, "{object:?} is {seen:?}");
                }
            }
        }
    }

    #[test]
    fn the_same_scene_gives_the_same_bytes() {
        let draw = || {
            let mut random = Random::named(3, "bytes");
            let scene = Scene::draw(&mut random);
            picture(&scene, Format::Png, &mut random).unwrap()
        };
        assert_eq!(draw(), draw());
    }
}
