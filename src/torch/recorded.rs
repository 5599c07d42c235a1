//! The tiny LLaVA-OneVision of `tests/parity/onevision`, and its outputs in transformers
//! (`tests/parity/record_onevision.py`), for the tests of this crate.

use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use super::weights::Weights;
use ovchat_models::{ChatPrompt, DeviceSpec, Dtype, EncodedImage, LlavaOnevisionSpec};

/// The checkpoint's folder.
pub fn folder() -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("tests/parity/onevision")
}

pub fn spec(dtype: Dtype) -> LlavaOnevisionSpec {
    LlavaOnevisionSpec {
        weights: folder(),
        adapter: None,
        device: DeviceSpec::Cpu,
        dtype,
        memory_gb: None,
    }
}

/// The recorded prompts: with a large image, a small one, two, and none.
pub fn prompts() -> Vec<ChatPrompt> {
    let texts: [(&[&str], &str); 4] = [
        (&["large.png"], "What is this?"),
        (&["small.png"], "Why?"),
        (&["large.png", "wide.png"], "Which is wider?"),
        (&[], "Say something."),
    ];
    let prompts = texts
        .iter()
        .enumerate()
        .map(|(index, (names, question))| ChatPrompt {
            id: format!("prompt {index}"),
            images: names.iter().map(|name| image(name)).collect(),
            system: None,
            turns: Vec::new(),
            question: (*question).to_owned(),
            captions: None,
            answer: None,
            seed: 40 + index as u64,
        });
    prompts.collect()
}

fn image(name: &str) -> EncodedImage {
    EncodedImage {
        id: name.to_owned(),
        bytes: std::fs::read(folder().join(name)).unwrap().into(),
    }
}

/// The outputs of transformers.
pub struct Expected(Weights);

impl Expected {
    pub fn open() -> Self {
        Self(Weights::open_file(&folder().join("expected.safetensors")).unwrap())
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.names()
    }

    pub fn tensor(&self, name: &str) -> Tensor {
        self.0.read(name, Device::Cpu).unwrap()
    }

    pub fn integers(&self, name: &str) -> Vec<i64> {
        Vec::try_from(self.tensor(name)).unwrap()
    }

    pub fn numbers(&self, name: &str) -> Vec<f32> {
        Vec::try_from(self.tensor(name)).unwrap()
    }
}

/// Asserts that all elements differ by at most `tolerance`.
pub fn assert_close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!(found.size(), expected.size(), "{what}");
    let apart = (found.to_kind(Kind::Double) - expected.to_kind(Kind::Double)).abs();
    let apart = apart.max().double_value(&[]);
    assert!(apart <= tolerance, "{what}: {apart} apart");
}
