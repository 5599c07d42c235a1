//! Hashes of decoded images, by which copies of an image are recognized.

use std::f64::consts::PI;
use std::sync::LazyLock;

use sha2::{Digest, Sha256};

use super::Rgb;

/// The side of the gray image whose transform is taken.
const SIDE: usize = 32;

/// The side of the block of lowest frequencies, each of which is a bit of the hash.
const LOW: usize = 8;

impl Rgb {
    /// Returns the SHA-256 of the size and the pixels, in hex.
    pub fn pixel_hash(&self) -> String {
        let mut hasher = Sha256::new();
        for size in [self.width, self.height] {
            hasher.update((size as u64).to_le_bytes());
        }
        hasher.update(&self.data);
        hex::encode(hasher.finalize())
    }

    /// Returns the perceptual hash of an image: it is shrunk to 32 by 32 gray values, and each bit says
    /// whether one of the 8 by 8 lowest frequencies of their discrete cosine transform (DCT-II) is
    /// above the median of the others than the first, as in the hash that is known as pHash.
    pub fn look(&self) -> u64 {
        let gray = self.gray();
        let block = transformed(&gray);
        let mut sorted: Vec<f64> = block[1..].to_vec();
        sorted.sort_by(f64::total_cmp);
        let median = sorted[sorted.len() / 2];
        let bits = block.iter().map(|value| u64::from(*value > median));
        bits.fold(0, |hash, bit| hash << 1 | bit)
    }

    /// Returns the image shrunk to 32 by 32 gray values (ITU-R BT.601), each the mean of its area.
    fn gray(&self) -> Vec<f64> {
        let (width, height) = (self.width, self.height);
        let columns = shares(width);
        let rows = shares(height);
        // One row of the small image takes whole and partial rows of the large one.
        let mut gray = vec![0.0; SIDE * SIDE];
        for (y, row) in rows.iter().enumerate() {
            for &(line, line_share) in row {
                let pixels = &self.data[line * width * 3..(line + 1) * width * 3];
                for (x, column) in columns.iter().enumerate() {
                    let sum: f64 = column
                        .iter()
                        .map(|&(at, share)| {
                            let [red, green, blue] =
                                [0, 1, 2].map(|channel| f64::from(pixels[at * 3 + channel]));
                            share * (0.299 * red + 0.587 * green + 0.114 * blue)
                        })
                        .sum();
                    gray[y * SIDE + x] += line_share * sum;
                }
            }
        }
        gray
    }
}

/// Returns, for each of 32 places, the pixels of a line of `length` that it covers, with their shares
/// of the place.
fn shares(length: usize) -> Vec<Vec<(usize, f64)>> {
    let step = length as f64 / SIDE as f64;
    let place = |place: usize| {
        let (from, to) = (place as f64 * step, (place + 1) as f64 * step);
        let pixels = from.floor() as usize..(to.ceil() as usize).min(length);
        let share = |pixel: usize| {
            let covered = (pixel as f64 + 1.0).min(to) - (pixel as f64).max(from);
            (pixel, covered / step)
        };
        pixels
            .map(share)
            .filter(|(_, share)| *share > 0.0)
            .collect()
    };
    (0..SIDE).map(place).collect()
}

/// Returns the 8 by 8 lowest frequencies of the two-dimensional DCT-II, without scale factors.
fn transformed(gray: &[f64]) -> Vec<f64> {
    static COSINES: LazyLock<Vec<f64>> = LazyLock::new(|| {
        let cosine = |index: usize| {
            let (frequency, at) = (index / SIDE, index % SIDE);
            (PI / SIDE as f64 * (at as f64 + 0.5) * frequency as f64).cos()
        };
        (0..LOW * SIDE).map(cosine).collect()
    });
    let along_rows: Vec<f64> = gray
        .chunks(SIDE)
        .flat_map(|row| {
            let of = |cosines: &[f64]| {
                row.iter()
                    .zip(cosines)
                    .map(|(one, other)| one * other)
                    .sum()
            };
            COSINES.chunks(SIDE).map(of).collect::<Vec<f64>>()
        })
        .collect();
    let of = |vertical: &[f64], horizontal: usize| {
        let column = (0..SIDE).map(|row| along_rows[row * LOW + horizontal]);
        column.zip(vertical).map(|(one, other)| one * other).sum()
    };
    let rows = COSINES.chunks(SIDE);
    rows.flat_map(|vertical| (0..LOW).map(move |horizontal| (vertical, horizontal)))
        .map(|(vertical, horizontal)| of(vertical, horizontal))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns an image of smooth waves.
    fn waves(width: usize, height: usize, seed: f64) -> Rgb {
        let mut data = Vec::new();
        for y in 0..height {
            for x in 0..width {
                let (x, y) = (x as f64 / width as f64, y as f64 / height as f64);
                let level = (7.0 * x + seed).sin()
                    + (9.0 * x * y + 2.0 * seed).cos()
                    + (5.0 * y * seed).sin();
                data.extend([(level * 40.0 + 128.0) as u8; 3]);
            }
        }
        Rgb {
            width,
            height,
            data,
        }
    }

    #[test]
    fn a_copy_of_another_size_looks_alike_and_another_image_does_not() {
        let image = waves(320, 200, 1.0);
        let small = waves(160, 100, 1.0);
        assert_ne!(image.pixel_hash(), small.pixel_hash());
        assert!((image.look() ^ small.look()).count_ones() <= 2);
        let mut brighter = waves(320, 200, 1.0);
        brighter
            .data
            .iter_mut()
            .for_each(|level| *level = level.saturating_add(20));
        assert!((image.look() ^ brighter.look()).count_ones() <= 2);
        let other = waves(320, 200, 2.5);
        assert!((image.look() ^ other.look()).count_ones() > 12);
        assert_eq!(image.pixel_hash(), waves(320, 200, 1.0).pixel_hash());
    }

    #[test]
    fn images_of_any_size_have_a_look() {
        for (width, height) in [(1, 1), (3, 70), (31, 33), (1000, 2)] {
            let _ = waves(width, height, 0.5).look();
        }
    }
}
