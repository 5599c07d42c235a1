//! Parity tests of the networks' outputs against the reference programs (`tests/parity/record.py`):
//! pixels, token ids, hidden states, logits, rewards, gradients, weights.
//!
//! A block is a folder of the recording, and a module and a test here. `cargo test` compares with
//! the committed recording. `make parity` records again with other seeds, sets `OVCHAT_PARITY` to
//! that folder and `OVCHAT_PARITY_REPORT` to one where each test writes its lines, from which
//! `benches/PARITY.md` is generated. Blocks that such a recording lacks are skipped.

mod interleaved;
mod networks;
mod packing;
mod pixels;
mod rewards;
mod sampling;
mod text;
mod training;
mod videos;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use ovchat_models::preprocess::Processor;
use ovchat_models::{
    ChatPrompt, ChatRole, ChatTurn, DeviceSpec, Dtype, Mask, VisionLanguageSpec, Visual,
};
use ovchat_torch::checkpoint::{Checkpoint, Purpose};
use ovchat_torch::networks as list;
use ovchat_torch::optimizer::Parameter;
use ovchat_torch::vlm::VisionLanguageModel;
use ovchat_torch::weights::Weights;

/// An architecture of policies, and its part of a recording.
struct Architecture {
    /// The folder of the checkpoints, and of the outputs of their networks.
    checkpoints: &'static str,
    /// The folder of the trainings.
    trainings: &'static str,
    /// The checkpoints with which a batch of DPO is recorded.
    batches: &'static [&'static str],
    /// The convention for counted tokens in TRL's updates.
    trl: Mask,
    /// The start of the cases' titles.
    title: &'static str,
}

const LLAVA_ONEVISION: Architecture = Architecture {
    checkpoints: "onevision",
    trainings: "training",
    batches: &["untied", "tied"],
    trl: Mask::Trl,
    title: "",
};

const LLAVA: Architecture = Architecture {
    checkpoints: "llava",
    trainings: "llava/training",
    batches: &["files-of-transformers-4"],
    // The recorded chat template ends an answer with `</s>` and nothing else.
    trl: Mask::Answer,
    title: "LLaVA-1.5, ",
};

/// One comparison.
#[derive(Debug)]
struct Line {
    case: String,
    /// The largest absolute difference.
    absolute: f64,
    /// The largest difference, relative to the largest expected value.
    relative: f64,
    bound: String,
    holds: bool,
}

/// The comparisons of a block.
#[derive(Debug)]
struct Report {
    block: &'static str,
    lines: Vec<Line>,
}

/// Compares the block `name`, recorded in the folder `place`.
fn compare(name: &'static str, place: &str, block: impl FnOnce(&Path, &mut Report)) {
    let fresh = env::var_os("OVCHAT_PARITY").map(PathBuf::from);
    let committed =
        || Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("tests/parity/recorded");
    let is_fresh = fresh.is_some();
    let folder = fresh.unwrap_or_else(committed).join(place);
    if is_fresh && !folder.exists() {
        return;
    }
    let mut report = Report {
        block: name,
        lines: Vec::new(),
    };
    block(&folder, &mut report);
    report.end();
}

impl Report {
    /// Compares all elements of two tensors, which may differ by `bound`.
    fn tensor(&mut self, case: impl Into<String>, found: &Tensor, expected: &Tensor, bound: f64) {
        let case = case.into();
        let apart = differences(found, expected);
        let allowed = match bound {
            0.0 => "equal".to_owned(),
            _ => format!("{bound:.0e}"),
        };
        self.line(case, apart, allowed, apart[0] <= bound);
    }

    /// Records how many of `all` items differ; none may.
    fn equal(&mut self, case: impl Into<String>, different: usize, all: usize) {
        assert!(all > 0, "{}: nothing was compared", self.block);
        let different = different as f64;
        let bound = format!("equal, {all} compared");
        self.line(
            case,
            [different, different / all as f64],
            bound,
            different == 0.0,
        );
    }

    /// Records a comparison made elsewhere, with the differences `[absolute, relative]`.
    fn line(
        &mut self,
        case: impl Into<String>,
        [absolute, relative]: [f64; 2],
        bound: impl Into<String>,
        holds: bool,
    ) {
        self.lines.push(Line {
            case: case.into(),
            absolute,
            relative,
            bound: bound.into(),
            // A NaN difference never passes.
            holds: holds && absolute.is_finite(),
        });
    }

    /// Writes the lines to the report folder, if there is one, and fails if a comparison does not
    /// hold.
    fn end(self) {
        assert!(
            !self.lines.is_empty(),
            "{}: nothing was compared",
            self.block
        );
        if let Some(folder) = env::var_os("OVCHAT_PARITY_REPORT") {
            let lines = self.lines.iter().map(|line| {
                json!({
                    "block": self.block, "case": line.case, "absolute": line.absolute,
                    "relative": line.relative, "bound": line.bound, "holds": line.holds,
                })
            });
            let lines: Vec<_> = lines.collect();
            let path = Path::new(&folder).join(format!("{}.json", self.block));
            fs::write(path, json!(lines).to_string()).unwrap();
        }
        let failed: Vec<_> = self.lines.iter().filter(|line| !line.holds).collect();
        assert!(failed.is_empty(), "{}: {failed:#?}", self.block);
    }
}

/// The largest difference of two tensors: absolute, and relative to the largest expected value;
/// infinite if their shapes differ.
fn differences(found: &Tensor, expected: &Tensor) -> [f64; 2] {
    if found.size() != expected.size() {
        return [f64::INFINITY; 2];
    }
    let [found, expected] = [found, expected].map(|tensor| tensor.to_kind(Kind::Double));
    let absolute = greatest(&(found - &expected));
    [
        absolute,
        absolute / greatest(&expected).max(f64::MIN_POSITIVE),
    ]
}

/// The largest absolute value, or NaN if there is one.
fn greatest(tensor: &Tensor) -> f64 {
    if tensor.numel() == 0 {
        return 0.0;
    }
    tensor.abs().max().double_value(&[])
}

/// Reads JSON of the recording.
fn json<T: DeserializeOwned>(path: &Path) -> T {
    let text = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Tensors of the recording.
struct Recorded(Weights);

impl Recorded {
    fn open(path: &Path) -> Self {
        Self(Weights::open_file(path).unwrap_or_else(|error| panic!("{error}")))
    }

    fn tensor(&self, name: &str) -> Tensor {
        self.0
            .read(name, Device::Cpu)
            .unwrap_or_else(|error| panic!("{error}"))
    }

    fn integers(&self, name: &str) -> Vec<i64> {
        Vec::try_from(self.tensor(name)).expect("one dimension of integers")
    }

    fn number(&self, name: &str) -> f64 {
        self.tensor(name).double_value(&[])
    }

    fn numbers(&self, name: &str) -> Vec<f64> {
        let numbers = self.tensor(name).to_kind(Kind::Double);
        Vec::try_from(numbers).expect("one dimension")
    }
}

/// Opens the processor and the network of a checkpoint; returns the parameters that are trained,
/// too.
fn open_network(
    folder: &Path,
    kind: Kind,
    purpose: Purpose,
) -> (Processor, Box<dyn VisionLanguageModel>, Vec<Parameter>) {
    let processor = Processor::open(folder).unwrap_or_else(|error| panic!("{error}"));
    let checkpoint = Checkpoint::open(folder).unwrap_or_else(|error| panic!("{error}"));
    let architecture = processor.architecture();
    let opened = list::open(architecture, &checkpoint, Device::Cpu, kind, purpose);
    let (network, parameters) = opened.unwrap_or_else(|error| panic!("{error}"));
    (processor, network, parameters)
}

/// The spec of a checkpoint, in float32.
fn spec(weights: PathBuf) -> VisionLanguageSpec {
    VisionLanguageSpec {
        weights,
        adapter: None,
        device: DeviceSpec::Cpu,
        dtype: Dtype::Float32,
        memory_gb: None,
    }
}

/// An image file of the recording.
fn image_file(path: &Path) -> Visual {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    Visual::new(path.display().to_string(), bytes.into())
}

/// A prompt of the recording; its turns are pairs of role and text.
fn prompt(question: &str, turns: &[[String; 2]], images: Vec<Visual>) -> ChatPrompt {
    let turn = |[role, text]: &[String; 2]| ChatTurn {
        role: if role == "user" {
            ChatRole::User
        } else {
            ChatRole::Assistant
        },
        text: text.clone(),
    };
    ChatPrompt {
        places: Vec::new(),
        id: question.to_owned(),
        images,
        system: None,
        turns: turns.iter().map(turn).collect(),
        question: question.to_owned(),
        captions: None,
        answer: None,
        seed: 0,
    }
}
