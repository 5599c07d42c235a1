//! Parity of preprocessed images of many sizes and formats, for every model.

use std::path::Path;

use tch::Tensor;

use super::{Recorded, Report, compare, image_file, json};
use ovchat_models::Visual;
use ovchat_models::preprocess::{Clip, ImageProcessorConfig, PIXELS_MAX, Processor, decode};

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
    let processors = Processors::open(folder);
    let expected = Recorded::open(&folder.join("expected.safetensors"));
    images(folder, &processors, &expected, report);
    ramps(folder, &processors, &expected, report);
    center_crops(folder, &folder.join("../llava"), report);
}

/// The image processors of LLaVA-OneVision and of the judge.
struct Processors {
    policy: Processor,
    policy_side: usize,
    judge: Clip,
    judge_config: ImageProcessorConfig,
}

impl Processors {
    fn open(folder: &Path) -> Self {
        let policy = Processor::open(&folder.join("../onevision/pixels")).unwrap();
        let judge_config = ImageProcessorConfig::open_clip(&folder.join("clip"), 14).unwrap();
        Self {
            policy_side: side_of(&policy),
            policy,
            judge: Clip::new(&judge_config),
            judge_config,
        }
    }

    /// The policy's pixels of an image in a prompt with `images` images.
    fn policy(&self, image: &Visual, images: usize) -> Vec<f32> {
        self.policy.tiles(image, images).unwrap().pixels
    }

    /// The judge's pixels of an image.
    fn judge(&self, image: &Visual) -> Vec<f32> {
        let rgb = decode(&image.bytes, PIXELS_MAX).unwrap();
        self.judge.pixels(rgb)
    }

    /// The gray levels of an image as the only one of its prompt, as one of several, and for the
    /// judge.
    fn levels(&self, image: &Visual) -> [Vec<u8>; 3] {
        let side = self.policy_side;
        let policy = |images| levels(&self.policy(image, images), side, [0.5; 3], [0.5; 3]);
        let ImageProcessorConfig {
            image_mean,
            image_std,
            ..
        } = self.judge_config;
        let judge = levels(&self.judge(image), self.judge.side(), image_mean, image_std);
        [policy(1), policy(2), judge]
    }
}

/// The side of the tower's input, in pixels.
fn side_of(processor: &Processor) -> usize {
    processor.architecture().vision_config().image_size
}

/// Compares image files of many sizes and formats: lossless ones exactly, JPEG files within
/// [`JPEG_LEVELS`].
fn images(folder: &Path, processors: &Processors, expected: &Recorded, report: &mut Report) {
    let cases: Vec<Case> = json(&folder.join("cases.json"));
    let mut lossless = [Apart::default(); 3];
    let mut lossy = [Apart::default(); 3];
    for (index, case) in cases.iter().enumerate() {
        let found = processors.levels(&image_file(&folder.join(&case.file)));
        let group = if case.lossless {
            &mut lossless
        } else {
            &mut lossy
        };
        let names = ["one", "several", "judge"];
        for ((name, found), apart) in names.iter().zip(found).zip(group) {
            let expected = expected.tensor(&format!("{name}.{index}")).flatten(0, -1);
            let expected: Vec<u8> = Vec::try_from(expected).unwrap();
            apart.add(&case.file, &found, &expected);
        }
    }
    let names = ["one image", "one of several images", "the judge's image"];
    for (name, apart) in names.iter().zip(&lossless) {
        apart.report_lossless(name, report);
    }
    for (name, apart) in names.iter().zip(&lossy) {
        apart.report_lossy(name, report);
    }
}

/// Compares the same files with LLaVA-1.5's processor in several configurations, recorded in the
/// folder `place`: resized and cropped to the same size, to a smaller and to a larger one.
fn center_crops(folder: &Path, place: &Path, report: &mut Report) {
    let cases: Vec<Case> = json(&folder.join("cases.json"));
    let expected = Recorded::open(&place.join("pixels/expected.safetensors"));
    let checkpoints: Vec<String> = json(&place.join("pixels/cases.json"));
    for (number, name) in checkpoints.iter().enumerate() {
        let checkpoint = place.join(name);
        let processor = Processor::open(&checkpoint).unwrap();
        let side = side_of(&processor);
        let config = ImageProcessorConfig::open_clip(&checkpoint, side).unwrap();
        let pixels = |file: &str| {
            let tiles = processor.tiles(&image_file(&folder.join(file)), 1);
            tiles.unwrap().pixels
        };
        let [mut lossless, mut lossy] = [Apart::default(); 2];
        for (index, case) in cases.iter().enumerate() {
            let found = levels(
                &pixels(&case.file),
                side,
                config.image_mean,
                config.image_std,
            );
            let wanted = expected.tensor(&format!("{number}.{index}")).flatten(0, -1);
            let wanted: Vec<u8> = Vec::try_from(wanted).unwrap();
            let group = if case.lossless {
                &mut lossless
            } else {
                &mut lossy
            };
            group.add(&case.file, &found, &wanted);
        }
        let title = format!("LLaVA-1.5, {} cropped to {side}", config.size);
        lossless.report_lossless(&title, report);
        lossy.report_lossy(&title, report);
        if config.size != side {
            continue;
        }
        for part in 0..2 {
            let found = pixels(&format!("clip-ramp-{part}.png"));
            let wanted = expected.tensor(&format!("floats.{part}")).flatten(0, -1);
            report.tensor(
                format!("all gray levels as LLaVA-1.5's floats, part {}", part + 1),
                &Tensor::from_slice(&found),
                &wanted,
                0.0,
            );
        }
    }
}

/// Compares the floats of images that contain all gray levels.
fn ramps(folder: &Path, processors: &Processors, expected: &Recorded, report: &mut Report) {
    let mut exactly = |case: String, found: &[f32], name: String| {
        let expected = expected.tensor(&name).flatten(0, -1);
        report.tensor(case, &Tensor::from_slice(found), &expected, 0.0);
    };
    for number in 0..2 {
        let part = number + 1;
        let image = image_file(&folder.join(format!("ramp-{number}.png")));
        exactly(
            format!("all gray levels as floats, part {part}"),
            &processors.policy(&image, 1),
            format!("floats.{number}"),
        );
        let image = image_file(&folder.join(format!("clip-ramp-{number}.png")));
        exactly(
            format!("all gray levels as the judge's floats, part {part}"),
            &processors.judge(&image),
            format!("clip_floats.{number}"),
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

    /// Reports files that lose nothing, whose levels are equal.
    fn report_lossless(&self, name: &str, report: &mut Report) {
        let case = format!("{name}, lossless files");
        report.equal(case, self.files_that_differ, self.files);
    }

    /// Reports JPEG files, whose levels differ by at most [`JPEG_LEVELS`].
    fn report_lossy(&self, name: &str, report: &mut Report) {
        let [most, mean] = JPEG_LEVELS;
        let average = self.sum / self.levels;
        let bound = format!("{most} levels, {mean} on average (here {average:.4})");
        let holds = self.most <= most && average <= mean;
        report.line(
            format!("{name}, JPEG"),
            [self.most, self.most / 255.0],
            bound,
            holds,
        );
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
