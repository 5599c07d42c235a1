//! Anyres tiling of LLaVA-OneVision: cutting an image into tiles, and the layout of the tiles'
//! features.
//!
//! A single image is fitted to the best of a list of resolutions, padded with black, cut into
//! tiles, and preceded by a *base* tile, the whole image squashed (`anyres`). The features of the
//! tiles are laid out as one grid, the padding is cut off again, a large grid is scaled down, and a
//! newline feature ends each row. If a prompt has several images, each becomes one padded square
//! tile, its features followed by one newline. The layout depends only on the image's height and
//! width, so tokens are counted without decoding.
//!
//! Follows transformers 5.23 `image_processing_pil_llava_onevision.py`, `image_processing_utils.py`
//! (`select_best_resolution`, `get_patch_output_size`) and `modeling_llava_onevision.py`
//! (`pack_image_features`, `unpad_image`), which agree with LLaVA-NeXT's `mm_utils.py` except for
//! the rounding described at [`unpadded`].

use std::ops::Range;

use rayon::prelude::*;

use crate::checkpoint::config::LlavaOnevisionConfig;
use crate::preprocess::image::Rgb;
use crate::preprocess::image_processor::ImageProcessorConfig;
use crate::preprocess::resize::Bicubic;

/// The settings that determine the layout of an image's tiles.
#[derive(Debug, Clone, PartialEq)]
pub struct AnyresLayout {
    /// Side of a tile, in pixels.
    side: usize,
    /// Patches per side of a tile, which is also the number of features per side.
    patches: usize,
    /// Resolutions `[height, width]` that an image may be fitted to.
    pinpoints: Vec<[usize; 2]>,
    /// The N of `anyres_max_N`.
    tiles_max: usize,
}

/// An image processor that cuts images into tiles.
#[derive(Debug, Clone, PartialEq)]
pub struct Anyres {
    layout: AnyresLayout,
    /// Normalized value of each level of each channel.
    levels: Box<[[f32; 256]; 3]>,
    /// Padding color of the squares, if a prompt has several images.
    background: [u8; 3],
}

/// Tiles of an image for the vision tower, and the layout of their features.
#[derive(Debug, Clone, PartialEq)]
pub struct Tiles {
    /// The pixels: `[packing.tiles(), 3, side, side]`, normalized.
    pub pixels: Vec<f32>,
    /// Side of a tile, in pixels.
    pub side: usize,
    pub packing: Packing,
}

/// The layout of an image's features in the sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packing {
    /// This many features of a single tile, in the tower's order.
    Plain(usize),
    Anyres(AnyresPacking),
    Frames(FramesPacking),
}

/// The layout of a video's features: each frame is a tile, whose features are pooled; one newline
/// ends all of them (`get_video_features` and `apply_pooling` of transformers'
/// `modeling_llava_onevision.py`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FramesPacking {
    pub frames: usize,
    /// Features per side of a frame, before pooling.
    pub patches: usize,
}

impl FramesPacking {
    /// Returns the features per side of a frame after pooling.
    pub fn pooled(self) -> usize {
        self.patches.div_ceil(2)
    }

    /// Returns the number of tokens of the video in the sequence.
    pub fn tokens(self) -> usize {
        self.frames * self.pooled().pow(2) + 1
    }
}

impl Packing {
    /// Returns the number of tiles that go through the tower.
    pub fn tiles(&self) -> usize {
        match self {
            Self::Plain(_) => 1,
            Self::Anyres(packing) => packing.tiles(),
            Self::Frames(packing) => packing.frames,
        }
    }

    /// Returns the number of tokens of the image in the sequence.
    pub fn tokens(&self) -> usize {
        match self {
            Self::Plain(tokens) => *tokens,
            Self::Anyres(packing) => packing.tokens(),
            Self::Frames(packing) => packing.tokens(),
        }
    }
}

/// The layout of one image's features, computed from the tower's `[tiles, patches², channels]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnyresPacking {
    /// Features per side of a tile.
    pub patches: usize,
    /// The tiles after the base tile; `None` for one of several images, which has only its base
    /// tile and one newline.
    pub grid: Option<Grid>,
}

/// The layout of the tiles after the base tile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grid {
    /// Number of tiles from top to bottom and from left to right; tiles are in row-major order.
    pub tiles: [usize; 2],
    /// Rows of features that are kept, of `tiles[0] * patches`.
    pub rows: Range<usize>,
    /// Columns of features that are kept, of `tiles[1] * patches`.
    pub columns: Range<usize>,
    /// The `[rows, columns]` that a large grid is scaled down to (bilinear, `align_corners` false,
    /// no antialias) after the padding is cut off.
    pub scaled: Option<[usize; 2]>,
}

impl Grid {
    /// Returns the final rows and columns of features, without the newline column.
    pub fn size(&self) -> [usize; 2] {
        self.scaled.unwrap_or([self.rows.len(), self.columns.len()])
    }
}

impl AnyresPacking {
    /// Returns the number of tiles that go through the tower, including the base tile.
    pub fn tiles(&self) -> usize {
        1 + self
            .grid
            .as_ref()
            .map_or(0, |grid| grid.tiles.iter().product())
    }

    /// Returns the number of tokens of the image in the sequence: the base tile row by row without
    /// newlines, then the grid with a newline at the end of each row.
    pub fn tokens(&self) -> usize {
        let rest = self.grid.as_ref().map_or(1, |grid| {
            let [rows, columns] = grid.size();
            rows * (columns + 1)
        });
        self.patches.pow(2) + rest
    }
}

impl AnyresLayout {
    pub fn new(config: &LlavaOnevisionConfig) -> Self {
        Self {
            side: config.vision_config.image_size,
            patches: config.vision_config.patches_per_side(),
            pinpoints: config.image_grid_pinpoints.clone(),
            tiles_max: config.anyres_max,
        }
    }

    /// Returns the layout of a single image of `height` x `width` pixels.
    pub fn single(&self, height: usize, width: usize) -> AnyresPacking {
        let [best_height, best_width] = best_resolution(&self.pinpoints, height, width);
        let tiles = [best_height / self.side, best_width / self.side];
        let [rows, columns] = unpadded(tiles.map(|tiles| tiles * self.patches), height, width);
        let features = (rows.len() * columns.len()) as f64;
        let ratio = (features / (self.tiles_max * self.patches.pow(2)) as f64).sqrt();
        let scaled = (ratio > 1.1)
            .then(|| [&rows, &columns].map(|kept| floor_divided(kept.len() as f64, ratio)));
        AnyresPacking {
            patches: self.patches,
            grid: Some(Grid {
                tiles,
                rows,
                columns,
                scaled,
            }),
        }
    }

    /// Returns the layout of each of several images, which does not depend on their size.
    pub fn several(&self) -> AnyresPacking {
        AnyresPacking {
            patches: self.patches,
            grid: None,
        }
    }

    /// Returns the layout of a video of this many frames.
    pub fn video(&self, frames: usize) -> FramesPacking {
        FramesPacking {
            frames,
            patches: self.patches,
        }
    }
}

impl Anyres {
    /// Creates the processor. Every resolution must consist of whole tiles.
    pub fn new(layout: AnyresLayout, processor: &ImageProcessorConfig) -> Self {
        Self {
            layout,
            levels: Box::new(processor.levels()),
            background: processor.background(),
        }
    }

    /// Cuts a single image: the base tile, then the tiles row by row.
    pub fn cut_single(&self, image: &Rgb) -> Tiles {
        let packing = self.layout.single(image.height, image.width);
        let [rows, columns] = packing.grid.as_ref().map_or([0, 0], |grid| grid.tiles);
        let canvas = fitted(image, rows * self.layout.side, columns * self.layout.side);
        let base = Bicubic::Pillow.resize(image, self.layout.side, self.layout.side);
        let tiles: Vec<(&Rgb, usize, usize)> = std::iter::once((&base, 0, 0))
            .chain((0..rows * columns).map(|tile| {
                let (row, column) = (tile / columns, tile % columns);
                (&canvas, column * self.layout.side, row * self.layout.side)
            }))
            .collect();
        self.tiles(&tiles, Packing::Anyres(packing))
    }

    /// Converts one of several images to its one tile: padded to a square, then resized.
    pub fn cut_several(&self, image: Rgb) -> Tiles {
        let base = Bicubic::Pillow.resize(
            &image.squared(self.background),
            self.layout.side,
            self.layout.side,
        );
        self.tiles(&[(&base, 0, 0)], Packing::Anyres(self.layout.several()))
    }

    /// Converts the frames of a video to a tile each: squashed, as a base tile.
    pub fn squash_frames(&self, frames: &[Rgb]) -> Tiles {
        let side = self.layout.side;
        let squash = |frame: &Rgb| Bicubic::Pillow.resize(frame, side, side);
        let frames: Vec<Rgb> = frames.par_iter().map(squash).collect();
        let tiles: Vec<(&Rgb, usize, usize)> = frames.iter().map(|frame| (frame, 0, 0)).collect();
        self.tiles(&tiles, Packing::Frames(self.layout.video(frames.len())))
    }

    /// Normalizes the tiles that begin at the given columns and rows of the given images.
    fn tiles(&self, tiles: &[(&Rgb, usize, usize)], packing: Packing) -> Tiles {
        let size = 3 * self.layout.side * self.layout.side;
        let mut pixels = vec![0.0; tiles.len() * size];
        pixels
            .par_chunks_exact_mut(size)
            .zip(tiles)
            .for_each(|(planes, &(image, left, top))| {
                image.planes(left, top, self.layout.side, &self.levels, planes);
            });
        Tiles {
            pixels,
            side: self.layout.side,
            packing,
        }
    }
}

/// Returns the resolution that keeps most of the image's pixels; among equal ones the one that
/// wastes least; among these the first.
fn best_resolution(pinpoints: &[[usize; 2]], height: usize, width: usize) -> [usize; 2] {
    let (original_height, original_width) = (height as f64, width as f64);
    let mut best = pinpoints[0];
    let mut most = 0;
    let mut least_waste = usize::MAX;
    for &[height, width] in pinpoints {
        let scale = (width as f64 / original_width).min(height as f64 / original_height);
        let shrunk_width = (original_width * scale) as usize;
        let shrunk_height = (original_height * scale) as usize;
        let effective =
            (shrunk_width * shrunk_height).min(original_width as usize * original_height as usize);
        let waste = height * width - effective;
        if effective > most || (effective == most && waste < least_waste) {
            best = [height, width];
            most = effective;
            least_waste = waste;
        }
    }
    best
}

/// Returns the rows and columns of a grid of features (`current`) that remain when the padding
/// around an image of `height` x `width` pixels is cut off.
///
/// transformers since 4.49 rounds to 7 decimals before it truncates; LLaVA-NeXT does not, which
/// matters for 154 of the 5.76 million sizes up to 2400 x 2400.
fn unpadded(current: [usize; 2], height: usize, width: usize) -> [Range<usize>; 2] {
    let [rows, columns] = current.map(|length| length as f64);
    let (height, width) = (height as f64, width as f64);
    let centered = |current: usize, kept: usize| {
        let padding = current.saturating_sub(kept) / 2;
        padding..current - padding
    };
    if width / height > columns / rows {
        let kept = rounded(height * (columns / width));
        [centered(current[0], kept), 0..current[1]]
    } else {
        let kept = rounded(width * (rows / height));
        [0..current[0], centered(current[1], kept)]
    }
}

/// Python's `int(round(value, 7))`, which rounds the decimal expansion correctly, as formatting
/// does.
fn rounded(value: f64) -> usize {
    let text = format!("{value:.7}");
    let (whole, _) = text.split_once('.').expect("seven decimals were asked for");
    whole.parse().expect("sizes are finite and positive")
}

/// Python's `int(value // divisor)`: the quotient is computed without the remainder, so it is not
/// rounded up to the next integer.
fn floor_divided(value: f64, divisor: f64) -> usize {
    ((value - value % divisor) / divisor).round() as usize
}

/// Resizes an image to fit into `height` x `width`, keeping its aspect ratio, centered on black.
fn fitted(image: &Rgb, height: usize, width: usize) -> Rgb {
    let scale_width = width as f64 / image.width as f64;
    let scale_height = height as f64 / image.height as f64;
    let fit = |length: usize, scale: f64| (length as f64 * scale).ceil() as usize;
    let (new_height, new_width) = if scale_width < scale_height {
        (fit(image.height, scale_width).min(height), width)
    } else {
        (height, fit(image.width, scale_height).min(width))
    };
    let resized = Bicubic::Pillow.resize(image, new_width, new_height);
    if (new_height, new_width) == (height, width) {
        return resized;
    }
    let mut canvas = Rgb::filled(width, height, [0; 3]);
    canvas.paste(&resized, (width - new_width) / 2, (height - new_height) / 2);
    canvas
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_util::{onevision_folder, pattern, sha256_floats};

    /// Returns the settings of the released checkpoints.
    fn released() -> AnyresLayout {
        AnyresLayout {
            side: 384,
            patches: 27,
            pinpoints: (1..=6)
                .flat_map(|row| (1..=6).map(move |column| [384 * row, 384 * column]))
                .collect(),
            tiles_max: 9,
        }
    }

    #[test]
    fn tokens_and_tiles_are_those_that_transformers_counts() {
        let table = [
            ((1, 1), 2, 1485),
            ((224, 224), 2, 1485),
            ((384, 384), 2, 1485),
            ((375, 500), 3, 1728),
            ((500, 375), 3, 1737),
            ((333, 500), 3, 1836),
            ((427, 640), 5, 2709),
            ((480, 640), 5, 2929),
            ((640, 480), 5, 2943),
            ((768, 768), 5, 3699),
            ((600, 800), 7, 4725),
            ((1152, 768), 7, 5184),
            ((720, 1280), 9, 5967),
            ((899, 1024), 10, 6551),
            ((1152, 1152), 10, 7371),
            ((1153, 1153), 17, 7371),
            ((1080, 1920), 16, 7269),
            ((1920, 1080), 16, 7317),
            ((1200, 1600), 21, 7309),
            ((3024, 4032), 31, 7309),
            ((1000, 3000), 13, 7215),
            ((3000, 1000), 13, 7309),
            ((100, 2000), 7, 2196),
            ((2000, 100), 7, 2349),
            ((10, 1000), 4, 811),
            ((2304, 2304), 37, 7371),
            ((1401, 1149), 13, 8765),
        ];
        let anyres = released();
        for ((height, width), tiles, tokens) in table {
            let packing = anyres.single(height, width);
            let found = (packing.tiles(), packing.tokens());
            assert_eq!(found, (tiles, tokens), "{height} x {width}");
        }
    }

    #[test]
    fn lengths_are_rounded_to_seven_decimals_before_the_fraction_is_cut_off() {
        // 47 * (54 / 423) is 5.999… in floats; LLaVA-NeXT keeps 5 rows here.
        let grid = released().single(47, 423).grid.unwrap();
        assert_eq!(grid.rows.len(), 7);
    }

    #[test]
    fn a_large_grid_is_cut_and_then_scaled_down() {
        let grid = released().single(1080, 1920).grid.unwrap();
        assert_eq!(grid.tiles, [3, 5]);
        assert_eq!((grid.rows.clone(), grid.columns.clone()), (3..78, 0..135));
        assert_eq!(grid.scaled, Some([60, 108]));
    }

    #[test]
    fn each_of_several_images_takes_one_tile_and_a_newline() {
        let packing = released().several();
        assert_eq!((packing.tiles(), packing.tokens()), (1, 730));
    }

    #[test]
    fn floor_division_does_not_round_up() {
        // 1 / 0.1 is 10 in floats, and 1 // 0.1 is 9 in Python.
        assert_eq!(floor_divided(1.0, 0.1), 9);
        assert_eq!(floor_divided(75.0, 1.2423), 60);
    }

    /// The settings of the tests' checkpoint, and hashes of the output of transformers 5.23
    /// (`LlavaOnevisionImageProcessorPil`, Pillow 13) for the tests' images.
    #[test]
    fn pixels_are_those_of_transformers() {
        let folder = onevision_folder();
        let config = LlavaOnevisionConfig::open(folder.path()).unwrap();
        let settings = ImageProcessorConfig::open_onevision(folder.path(), 56).unwrap();
        let anyres = Anyres::new(AnyresLayout::new(&config), &settings);
        let recorded = [
            (
                100,
                61,
                5,
                "a25cfb1432e43e04d62c12f42a36a72fb98859b4e6ce17b564b47f73b6615ba1",
            ),
            (
                61,
                200,
                9,
                "7129409270e8c257309730f3ceb14c4de15c576de5d375cb98e51e4163696ae4",
            ),
            (
                56,
                56,
                2,
                "4fe4bc4436563e80745c08a0ae01d85f8066a547e11aa02c2862e827bda4426c",
            ),
        ];
        for (width, height, tiles, hash) in recorded {
            let cut = anyres.cut_single(&pattern(width, height));
            assert_eq!(cut.pixels.len(), tiles * 3 * 56 * 56);
            assert_eq!(cut.packing.tiles(), tiles);
            assert_eq!(sha256_floats(&cut.pixels), hash, "{width} x {height}");
        }
        let recorded = [
            (
                100,
                61,
                "c2617d057a1c3d85d93e9dd8c3c40736dd5fd5a283ec98b990cd86272fad2b9f",
            ),
            (
                61,
                200,
                "ec4be7edfc7ba644e722ddbd195c9e02049001f790225eb93867f98dffdcc44b",
            ),
        ];
        for (width, height, hash) in recorded {
            let cut = anyres.cut_several(pattern(width, height));
            assert_eq!(sha256_floats(&cut.pixels), hash, "{width} x {height}");
        }
    }
}
