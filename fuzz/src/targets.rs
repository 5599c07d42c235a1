//! The fuzz targets: each takes any bytes, and must neither panic nor hang.

use std::fs;
use std::io::{Cursor, Write as _};
use std::path::Path;
use std::sync::LazyLock;

use zip::write::{SimpleFileOptions, ZipWriter};

use super::tested;
use super::tested::models::architectures;
use super::tested::models::checkpoint::{Shards, elements};
use super::tested::models::preprocess::{ImageProcessorConfig, PlainTokenizer};
use super::tested::models::{JudgePrompt, JudgePromptSettings, Mode, Verdict};

/// A target by its name, which is that of its corpus.
pub const TARGETS: [(&str, fn(&[u8])); 9] = [
    ("card", config),
    ("label", label),
    ("parquet", parquet),
    ("pickle", pickle),
    ("record", record),
    ("reply", reply),
    ("safetensors", safetensors),
    ("tokenizer", tokenizer),
    ("yaml", yaml),
];

/// The requests that are made of an input.
const LINES_MAX: usize = 64;

/// A pipeline file.
pub fn yaml(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        tested::yaml(text);
    }
}

/// A file of prompts, read in every format.
pub fn record(bytes: &[u8]) {
    for ending in tested::endings() {
        let name = format!("prompts.{ending}");
        in_file(&name, bytes, |folder| tested::records(&folder.join(&name)));
    }
}

/// A Parquet file of prompts.
pub fn parquet(bytes: &[u8]) {
    in_file("prompts.parquet", bytes, |folder| {
        tested::records(&folder.join("prompts.parquet"));
    });
}

/// Requests to the page on which people label: a line each, of the method, the address and the body.
pub fn label(bytes: &[u8]) {
    let requests = bytes.split(|byte| *byte == b'\n').take(LINES_MAX);
    let requests: Vec<[&[u8]; 3]> = requests
        .map(|line| {
            let mut words = line.splitn(3, |byte| *byte == b' ');
            [(); 3].map(|()| words.next().unwrap_or_default())
        })
        .collect();
    tested::label(&requests);
}

/// Does something with bytes as a file of this name.
fn in_file(name: &str, bytes: &[u8], work: impl FnOnce(&Path)) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::write(folder.path().join(name), bytes).expect("a temporary file");
    work(folder.path());
}

/// The header of a safetensors file, and whatever else begins as one.
pub fn safetensors(bytes: &[u8]) {
    in_file("model.safetensors", bytes, |folder| {
        if let Ok(shards) = Shards::open(folder) {
            assert!(shards.names().all(|name| shards.place(name).is_some()));
        }
    });
}

/// The pickle in a file of `torch.save`, beside a storage.
pub fn pickle(bytes: &[u8]) {
    let mut file = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, content) in [("a/data.pkl", bytes), ("a/data/0", &[0; 64])] {
        file.start_file(name, options).expect("a file in memory");
        file.write_all(content).expect("a file in memory");
    }
    let file = file.finish().expect("a file in memory").into_inner();
    in_file("pytorch_model.bin", &file, |folder| {
        let _ = Shards::open(folder);
    });
}

/// A tokenizer: `tokenizer.json` if it begins as JSON does, else SentencePiece's.
pub fn tokenizer(bytes: &[u8]) {
    let is_json = bytes.trim_ascii_start().first() == Some(&b'{');
    let name = if is_json {
        "tokenizer.json"
    } else {
        "tokenizer.model"
    };
    in_file(name, bytes, |folder| {
        if let Ok(tokenizer) = PlainTokenizer::open(folder) {
            let mut ids = Vec::new();
            let _ = tokenizer.append("Why is it \u{e4}\n\n<image>?", &mut ids);
            tokenizer.decode(&ids);
        }
    });
}

/// `config.json` of a policy, or its image processor's settings.
pub fn config(bytes: &[u8]) {
    in_file("config.json", bytes, |folder| {
        if let Ok(architecture) = architectures::open(folder) {
            assert!(elements(&*architecture) > 0);
            assert!(architecture.largest_image()[0] > 0);
        }
        fs::rename(
            folder.join("config.json"),
            folder.join("preprocessor_config.json"),
        )
        .expect("a temporary file");
        let _ = ImageProcessorConfig::open_onevision(folder, 384);
        let _ = ImageProcessorConfig::open_clip(folder, 336);
    });
}

/// The ways in which replies are read: one number, two, or a word.
static QUESTIONNAIRES: LazyLock<[JudgePrompt; 3]> = LazyLock::new(|| {
    let words = r"(?i)(?<better_first>first)|(?<better_second>second)|(?<tie>equal)";
    let verdict = Verdict::try_from(words.to_owned()).expect("a verdict");
    let prompt_settings = |mode, verdict| JudgePromptSettings {
        mode,
        verdict,
        ..JudgePromptSettings::default()
    };
    let askings = [
        prompt_settings(Mode::Pointwise, None),
        prompt_settings(Mode::Pairwise, None),
        prompt_settings(Mode::Pairwise, Some(verdict)),
    ];
    askings.map(|prompt_settings| {
        JudgePrompt::open(&prompt_settings).expect("the default has a template")
    })
});

/// A reply of a judge.
pub fn reply(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        for judge_prompt in &*QUESTIONNAIRES {
            if let Some(found) = judge_prompt.read(text) {
                let scores = found.scores.iter().flatten();
                assert!(scores.chain([&found.value]).all(|score| score.is_finite()));
            }
        }
    }
}
