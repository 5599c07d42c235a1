//! Image preprocessing of CLIP towers: LLaVA-RLHF's reward model pads images to squares, LLaVA-1.5
//! in transformers cuts out their centers.
//!
//! LLaVA's `expand2square` (background `int(255 * mean)`), then `CLIPImageProcessor` of
//! transformers 5: resize the shorter edge (bicubic), crop the center, normalize. Of its two
//! backends this is the default, `torchvision` (`image_processing_backends.py`), whose pixels
//! occasionally differ from those of `pil` by one level, which changes the third decimal of
//! rewards.

use crate::RowFault;
use crate::preprocess::image::Rgb;
use crate::preprocess::image_processor::ImageProcessorConfig;
use crate::preprocess::resize::Bicubic;

/// The maximum number of pixels of an image after its shorter side is resized.
const RESIZED_MAX: usize = 64_000_000;

/// CLIP's image processor.
#[derive(Debug, Clone, PartialEq)]
pub struct Clip {
    /// Side of the resized square, in pixels.
    size: usize,
    /// Side of the center crop, in pixels.
    crop: usize,
    background: [u8; 3],
    /// True if images are padded to squares (`do_pad` of LLaVA's processor).
    pads: bool,
    /// True if both sides are resized, whatever the image's shape.
    squashes: bool,
    /// Normalized value of each level of each channel.
    levels: Box<[[f32; 256]; 3]>,
}

impl Clip {
    /// Creates the processor from its config.
    pub fn new(processor: &ImageProcessorConfig) -> Self {
        Self {
            size: processor.size,
            crop: processor.crop_size.unwrap_or(processor.size),
            background: processor.background(),
            pads: processor.pads,
            squashes: processor.squashes,
            levels: Box::new(processor.fused_levels()),
        }
    }

    /// Returns the side of the tower's input, in pixels.
    pub fn side(&self) -> usize {
        self.crop
    }

    /// Returns the tower's input for an image that is padded to a square, `[3, side, side]`,
    /// normalized.
    pub fn pixels(&self, image: Rgb) -> Vec<f32> {
        let square = image.squared(self.background);
        self.center(Bicubic::Torch.resize(&square, self.size, self.size))
    }

    /// Returns the tower's input for an image whose shorter side is resized, and of which the
    /// center is cut out; padding, if the settings ask for it, comes first. Rejects an image that is
    /// so thin that its longer side would be too long.
    pub fn cropped(&self, image: Rgb) -> Result<Vec<f32>, RowFault> {
        if self.pads {
            return Ok(self.pixels(image));
        }
        if self.squashes {
            return Ok(self.center(Bicubic::Torch.resize(&image, self.size, self.size)));
        }
        let longer = |side: usize, shorter: usize| {
            // As transformers' `get_resize_output_image_size`, in float64.
            ((self.size * side) as f64 / shorter as f64) as usize
        };
        let (width, height) = if image.width <= image.height {
            (self.size, longer(image.height, image.width))
        } else {
            (longer(image.width, image.height), self.size)
        };
        if width * height > RESIZED_MAX {
            return Err(RowFault(format!(
                "{} x {} pixels are too thin: with a shorter side of {} pixels, the image would have {width} x \
                 {height}, and at most {} megapixels are supported",
                image.width,
                image.height,
                self.size,
                RESIZED_MAX / 1_000_000
            )));
        }
        Ok(self.center(Bicubic::Torch.resize(&image, width, height)))
    }

    /// Cuts out the center, `[3, side, side]`, normalized.
    fn center(&self, resized: Rgb) -> Vec<f32> {
        let [width, height] = [resized.width, resized.height];
        let middle = if self.crop > width || self.crop > height {
            // If the crop is larger than the image, transformers pads with black, with the odd
            // pixel on the right and at the bottom.
            let [wide, high] = [width, height].map(|side| side.max(self.crop));
            let mut canvas = Rgb::filled(wide, high, [0; 3]);
            canvas.paste(&resized, (wide - width) / 2, (high - height) / 2);
            canvas
        } else {
            resized
        };
        let [left, top] = [middle.width, middle.height].map(|side| (side - self.crop) / 2);
        let mut planes = vec![0.0; 3 * self.crop * self.crop];
        middle.planes(left, top, self.crop, &self.levels, &mut planes);
        planes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_util::{pattern, reward_folder, sha256_floats, write};
    use serde_json::json;

    /// Hashes of the output of transformers 5.23 (`CLIPImageProcessor`, backend `torchvision` 0.26)
    /// for the padded image.
    #[test]
    fn pixels_are_those_of_transformers_whether_cut_whole_or_padded() {
        let recorded = [
            (
                56,
                "f97696fcb7681957132a6eccc611d270f025001e61f7ffea9ca1d1faaa40478f",
            ),
            (
                60,
                "e29a490a9cc616f7c806a2e8fbc1e01fb8b021b41364fec60c59557b2869c010",
            ),
            (
                51,
                "9dad5b1de6879f782fea78c0bd3e11577b9cd11e033c2cf99280f5c564102072",
            ),
        ];
        let (_folder, spec) = reward_folder();
        for (size, hash) in recorded {
            let settings =
                json!({"size": {"shortest_edge": size}, "crop_size": {"height": 56, "width": 56}});
            write(&spec.vision, "preprocessor_config.json", &settings);
            let clip =
                Clip::new(&ImageProcessorConfig::open_clip(&spec.vision, 56).expect("settings"));
            let pixels = clip.pixels(pattern(100, 61));
            assert_eq!(pixels.len(), 3 * 56 * 56);
            assert_eq!(sha256_floats(&pixels), hash, "{size}");
        }
    }
}
