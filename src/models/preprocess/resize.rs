//! Bicubic resizing of 8-bit images, bit for bit as in Pillow or torch.
//!
//! Follows `src/libImaging/Resample.c` of python-pillow/Pillow, which torch's
//! `aten/src/ATen/native/cpu/UpSampleKernel.cpp` follows for `interpolate(mode="bicubic",
//! antialias=True)` of uint8: two passes, each with fixed-point weights and rounded to 8 bits; a
//! pass along which the size does not change is skipped. When shrinking, the kernel widens with the
//! scale (antialiasing). Crates that resize faster differ from this by up to 27 levels at hard
//! edges. The two libraries differ from each other in two points:
//!
//! * Weights have 22 bits after the binary point in Pillow; in torch they have 16 bits in total, of
//!   which as many are after the point as the largest weight of the pass allows. The difference is
//!   one level in some pixels.
//! * torch runs the horizontal pass first. Pillow 13 runs the vertical pass first if the height
//!   loses more than twice as many pixels as the width (its pull request 9549; found by comparing
//!   both orders over 3,000 sizes), which changes the last bit, and more at hard edges. Up to
//!   version 12, Pillow also ran the horizontal pass first.

#![expect(
    clippy::inline_always,
    reason = "code inlined into a function for AVX2 is compiled for AVX2, other code is not"
)]

use rayon::prelude::*;

use crate::preprocess::image::Rgb;

/// Half the width of the kernel, in source pixels at scale 1.
const SUPPORT: f64 = 2.0;

/// Bytes of a row that are summed at once.
const BLOCK: usize = 64;

/// Side of the square blocks in which an image is transposed.
const SQUARE: usize = 32;

/// Bits after the binary point of Pillow's weights: 32, minus 8 for the pixel and 2 for overshoot.
const PILLOW_PRECISION: u32 = 32 - 8 - 2;

/// Maximum number of bits after the binary point of torch's weights.
const TORCH_PRECISION_MAX: u32 = 22;

/// The library whose bicubic resizing is reproduced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bicubic {
    /// Pillow 13: `Image.resize(.., BICUBIC)`, as used by transformers' processors with backend
    /// `pil`.
    Pillow,
    /// torch 2 on a CPU: `interpolate` of uint8, as used by transformers' processors with backend
    /// `torchvision`.
    Torch,
}

impl Bicubic {
    /// Resizes an image to `width` x `height` pixels, without keeping its aspect ratio.
    ///
    /// # Panics
    ///
    /// Panics if a size is 0.
    #[must_use]
    pub fn resize(self, image: &Rgb, width: usize, height: usize) -> Rgb {
        assert!(width > 0 && height > 0, "an image without pixels");
        let across = (width != image.width).then(|| Pass::new(self, image.width, width));
        let down = (height != image.height).then(|| Pass::new(self, image.height, height));
        let data = match (across, down) {
            (None, None) => image.data.clone(),
            (Some(across), None) => across.horizontal(&image.data),
            (None, Some(down)) => down.vertical(&image.data, 3 * width),
            (Some(across), Some(down)) if self.vertical_first(image, width, height) => {
                across.horizontal(&down.vertical(&image.data, 3 * image.width))
            }
            (Some(across), Some(down)) => down.vertical(&across.horizontal(&image.data), 3 * width),
        };
        Rgb {
            width,
            height,
            data,
        }
    }

    /// True if the vertical pass comes before the horizontal one.
    fn vertical_first(self, image: &Rgb, width: usize, height: usize) -> bool {
        let loss = image.height.saturating_sub(height);
        self == Self::Pillow && loss > 0 && loss + 2 * width > 2 * image.width
    }

    /// Returns the bits after the binary point of the weights of a pass, whose largest weight is
    /// `greatest`.
    fn precision(self, greatest: f64) -> u32 {
        match self {
            Self::Pillow => PILLOW_PRECISION,
            Self::Torch => {
                // With one more bit, the largest weight would not fit in 16 bits with a sign.
                let last = |&precision: &u32| fixed(greatest, precision + 1) > i32::from(i16::MAX);
                let mut precisions = 0..TORCH_PRECISION_MAX;
                precisions.find(last).unwrap_or(TORCH_PRECISION_MAX)
            }
        }
    }
}

/// A resizing pass along one axis.
struct Pass {
    /// Source pixels along the axis.
    from: usize,
    /// The taps of each output pixel along the axis.
    taps: Vec<Taps<i32>>,
    /// Bits after the binary point of the weights.
    precision: u32,
}

/// The source pixels and weights of one output pixel.
struct Taps<W> {
    /// The first source pixel.
    first: usize,
    /// The weights of that pixel and the following ones.
    weights: Vec<W>,
}

impl Pass {
    /// Creates the pass that resizes `from` pixels to `to`.
    fn new(library: Bicubic, from: usize, to: usize) -> Self {
        let exact = taps(from, to);
        let greatest = exact.iter().flat_map(|taps| taps.weights.iter().copied());
        let precision = library.precision(greatest.fold(0.0, f64::max));
        let rounded = |taps: Taps<f64>| Taps {
            first: taps.first,
            weights: taps.weights.iter().map(|&w| fixed(w, precision)).collect(),
        };
        Self {
            from,
            taps: exact.into_iter().map(rounded).collect(),
            precision,
        }
    }

    /// Resizes every row of RGB pixels, as columns of the transposed image: along them neighboring
    /// bytes have the same weights, so many are processed at once.
    fn horizontal(&self, data: &[u8]) -> Vec<u8> {
        let rows = data.len() / (3 * self.from);
        let resized = self.vertical(&on_its_side(data, self.from), 3 * rows);
        on_its_side(&resized, rows)
    }

    /// Resizes every column; a row has `stride` bytes.
    fn vertical(&self, data: &[u8], stride: usize) -> Vec<u8> {
        let mut resized = vec![0; stride * self.taps.len()];
        let rows = resized.par_chunks_exact_mut(stride).zip(&self.taps);
        rows.for_each(|(resized, taps)| self.row(data, taps, resized));
        resized
    }

    /// Computes one output row from the rows of `data` in `taps`, with the widest vectors of this
    /// processor that the compiler can use; in integer arithmetic the result is the same for all.
    fn row(&self, data: &[u8], taps: &Taps<i32>, resized: &mut [u8]) {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx2")]
            fn with_avx2(pass: &Pass, data: &[u8], taps: &Taps<i32>, resized: &mut [u8]) {
                pass.down(data, taps, resized);
            }
            if is_x86_feature_detected!("avx2") {
                #[expect(
                    unsafe_code,
                    reason = "the compiler cannot know that the processor's features were checked"
                )]
                // SAFETY: the processor has AVX2.
                unsafe {
                    with_avx2(self, data, taps, resized);
                }
                return;
            }
        }
        self.down(data, taps, resized);
    }

    #[inline(always)]
    fn down(&self, data: &[u8], taps: &Taps<i32>, resized: &mut [u8]) {
        let stride = resized.len();
        let first = stride * taps.first;
        // Blocks whose sums stay in registers. None overflows, as the weights add up to 1; wrapping
        // arithmetic lets the compiler use vectors, which checked arithmetic would prevent.
        for (number, resized) in resized.chunks_mut(BLOCK).enumerate() {
            let mut sums = [self.half(); BLOCK];
            let mut start = first + number * BLOCK;
            for &weight in &taps.weights {
                let bytes = &data[start..start + resized.len()];
                if let Ok(bytes) = <&[u8; BLOCK]>::try_from(bytes) {
                    for (sum, &byte) in sums.iter_mut().zip(bytes) {
                        *sum = sum.wrapping_add(i32::from(byte).wrapping_mul(weight));
                    }
                } else {
                    for (sum, &byte) in sums.iter_mut().zip(bytes) {
                        *sum = sum.wrapping_add(i32::from(byte).wrapping_mul(weight));
                    }
                }
                start += stride;
            }
            for (byte, &sum) in resized.iter_mut().zip(&sums) {
                *byte = self.level(sum);
            }
        }
    }

    /// Returns one half in fixed point, the start of sums so that they are rounded at the end.
    #[inline(always)]
    fn half(&self) -> i32 {
        1 << (self.precision - 1)
    }

    /// Converts fixed point to a level.
    #[inline(always)]
    fn level(&self, sum: i32) -> u8 {
        (sum >> self.precision).clamp(0, 255) as u8
    }
}

/// Transposes RGB pixels of `width` columns.
fn on_its_side(data: &[u8], width: usize) -> Vec<u8> {
    let (pixels, _) = data.as_chunks::<3>();
    let height = pixels.len() / width;
    let mut turned = vec![[0; 3]; pixels.len()];
    // Square blocks, so that both sides stay in the cache.
    let columns = turned.par_chunks_mut(SQUARE * height).enumerate();
    columns.for_each(|(square, turned)| {
        let left = square * SQUARE;
        for top in (0..height).step_by(SQUARE) {
            for (x, column) in turned.chunks_exact_mut(height).enumerate() {
                for y in top..height.min(top + SQUARE) {
                    column[y] = pixels[y * width + left + x];
                }
            }
        }
    });
    turned.into_flattened()
}

/// Converts a weight to fixed point; halves are rounded away from 0.
fn fixed(weight: f64, precision: u32) -> i32 {
    let scaled = weight * f64::from(1 << precision);
    (scaled + 0.5_f64.copysign(scaled)) as i32
}

/// Returns the taps of each output pixel for resizing `from` pixels to `to`; their weights add up
/// to 1.
fn taps(from: usize, to: usize) -> Vec<Taps<f64>> {
    let scale = from as f64 / to as f64;
    let widening = scale.max(1.0);
    let support = SUPPORT * widening;
    let tap = |index: usize| {
        let center = (index as f64 + 0.5) * scale;
        // Casts of negative numbers saturate at 0, the intended lower bound.
        let first = (center - support + 0.5) as usize;
        let end = ((center + support + 0.5) as usize).min(from);
        let raw: Vec<f64> = (first..end)
            .map(|source| cubic((source as f64 - center + 0.5) * (1.0 / widening)))
            .collect();
        let sum: f64 = raw.iter().sum();
        Taps {
            first,
            weights: raw.into_iter().map(|weight| weight / sum).collect(),
        }
    };
    (0..to).map(tap).collect()
}

/// Keys' cubic kernel with a = -0.5, Pillow's `bicubic_filter`.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_util::{pattern, sha256};

    fn gray(width: usize, height: usize, level: impl Fn(usize, usize) -> u8) -> Rgb {
        let pixels = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
        let data = pixels.flat_map(|(x, y)| [level(x, y); 3]).collect();
        Rgb {
            width,
            height,
            data,
        }
    }

    #[test]
    fn a_ramp_shrinks_across_and_grows_down_as_in_pillow() {
        let ramp = gray(5, 4, |x, y| (12 * (5 * y + x)) as u8);
        let resized = Bicubic::Pillow.resize(&ramp, 3, 6);
        let expected = [
            [0, 20, 40],
            [29, 49, 69],
            [74, 94, 114],
            [114, 134, 154],
            [159, 179, 199],
            [188, 208, 228],
        ];
        let levels: Vec<u8> = resized.data.iter().step_by(3).copied().collect();
        assert_eq!(levels, expected.as_flattened());
    }

    #[test]
    fn channels_do_not_mix() {
        let data = (0..5 * 4).flat_map(|i| [12 * i, 255, 0]).collect();
        let image = Rgb {
            width: 5,
            height: 4,
            data,
        };
        let resized = Bicubic::Pillow.resize(&image, 3, 6);
        assert_eq!(resized.data[..3], [0, 255, 0]);
        assert_eq!(resized.data[6 * 9 - 3..], [228, 255, 0]);
    }

    #[test]
    fn hard_edges_overshoot_and_are_clipped() {
        let edge = gray(8, 1, |x, _| if x < 4 { 10 } else { 250 });
        let resized = Bicubic::Pillow.resize(&edge, 16, 1);
        let levels: Vec<u8> = resized.data.iter().step_by(3).copied().collect();
        assert!(levels.contains(&0) && levels.contains(&255), "{levels:?}");
    }

    /// The frames `(37 f + 11 y + 7 x + 29 c) mod 256` of a video, resized by Pillow 13.
    #[test]
    fn frames_of_a_video_are_squashed_as_in_pillow() {
        let mut sums = Vec::new();
        let mut all = Vec::new();
        for f in 0..3 {
            let level = |i: usize| {
                let (y, x, c) = (i / 270, i / 3 % 90, i % 3);
                ((37 * f + 11 * y + 7 * x + 29 * c) % 256) as u8
            };
            let frame = Rgb {
                width: 90,
                height: 48,
                data: (0..48 * 90 * 3).map(level).collect(),
            };
            let squashed = Bicubic::Pillow.resize(&frame, 56, 56);
            sums.push(
                squashed
                    .data
                    .iter()
                    .map(|&level| u64::from(level))
                    .sum::<u64>(),
            );
            all.extend(squashed.data);
        }
        assert_eq!(sums, [1_197_805, 1_199_809, 1_201_703]);
        assert!(sha256(&all).starts_with("a3e83e75fe58e69d"));
    }

    #[test]
    fn an_unchanged_size_changes_nothing() {
        let image = gray(7, 3, |x, y| (37 * x + 91 * y) as u8);
        for library in [Bicubic::Pillow, Bicubic::Torch] {
            assert_eq!(library.resize(&image, 7, 3), image);
        }
    }

    /// Recorded from Pillow 13 and torch 2.11.
    #[test]
    fn each_library_rounds_its_weights_its_way() {
        let row = gray(4, 1, |x, _| [0, 147, 150, 9][x]);
        let recorded = [
            (Bicubic::Pillow, [0, 69, 157, 159, 76, 0]),
            (Bicubic::Torch, [0, 69, 158, 160, 76, 0]),
        ];
        for (library, expected) in recorded {
            let resized = library.resize(&row, 6, 1);
            let levels: Vec<u8> = resized.data.iter().step_by(3).copied().collect();
            assert_eq!(levels, expected, "{library:?}");
        }
    }

    #[test]
    fn weights_of_torch_have_as_many_bits_as_fit_the_greatest() {
        let precisions = [1.0, 0.999_98, 0.5, 0.01, 0.001];
        let precisions = precisions.map(|greatest| Bicubic::Torch.precision(greatest));
        assert_eq!(precisions, [14, 15, 15, 21, 22]);
    }

    /// Hashes of the pattern resized by Pillow 13.
    #[test]
    fn the_pass_that_loses_most_comes_first_as_in_pillow_13() {
        let vertical_first = Bicubic::Pillow.resize(&pattern(60, 80), 40, 30);
        assert_eq!(
            sha256(&vertical_first.data),
            "b510f6766e4bfcd89b6615f3b58d2e9f1fc14e8ef082a8ce9c47a73b9cbf8e7c"
        );
        let horizontal_first = Bicubic::Pillow.resize(&pattern(80, 60), 30, 40);
        assert_eq!(
            sha256(&horizontal_first.data),
            "2a693a3b3b767a31dab62ec367b7deb82c887e7032f5fa8447a772ba1103c30d"
        );
    }

    /// Hashes of the pattern resized by torch 2.11.
    #[test]
    fn the_horizontal_pass_comes_first_in_torch() {
        let flattened = Bicubic::Torch.resize(&pattern(60, 80), 40, 30);
        assert_eq!(
            sha256(&flattened.data),
            "5065fdf6eee9e7a13c6ca644b2d5c4a14bbf8399cedc38362b1c758663edce6f"
        );
        let narrowed = Bicubic::Torch.resize(&pattern(80, 60), 30, 40);
        assert_eq!(
            sha256(&narrowed.data),
            "8d123b40b14728398d765193b43ea6d458a29c68f540ee284da81d25e43b0a1b"
        );
    }
}
