//! Shared by the tests: the parts of a policy, the outputs of transformers for the recorded prompts,
//! and comparisons with them.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use crate::recorded::onevision;
use ovchat_models::preprocess::Processor;
use ovchat_torch::checkpoint::{Checkpoint, Purpose};
use ovchat_torch::networks;
use ovchat_torch::optimizer::{Moment, Moments};
use ovchat_torch::training::TrainingState;
use ovchat_torch::vlm::VisionLanguageModel;
use ovchat_torch::weights::Weights;

/// Opens the processor and the network of a checkpoint.
pub fn open(folder: &Path, kind: Kind) -> (Processor, Box<dyn VisionLanguageModel>) {
    let prep = Processor::open(folder).unwrap_or_else(|error| panic!("{error}"));
    let checkpoint = Checkpoint::open(folder).unwrap_or_else(|error| panic!("{error}"));
    let purpose = Purpose::Inference;
    let opened = networks::open(prep.architecture(), &checkpoint, Device::Cpu, kind, purpose);
    let (network, _) = opened.unwrap_or_else(|error| panic!("{error}"));
    (prep, network)
}

/// The outputs of transformers.
pub struct Expected(Weights);

impl Expected {
    pub fn open() -> Self {
        let path = onevision::folder().join("expected.safetensors");
        Self(Weights::open_file(&path).unwrap())
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

/// The gradients of the first update, parameter by parameter: AdamW's mean is then a tenth of them.
pub fn first_gradients(training: &TrainingState) -> Vec<Tensor> {
    let gradient = |moments: &Moments| match &moments.exp_avg {
        Moment::Whole(mean) => mean / 0.1,
        Moment::InBytes(_) => panic!("the moments are quantized"),
    };
    training.moments().iter().map(gradient).collect()
}
