//! The `overlap` stage: benchmark prompts whose image or question is among the training prompts.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::image_marks::{ImageMarks, Marks, image_marks};
use super::{ComputeStage, Failure, Input, Stage, StageError, StageKind, TableName, WholeTables};
use ovchat_data::store::Key;
use ovchat_data::tables::{Overlap, Prompt, PromptVideo, Row, rows};

/// Finds benchmark prompts that training prompts repeat: the same image by its pixels, an image of the
/// same shape that looks alike (perceptual hashes), or a question with a common run of words. An expectation makes it
/// a guard: `expect: { clean: { table: <table>, value: count(*), at_most: 0 } }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FindOverlap {
    /// The table of prompts of the benchmark.
    pub benchmark: TableName,
    /// The table of prompts that a model is trained on.
    pub training: TableName,
    /// The largest number of differing bits of two perceptual hashes, of 64, at which images look
    /// alike. Default: 6.
    #[serde(default = "FindOverlap::usual_distance")]
    pub distance_max: u8,
    /// The number of successive words that two questions must share. Default: 8. 0 compares no
    /// questions.
    #[serde(default = "FindOverlap::usual_words")]
    pub words: u8,
}

impl FindOverlap {
    fn usual_distance() -> u8 {
        6
    }

    fn usual_words() -> u8 {
        8
    }
}

impl Stage for FindOverlap {
    fn inputs(&self) -> Vec<Input<'_>> {
        let input = |field, table| Input {
            field,
            table: Some(table),
            needs: AskedAbout::schema(),
            kind: Prompt::KIND,
        };
        vec![
            input("benchmark", &self.benchmark),
            input("training", &self.training),
        ]
    }

    fn kind(&self) -> Option<&'static str> {
        Some(Overlap::KIND)
    }

    fn output(&self, _: &[(TableName, SchemaRef)]) -> Result<SchemaRef, StageError> {
        if self.distance_max > 32 {
            let message = format!("{} of 64 differing bits are no likeness", self.distance_max);
            return Err(StageError::at(
                "distance_max",
                message,
                "set at most 32; copies differ in some 6",
            ));
        }
        Ok(Overlap::schema())
    }

    fn work(&self) -> StageKind<'_> {
        StageKind::Compute(Box::new(self))
    }
}

rows! {
    /// The columns of a prompt that are compared.
    pub struct AskedAbout: "asked about" => {
        /// The prompt's id.
        pub prompt_id: String,
        /// The id in the source.
        pub id: Option<String>,
        /// The ids of its images.
        pub image_ids: Vec<String>,
        /// Its videos.
        pub videos: Option<Vec<PromptVideo>>,
        /// The question.
        pub question: String,
    }
}

impl AskedAbout {
    /// The images and the frames of videos.
    fn shown(&self) -> impl Iterator<Item = &String> {
        let frames = self
            .videos
            .iter()
            .flatten()
            .flat_map(|video| &video.frame_ids);
        self.image_ids.iter().chain(frames)
    }
}

/// The images of a benchmark.
struct Looks {
    ids: Vec<String>,
    marks: Vec<Marks>,
    /// The images with these pixels.
    pixels: HashMap<String, Vec<usize>>,
    distance_max: u32,
}

/// A benchmark image that an image is alike, and the number of differing bits; 0 with equal pixels.
#[derive(Debug, Clone, Copy)]
struct Alike {
    image: usize,
    is_equal: bool,
    distance: u32,
}

impl Looks {
    fn new(marks: HashMap<String, Marks>, distance_max: u32) -> Self {
        let sorted: BTreeMap<String, Marks> = marks.into_iter().collect();
        let mut pixels: HashMap<String, Vec<usize>> = HashMap::new();
        for (number, marks) in sorted.values().enumerate() {
            pixels.entry(marks.pixels.clone()).or_default().push(number);
        }
        let (ids, marks) = sorted.into_iter().unzip();
        Self {
            ids,
            marks,
            pixels,
            distance_max,
        }
    }

    /// Returns the benchmark images that an image is alike: those with equal pixels, and those of nearly
    /// its shape that look alike.
    fn alike(&self, image: &Marks) -> Vec<Alike> {
        let equal = self.pixels.get(&image.pixels);
        let alike = self.marks.iter().enumerate().filter_map(|(number, own)| {
            let distance = (own.look ^ image.look).count_ones();
            let is_near = distance <= self.distance_max && {
                let shapes = own.aspect / image.aspect;
                (1.0 / ASPECT_MAX..=ASPECT_MAX).contains(&shapes)
            };
            let is_equal = equal.is_some_and(|equal| equal.contains(&number));
            (is_equal || is_near).then_some(Alike {
                image: number,
                is_equal,
                distance,
            })
        });
        alike.collect()
    }
}

/// The first overlap of a benchmark prompt, and the number of training prompts.
struct Found {
    first: Overlap,
    count: i64,
}

/// The overlaps so far, by benchmark prompt and kind.
type AllFound = BTreeMap<(usize, &'static str), Found>;

impl ComputeStage for &FindOverlap {
    fn compute(&self, tables: &WholeTables<'_>) -> Result<RecordBatch, Failure> {
        let benchmark: Vec<AskedAbout> = tables.rows(&self.benchmark)?;
        let own: HashSet<String> = benchmark
            .iter()
            .flat_map(AskedAbout::shown)
            .cloned()
            .collect();
        let looks = Looks::new(image_marks(tables, &own)?, u32::from(self.distance_max));
        let alike = like_images(tables, &looks)?;
        let mut asked: HashMap<&str, Vec<usize>> = HashMap::new();
        for (number, prompt) in benchmark.iter().enumerate() {
            for id in prompt.shown() {
                asked.entry(id).or_default().push(number);
            }
        }
        let runs = Runs::new(&benchmark, usize::from(self.words));
        let mut found = AllFound::new();
        tables.each(&self.training, |training: AskedAbout| {
            let mut seen = HashSet::new();
            let shown = training.shown().filter_map(|id| Some((id, alike.get(id)?)));
            for (id, alike) in shown.flat_map(|(id, all)| all.iter().map(move |one| (id, one))) {
                let kind = if alike.is_equal { "pixels" } else { "look" };
                let own = &looks.ids[alike.image];
                for &number in asked.get(own.as_str()).into_iter().flatten() {
                    if seen.insert((number, kind)) {
                        let about = Shared {
                            image: Some((own, id, alike.distance)),
                            words: None,
                        };
                        add(
                            &mut found,
                            (number, kind),
                            &benchmark[number],
                            &training,
                            about,
                        );
                    }
                }
            }
            for (number, words) in runs.shared(&training.question) {
                if seen.insert((number, "question")) {
                    let about = Shared {
                        image: None,
                        words: Some(words),
                    };
                    add(
                        &mut found,
                        (number, "question"),
                        &benchmark[number],
                        &training,
                        about,
                    );
                }
            }
            Ok(())
        })?;
        let rows: Vec<Overlap> = found
            .into_values()
            .map(|Found { first, count }| Overlap { count, ..first })
            .collect();
        Ok(Overlap::to_batch(&rows))
    }
}

/// The largest ratio of the shapes (width by height) of copies; sizes are whole numbers of pixels.
const ASPECT_MAX: f64 = 1.1;

/// The number of images that are compared at once.
const AT_ONCE: usize = 1 << 14;

/// Returns the images of the run that are alike to one of a benchmark, by their ids.
fn like_images(
    tables: &WholeTables<'_>,
    looks: &Looks,
) -> Result<HashMap<String, Vec<Alike>>, Failure> {
    let mut alike = HashMap::new();
    let mut unhashed = HashSet::new();
    let mut waiting: Vec<(String, Marks)> = Vec::new();
    let mut compare = |waiting: &mut Vec<(String, Marks)>| {
        let found = waiting.par_iter().filter_map(|(id, marks)| {
            let alike = looks.alike(marks);
            (!alike.is_empty()).then(|| (id.clone(), alike))
        });
        alike.extend(found.collect::<Vec<_>>());
        waiting.clear();
    };
    tables.each_image(|image: ImageMarks| {
        match (image.pixels, image.look) {
            (Some(pixels), Some(look)) => {
                let marks = Marks {
                    pixels,
                    look: look.cast_unsigned(),
                    aspect: f64::from(image.width) / f64::from(image.height),
                };
                waiting.push((image.image_id, marks));
            }
            _ => drop(unhashed.insert(image.image_id)),
        }
        if waiting.len() >= AT_ONCE {
            compare(&mut waiting);
        }
        Ok(())
    })?;
    waiting.extend(image_marks(tables, &unhashed)?);
    compare(&mut waiting);
    Ok(alike)
}

/// The image or words that two prompts share.
struct Shared<'a> {
    /// The ids of the benchmark image and of the training image, and the number of differing bits.
    image: Option<(&'a str, &'a str, u32)>,
    words: Option<String>,
}

fn add(
    found: &mut AllFound,
    (number, kind): (usize, &'static str),
    prompt: &AskedAbout,
    training: &AskedAbout,
    shared: Shared<'_>,
) {
    let entry = found.entry((number, kind)).or_insert_with(|| {
        let key = Key::new("overlap").with(&prompt.prompt_id);
        Found {
            first: Overlap {
                row_key: key.with(&training.prompt_id).with(kind).finish(),
                prompt_id: prompt.prompt_id.clone(),
                id: prompt.id.clone(),
                training_prompt_id: training.prompt_id.clone(),
                training_id: training.id.clone(),
                kind: kind.to_owned(),
                image_id: shared.image.map(|(own, _, _)| own.to_owned()),
                training_image_id: shared.image.map(|(_, other, _)| other.to_owned()),
                distance: shared.image.map(|(_, _, distance)| distance.cast_signed()),
                words: shared.words,
                count: 0,
            },
            count: 0,
        }
    });
    entry.count += 1;
}

/// The largest number of benchmark prompts that share a run of words which is compared.
const COMMON_MAX: usize = 10;

/// The runs of words in the questions of a benchmark.
struct Runs {
    length: usize,
    /// The hashes of runs, with the prompts that have them.
    prompts: HashMap<u64, Vec<usize>>,
}

impl Runs {
    fn new(benchmark: &[AskedAbout], length: usize) -> Self {
        let mut prompts: HashMap<u64, Vec<usize>> = HashMap::new();
        if length > 0 {
            for (number, prompt) in benchmark.iter().enumerate() {
                let words = words(&prompt.question);
                for run in words.windows(length) {
                    let numbers = prompts.entry(hash(run)).or_default();
                    if numbers.last() != Some(&number) {
                        numbers.push(number);
                    }
                }
            }
        }
        // A run that many prompts of the benchmark have is an instruction about the form of the answer.
        prompts.retain(|_, numbers| numbers.len() <= COMMON_MAX);
        Self { length, prompts }
    }

    /// Returns the prompts that share a run of words with a question, with the first such run.
    fn shared(&self, question: &str) -> Vec<(usize, String)> {
        if self.prompts.is_empty() {
            return Vec::new();
        }
        let words = words(question);
        let mut shared: Vec<(usize, String)> = Vec::new();
        for run in words.windows(self.length) {
            for &number in self.prompts.get(&hash(run)).into_iter().flatten() {
                if shared.iter().all(|(other, _)| *other != number) {
                    shared.push((number, run.join(" ")));
                }
            }
        }
        shared
    }
}

/// Returns the words of a text in lower case, without punctuation. In scripts without spaces between
/// words, each character is one.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    for word in text.split(|c: char| !c.is_alphanumeric()) {
        let mut rest = word;
        while let Some(at) = rest.find(is_written_without_spaces) {
            let character = rest[at..].chars().next().expect("one was found");
            let (before, behind) = (&rest[..at], &rest[at + character.len_utf8()..]);
            words.extend([before.to_lowercase(), character.to_string()]);
            rest = behind;
        }
        words.push(rest.to_lowercase());
    }
    words.retain(|word| !word.is_empty());
    words
}

/// True for characters of Chinese, Japanese, Thai, Lao, Khmer and Burmese.
fn is_written_without_spaces(character: char) -> bool {
    matches!(character, '\u{0e00}'..='\u{0eff}' | '\u{1000}'..='\u{109f}' | '\u{1780}'..='\u{17ff}'
        | '\u{3040}'..='\u{30ff}' | '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}'
        | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{3ffff}')
}

fn hash(run: &[String]) -> u64 {
    let mut hasher = DefaultHasher::new();
    run.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::test_pipeline::{TestPipeline, prompt, stage};
    use super::*;

    fn find(settings: serde_json::Value) -> FindOverlap {
        let mut all = json!({"benchmark": "bench", "training": "train"});
        all.as_object_mut()
            .unwrap()
            .extend(settings.as_object().unwrap().clone());
        stage(all)
    }

    /// Returns an image file of 16 by 16 pixels; `level` moves its bright corner.
    fn image(level: u8, noise: u8) -> Vec<u8> {
        let mut file = b"P5\n16 16\n255\n".to_vec();
        for y in 0..16_u8 {
            for x in 0..16_u8 {
                let bright = u8::from(x.wrapping_mul(level) % 16 > y) * 200;
                file.push(bright + noise * (x % 2));
            }
        }
        file
    }

    #[test]
    fn equal_pixels_like_looks_and_shared_words_are_found() {
        let mut pipeline = TestPipeline::new();
        let about = |id: &str, image: &str, question: &str| Prompt {
            image_ids: vec![image.to_owned()],
            id: Some(format!("{id} of the source")),
            ..prompt(id, question)
        };
        let benchmark = [image(1, 0), image(3, 0), image(7, 0)].map(|file| pipeline.image(&file));
        let mut spaced = b"P5 16 16 255\n".to_vec();
        spaced.extend(&image(1, 0)[13..]);
        let training = [spaced, image(3, 1), image(12, 0)].map(|file| pipeline.image(&file));
        let long = "What is the color of the car on the left?";
        let bench = [
            about("a", &benchmark[0], "Why?"),
            about("b", &benchmark[1], "Why?"),
            about("c", &benchmark[2], long),
        ];
        pipeline.table("bench", &bench);
        let train = [
            about("t", &training[0], "Why?"),
            about("u", &training[1], "Why?"),
            about("v", &training[1], "Why?"),
            about(
                "w",
                &training[2],
                "Say: what is the color of the car, on the right?",
            ),
        ];
        pipeline.table("train", &train);
        let rows = pipeline.compute(&find(json!({}))).unwrap();
        let rows = Overlap::from_batch(&rows).unwrap();
        let found: Vec<_> = rows
            .iter()
            .map(|row| {
                (
                    &*row.prompt_id,
                    &*row.kind,
                    &*row.training_prompt_id,
                    row.count,
                )
            })
            .collect();
        let expected = [
            ("a", "pixels", "t", 1),
            ("b", "look", "u", 2),
            ("c", "question", "w", 1),
        ];
        assert_eq!(found, expected);
        assert_eq!(
            rows[2].words.as_deref(),
            Some("what is the color of the car on")
        );
        assert_eq!(rows[0].training_id.as_deref(), Some("t of the source"));
        let none = pipeline
            .compute(&find(json!({"words": 0, "distance_max": 0})))
            .unwrap();
        let kinds: Vec<String> = Overlap::from_batch(&none)
            .unwrap()
            .into_iter()
            .map(|row| row.kind)
            .collect();
        assert!(!kinds.contains(&"question".to_owned()), "{kinds:?}");
    }

    /// A measurement, for `benches/README.md`: `cargo test --release --lib -p ovchat -p ovchat-torch
    /// -p ovchat-pipeline -- --ignored --nocapture a_million`.
    #[test]
    #[ignore = "measures a million images"]
    fn a_million_training_images_beside_a_benchmark() {
        rows! {
            /// An image without its file.
            pub struct Hashed: "hashed" => {
                /// The id.
                pub image_id: String,
                /// The width.
                pub width: i32,
                /// The height.
                pub height: i32,
                /// The hash of the pixels.
                pub pixels: Option<String>,
                /// The perceptual hash.
                pub look: Option<i64>,
            }
        }
        const TRAINING: u64 = 1_000_000;
        const BENCHMARK: u64 = 1_200;
        let mut pipeline = TestPipeline::new();
        let image = |number: u64| {
            let hash = ovchat_data::store::digest(&number.to_le_bytes());
            let look = i64::from_str_radix(&hash[..15], 16).unwrap();
            // Every thousandth training image is a copy of a benchmark image.
            let of = if number < TRAINING && number % 1000 == 0 {
                TRAINING + number / 1000
            } else {
                number
            };
            let pixels = ovchat_data::store::digest(&(of + 7).to_le_bytes());
            Hashed {
                image_id: hash,
                width: 640,
                height: 480,
                pixels: Some(pixels),
                look: Some(look),
            }
        };
        let about = |number: u64| Prompt {
            image_ids: vec![image(number).image_id],
            ..prompt(
                &number.to_string(),
                "Why does the image show what it shows, and not something else?",
            )
        };
        let asked = |numbers: std::ops::Range<u64>| -> Vec<Prompt> { numbers.map(about).collect() };
        pipeline.table("train", &asked(0..TRAINING));
        let bench: Vec<Prompt> = asked(TRAINING..TRAINING + BENCHMARK)
            .into_iter()
            .map(|prompt| Prompt {
                question: format!("Another question, {}?", prompt.prompt_id),
                ..prompt
            })
            .collect();
        pipeline.table("bench", &bench);
        let images: Vec<Hashed> = (0..TRAINING + BENCHMARK).map(image).collect();
        pipeline.table("images", &images);
        drop((bench, images));
        let images = pipeline.files_of("images");
        std::fs::write("/proc/self/clear_refs", "5").unwrap();
        let begun = std::time::Instant::now();
        let stage = find(json!({}));
        let rows = pipeline.compute_with(&stage, images).unwrap();
        let seconds = begun.elapsed().as_secs_f64();
        let peak = memory_kb("VmHWM") / 1024;
        println!(
            "{} overlaps in {seconds:.1} s, at most {peak} MB",
            rows.num_rows()
        );
        assert_eq!(rows.num_rows(), 1000);
    }

    /// Returns a figure of this process's memory, in kB.
    fn memory_kb(name: &str) -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    #[test]
    fn a_distance_beyond_reason_is_refused() {
        let error = find(json!({"distance_max": 40})).output(&[]).unwrap_err();
        assert_eq!(error.field, Some("distance_max"));
    }
}
