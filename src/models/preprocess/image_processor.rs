//! The settings of a checkpoint's image processor.
//!
//! transformers 4.x writes them as `preprocessor_config.json`; 5.x nests them as `image_processor`
//! in `processor_config.json`, and reads that first if both are there (`image_processing_base.py`).

use std::path::Path;

use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::pinpoints;
use crate::checkpoint::json::JsonConfig;

/// CLIP's means of red, green and blue: the default of both image processors.
const CLIP_MEAN: [f64; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// CLIP's standard deviations.
const CLIP_STD: [f64; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];

/// The settings of an image processor that are not fixed by its class.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageProcessorConfig {
    /// Size in pixels that the shorter edge of an image, or both edges of a square, are resized to.
    pub size: usize,
    /// Side of the center crop, if there is one.
    pub crop_size: Option<usize>,
    /// True if images are padded to squares first (`do_pad`).
    pub pads: bool,
    /// True if both sides are resized to `size`, because it is given as `height` and `width`.
    pub squashes: bool,
    /// Means of red, green and blue, in the range from 0 to 1.
    pub image_mean: [f64; 3],
    pub image_std: [f64; 3],
    /// Factor that levels are multiplied by first: 1/255.
    pub rescale_factor: f64,
    /// Resolutions for anyres, if the file has them.
    pub image_grid_pinpoints: Option<Vec<[usize; 2]>>,
}

impl ImageProcessorConfig {
    /// Returns LLaVA-NeXT's settings for a tower of `side` pixels, which no file can change
    /// (`SigLipImageProcessor` of `llava/model/multimodal_encoder/siglip_encoder.py`).
    pub fn of_llava_next(side: usize) -> Self {
        Self {
            size: side,
            crop_size: None,
            pads: false,
            squashes: true,
            image_mean: [0.5; 3],
            image_std: [0.5; 3],
            rescale_factor: 1.0 / 255.0,
            image_grid_pinpoints: None,
        }
    }

    /// Reads the settings of a LLaVA-OneVision folder with tiles of `side` pixels.
    pub fn open_onevision(folder: &Path, side: usize) -> Result<Self, CheckpointError> {
        let file = image_processor(folder)?;
        let processor = Self {
            size: square(&file, "size")?.unwrap_or(384),
            crop_size: None,
            image_grid_pinpoints: pinpoints(&file, side)?,
            ..Self::common(&file)?
        };
        file.only_flag("do_center_crop", false)?;
        if processor.size != side {
            let problem = format!(
                "is {}, but the vision tower of config.json takes {side} pixels",
                processor.size
            );
            return Err(file.fault("size", problem));
        }
        Ok(processor)
    }

    /// Reads the settings of a CLIP folder whose tower takes `side` pixels.
    pub fn open_clip(folder: &Path, side: usize) -> Result<Self, CheckpointError> {
        let file = image_processor(folder)?;
        let cropped = file.flag("do_center_crop")?.unwrap_or(true);
        let size = square(&file, "size")?.unwrap_or(224);
        let crop_size = square(&file, "crop_size")?.unwrap_or(224);
        let output = if cropped { crop_size } else { size };
        if output != side {
            let key = if cropped { "crop_size" } else { "size" };
            let problem =
                format!("is {output}, but the vision tower of config.json takes {side} pixels");
            return Err(file.fault(key, problem));
        }
        Ok(Self {
            size,
            crop_size: cropped.then_some(crop_size),
            ..Self::common(&file)?
        })
    }

    /// Reads the settings that both classes share; size and crop are left to the caller.
    fn common(file: &JsonConfig) -> Result<Self, CheckpointError> {
        for key in ["do_resize", "do_rescale", "do_normalize"] {
            file.only_flag(key, true)?;
        }
        if file.integer("resample")?.is_some_and(|filter| filter != 3) {
            return Err(file.fault("resample", "must be 3 (bicubic)"));
        }
        let image_std = file.channels("image_std")?.unwrap_or(CLIP_STD);
        if image_std.contains(&0.0) {
            return Err(file.fault("image_std", "must not contain 0"));
        }
        let rescale_factor = file.number("rescale_factor")?.unwrap_or(1.0 / 255.0);
        if rescale_factor == 0.0 {
            return Err(file.fault("rescale_factor", "must not be 0"));
        }
        Ok(Self {
            size: 0,
            crop_size: None,
            pads: file.flag("do_pad")?.unwrap_or(false),
            squashes: match file.get("size") {
                Some(size) => size.get("height").is_some_and(|height| !height.is_null()),
                None => false,
            },
            image_mean: file.channels("image_mean")?.unwrap_or(CLIP_MEAN),
            image_std,
            rescale_factor,
            image_grid_pinpoints: None,
        })
    }

    /// Returns the color that images are padded to squares with: `int(255 * mean)`.
    pub fn background(&self) -> [u8; 3] {
        self.image_mean.map(|mean| (mean * 255.0) as u8)
    }

    /// Returns the normalized value of each level of each channel: `(level * rescale_factor - mean)
    /// / std`, the product in float64 rounded to float32, the rest in float32, as transformers'
    /// `pil` backend computes it with numpy (`image_transforms.py`, `rescale` and `normalize`).
    pub fn levels(&self) -> [[f32; 256]; 3] {
        std::array::from_fn(|channel| {
            let (mean, std) = (self.image_mean[channel], self.image_std[channel]);
            std::array::from_fn(|level| {
                let scaled = (level as f64 * self.rescale_factor) as f32;
                (scaled - mean as f32) / std as f32
            })
        })
    }

    /// Returns [`ImageProcessorConfig::levels`] as transformers' `torchvision` backend computes
    /// them, which saves the product: `(level - mean / rescale_factor) / (std / rescale_factor)`,
    /// all in float32 (`image_processing_backends.py`, `_fuse_mean_std_and_rescale_factor`). They
    /// differ from the others in the last bit.
    pub fn fused_levels(&self) -> [[f32; 256]; 3] {
        let unscaled = (1.0 / self.rescale_factor) as f32;
        std::array::from_fn(|channel| {
            let mean = self.image_mean[channel] as f32 * unscaled;
            let std = self.image_std[channel] as f32 * unscaled;
            std::array::from_fn(|level| (level as f32 - mean) / std)
        })
    }
}

/// Reads the image processor's settings in `folder`, from either file.
fn image_processor(folder: &Path) -> Result<JsonConfig, CheckpointError> {
    let path = folder.join("processor_config.json");
    if path.exists()
        && let Some(nested) = JsonConfig::open(&path)?.section("image_processor")?
    {
        return Ok(nested);
    }
    JsonConfig::open(&folder.join("preprocessor_config.json"))
}

/// Reads a size that must be square: a number, `{"shortest_edge": n}`, or equal `height` and
/// `width`.
fn square(file: &JsonConfig, key: &str) -> Result<Option<usize>, CheckpointError> {
    match file.get(key) {
        None => return Ok(None),
        Some(value) if value.is_number() => return file.size(key),
        Some(_) => {}
    }
    let sizes = file.section(key)?.expect("is neither null nor absent");
    let edges = (
        sizes.size("shortest_edge")?,
        sizes.size("height")?,
        sizes.size("width")?,
    );
    match edges {
        (Some(edge), None, None) => Ok(Some(edge)),
        (None, Some(height), Some(width)) if height == width => Ok(Some(height)),
        _ => Err(file.fault(
            key,
            "must be a number, `shortest_edge`, or equal `height` and `width`",
        )),
    }
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "numbers are read, not computed")]
mod tests {
    use super::*;
    use crate::test_util::write;
    use serde_json::json;

    #[test]
    fn the_settings_nested_by_transformers_5_come_before_those_of_4() {
        let folder = tempfile::tempdir().unwrap();
        let old = json!({"size": {"height": 56, "width": 56}, "image_mean": [0.1, 0.2, 0.3]});
        write(folder.path(), "preprocessor_config.json", &old);
        let processor = ImageProcessorConfig::open_onevision(folder.path(), 56).unwrap();
        assert_eq!(processor.image_mean, [0.1, 0.2, 0.3]);
        let new = json!({"image_processor": {"size": {"height": 56, "width": 56}, "image_mean": [0.5, 0.5, 0.5]}});
        write(folder.path(), "processor_config.json", &new);
        let processor = ImageProcessorConfig::open_onevision(folder.path(), 56).unwrap();
        assert_eq!(processor.image_mean, [0.5; 3]);
    }

    #[test]
    fn a_processor_config_without_an_image_processor_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        write(
            folder.path(),
            "processor_config.json",
            &json!({"num_image_tokens": 16}),
        );
        write(
            folder.path(),
            "preprocessor_config.json",
            &json!({"size": 56}),
        );
        assert!(ImageProcessorConfig::open_onevision(folder.path(), 56).is_ok());
    }

    #[test]
    fn sizes_are_read_in_every_spelling() {
        let folder = tempfile::tempdir().unwrap();
        let spellings = [
            json!({"size": 60, "crop_size": 56}),
            json!({"size": {"shortest_edge": 60}, "crop_size": {"height": 56, "width": 56}}),
        ];
        for spelling in spellings {
            write(folder.path(), "preprocessor_config.json", &spelling);
            let clip = ImageProcessorConfig::open_clip(folder.path(), 56).unwrap();
            assert_eq!((clip.size, clip.crop_size), (60, Some(56)));
        }
        let oblong = json!({"size": {"height": 56, "width": 70}});
        write(folder.path(), "preprocessor_config.json", &oblong);
        let diagnostic = ImageProcessorConfig::open_onevision(folder.path(), 56).unwrap_err();
        assert!(
            diagnostic.problem.starts_with("`size` must be"),
            "{diagnostic}"
        );
    }

    #[test]
    fn a_size_that_the_tower_does_not_take_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        write(
            folder.path(),
            "preprocessor_config.json",
            &json!({"size": 384}),
        );
        let diagnostic = ImageProcessorConfig::open_onevision(folder.path(), 56).unwrap_err();
        assert!(
            diagnostic.problem.contains("takes 56 pixels"),
            "{diagnostic}"
        );
    }

    #[test]
    fn another_filter_than_bicubic_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        write(
            folder.path(),
            "preprocessor_config.json",
            &json!({"size": 56, "resample": 2}),
        );
        let diagnostic = ImageProcessorConfig::open_onevision(folder.path(), 56).unwrap_err();
        assert_eq!(diagnostic.problem, "`resample` must be 3 (bicubic)");
    }

    #[test]
    fn factors_that_would_divide_by_zero_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        for key in ["image_std", "rescale_factor"] {
            let mut settings = json!({"size": 56});
            settings[key] = json!(0.0);
            write(folder.path(), "preprocessor_config.json", &settings);
            let diagnostic = ImageProcessorConfig::open_onevision(folder.path(), 56).unwrap_err();
            assert!(diagnostic.problem.contains(key), "{diagnostic}");
        }
    }

    /// Recorded from transformers 5.23 with the `torchvision` backend and CLIP's means.
    #[test]
    fn fused_levels_differ_from_the_others_in_the_last_bit_only() {
        let folder = tempfile::tempdir().unwrap();
        write(
            folder.path(),
            "preprocessor_config.json",
            &json!({"size": 56}),
        );
        let processor = ImageProcessorConfig::open_onevision(folder.path(), 56).unwrap();
        let (levels, fused) = (processor.levels(), processor.fused_levels());
        assert_ne!(levels, fused);
        for (level, fused) in levels.as_flattened().iter().zip(fused.as_flattened()) {
            assert!((level - fused).abs() < 1e-6, "{level} {fused}");
        }
        let recorded = [0xbfe5_68dc, 0xbeaa_32f2, 0x3f9f_ee30, 0x4009_5661];
        let found = [fused[0][0], fused[0][100], fused[1][200], fused[2][255]];
        assert_eq!(found.map(f32::to_bits), recorded);
    }

    #[test]
    fn gray_levels_become_minus_one_to_one() {
        let folder = tempfile::tempdir().unwrap();
        let half = json!({"size": 56, "image_mean": 0.5, "image_std": 0.5});
        write(folder.path(), "preprocessor_config.json", &half);
        let levels = ImageProcessorConfig::open_onevision(folder.path(), 56)
            .unwrap()
            .levels();
        assert_eq!((levels[0][0], levels[2][255]), (-1.0, 1.0));
        assert_eq!(levels[1][100], ((100.0 * (1.0 / 255.0)) as f32 - 0.5) / 0.5);
    }
}
