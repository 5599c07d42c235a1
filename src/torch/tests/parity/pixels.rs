//! Parity of preprocessed images of many sizes and formats, for both models.

use std::path::Path;

use super::{Recorded, Report, compare, image_file, json};
use ovchat_models::preprocess::{
    Clip, ImageProcessorConfig, LlavaOnevisionProcessor, PIXELS_MAX, decode,
};

#[derive(serde::Deserialize)]
struct Case {
    file: String,
    lossless: bool,
}

/// JPEG decoders may round differently: the maximum and the mean difference in gray levels.
const JPEG_LEVELS: [f64; 2] = [2.0, 0.05];

#[test]
fn pixels_are_those_of_the_reference() {
    compare("pixels", "pixels", block);
}

fn block(folder: &Path, report: &mut Report) {
    let policy = LlavaOnevisionProcessor::open(&folder.join("../onevision/pixels")).unwrap();
    let processor = ImageProcessorConfig::open_clip(&folder.join("clip"), 14).unwrap();
    let clip = Clip::new(&processor);
    let expected = Recorded::open(&folder.join("expected.safetensors"));
    let cases: Vec<Case> = json(&folder.join("cases.json"));
    let mut lossless = [Apart::default(); 3];
    let mut lossy = [Apart::default(); 3];
    for (index, case) in cases.iter().enumerate() {
        let image = image_file(&folder.join(&case.file));
        let rgb = decode(&image.bytes, PIXELS_MAX).unwrap();
        let found = [
            (
                "one",
                levels(
                    &policy.tiles(&image, 1).unwrap().pixels,
                    policy.anyres.side(),
                    [0.5; 3],
                    [0.5; 3],
                ),
            ),
            (
                "several",
                levels(
                    &policy.tiles(&image, 2).unwrap().pixels,
                    policy.anyres.side(),
                    [0.5; 3],
                    [0.5; 3],
                ),
            ),
            (
                "judge",
                levels(
                    &clip.pixels(rgb),
                    clip.side(),
                    processor.image_mean,
                    processor.image_std,
                ),
            ),
        ];
        let group = if case.lossless {
            &mut lossless
        } else {
            &mut lossy
        };
        for ((name, found), apart) in found.iter().zip(group) {
            let expected = expected.tensor(&format!("{name}.{index}")).flatten(0, -1);
            let expected: Vec<u8> = Vec::try_from(expected).unwrap();
            apart.add(&case.file, found, &expected);
        }
    }
    let names = ["one image", "one of several images", "the judge's image"];
    for (name, apart) in names.iter().zip(&lossless) {
        let case = format!("{name}, lossless files");
        report.equal(case, apart.files_that_differ, apart.files);
    }
    let [most, mean] = JPEG_LEVELS;
    for (name, apart) in names.iter().zip(&lossy) {
        let average = apart.sum / apart.levels;
        let bound = format!("{most} levels, {mean} on average (here {average:.4})");
        let holds = apart.most <= most && average <= mean;
        report.line(
            format!("{name}, JPEG"),
            [apart.most, apart.most / 255.0],
            bound,
            holds,
        );
    }
    for number in 0..2 {
        let tiles = policy
            .tiles(&image_file(&folder.join(format!("ramp-{number}.png"))), 1)
            .unwrap();
        let found = tch::Tensor::from_slice(&tiles.pixels);
        let name = format!("floats.{number}");
        report.tensor(
            format!("all gray levels as floats, part {}", number + 1),
            &found,
            &expected.tensor(&name).flatten(0, -1),
            0.0,
        );
        let file = image_file(&folder.join(format!("clip-ramp-{number}.png")));
        let found = clip.pixels(decode(&file.bytes, PIXELS_MAX).unwrap());
        report.tensor(
            format!("all gray levels as the judge's floats, part {}", number + 1),
            &tch::Tensor::from_slice(&found),
            &expected
                .tensor(&format!("clip_floats.{number}"))
                .flatten(0, -1),
            0.0,
        );
    }
}

/// Differences of gray levels.
#[derive(Debug, Clone, Copy, Default)]
struct Apart {
    files: usize,
    files_that_differ: usize,
    most: f64,
    sum: f64,
    levels: f64,
}

impl Apart {
    fn add(&mut self, file: &str, found: &[u8], expected: &[u8]) {
        assert_eq!(found.len(), expected.len(), "{file}");
        let differences = found
            .iter()
            .zip(expected)
            .map(|(one, other)| one.abs_diff(*other));
        let most = differences.clone().max().map_or(0.0, f64::from);
        self.files += 1;
        self.files_that_differ += usize::from(most > 0.0);
        self.most = self.most.max(most);
        self.sum += differences.map(f64::from).sum::<f64>();
        self.levels += found.len() as f64;
    }
}

/// Converts normalized tiles, `[tiles, 3, side, side]`, back to gray levels.
fn levels(pixels: &[f32], side: usize, mean: [f64; 3], std: [f64; 3]) -> Vec<u8> {
    let plane = side * side;
    let level = |(index, &value): (usize, &f32)| {
        let channel = index / plane % 3;
        ((f64::from(value) * std[channel] + mean[channel]) * 255.0).round() as u8
    };
    pixels.iter().enumerate().map(level).collect()
}
