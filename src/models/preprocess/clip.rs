//! Image preprocessing of LLaVA-RLHF's reward model: padding to a square, then CLIP's image
//! processor.
//!
//! LLaVA's `expand2square` (background `int(255 * mean)`), then `CLIPImageProcessor` of
//! transformers 5: resize the shorter edge (bicubic), crop the center, normalize. Of its two
//! backends this is the default, `torchvision` (`image_processing_backends.py`), whose pixels
//! occasionally differ from those of `pil` by one level, which changes the third decimal of
//! rewards.

use crate::preprocess::image::Rgb;
use crate::preprocess::image_processor::ImageProcessorConfig;
use crate::preprocess::resize::Bicubic;

/// CLIP's image processor for square images.
#[derive(Debug, Clone, PartialEq)]
pub struct Clip {
    /// Side of the resized square, in pixels.
    size: usize,
    /// Side of the center crop, in pixels.
    crop: usize,
    background: [u8; 3],
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
            levels: Box::new(processor.fused_levels()),
        }
    }

    /// Returns the side of the tower's input, in pixels.
    pub fn side(&self) -> usize {
        self.crop
    }

    /// Returns the tower's input, `[3, side, side]`, normalized.
    pub fn pixels(&self, image: Rgb) -> Vec<f32> {
        let resized = Bicubic::Torch.resize(&image.squared(self.background), self.size, self.size);
        let middle = if self.crop > self.size {
            // If the crop is larger than the image, transformers pads with black, with the odd
            // pixel on the right and at the bottom.
            let mut canvas = Rgb::filled(self.crop, self.crop, [0; 3]);
            let offset = (self.crop - self.size) / 2;
            canvas.paste(&resized, offset, offset);
            canvas
        } else {
            resized
        };
        let offset = (middle.width - self.crop) / 2;
        let mut planes = vec![0.0; 3 * self.crop * self.crop];
        middle.planes(offset, offset, self.crop, &self.levels, &mut planes);
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
