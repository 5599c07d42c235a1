//! LoRA adapters: merged into weights during loading, or trained.
//!
//! An adapted weight is `W + scale B A` (Hu et al. 2021, equation 3), added in float32 and rounded
//! once, so that running the network involves no adapter. Files are in peft's format
//! (`utils/save_and_load.py`); a tensor that does not belong to the network, and a module that the
//! config names but the file lacks, are errors.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::Path;
use std::rc::Rc;

use serde_json::json;
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::checkpoint::{Checkpoint, Purpose, Reader};
use super::error::refuse;
use super::layers::{Dropout, Lora, WeightSource};
use super::optimizer::Parameter;
use super::sampling::uniform;
use super::weights::{Weights, save_safetensors};
use ovchat_models::ModelError;
use ovchat_models::checkpoint::{AdapterConfig, canonical, is_module, lora_matrix};

/// The naming scheme of modules in an adapter's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Names {
    /// The names in the network.
    Same,
    /// The names of transformers' vision-language models in memory, where the decoder is
    /// `model.language_model`.
    Transformers,
}

/// The prefix of a vision-language model's decoder in the network.
const DECODER: &str = "language_model.model.";

impl Names {
    /// Converts a module's name in a file to its name in the network.
    fn in_network(self, module: &str) -> String {
        match self {
            Self::Same => module.to_owned(),
            Self::Transformers => canonical(module),
        }
    }

    /// Converts a module's name in the network to its name in a file.
    fn in_file(self, module: &str) -> String {
        match module.strip_prefix(DECODER) {
            Some(rest) if self == Self::Transformers => format!("model.language_model.{rest}"),
            _ => module.to_owned(),
        }
    }

    /// True if a new adapter may target the module: the towers' layers have the same names as the
    /// decoder's.
    fn may_adapt(self, module: &str) -> bool {
        self == Self::Same || module.starts_with(DECODER)
    }

    /// `target_modules` in the form that peft reads.
    fn targets(self, modules: &[&str]) -> serde_json::Value {
        match self {
            Self::Same => json!(modules),
            Self::Transformers => {
                let modules = modules.join("|").replace('.', "\\.");
                json!(format!("model\\.language_model\\.(.*\\.)?({modules})"))
            }
        }
    }
}

/// The base's weights with the adapter merged into them.
pub struct Merged<'a> {
    pub base: Reader<'a>,
    pub adapter: &'a Adapter,
}

impl WeightSource for Merged<'_> {
    fn take(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
        let Some(module) = self.adapter.adapts(name)? else {
            return self.base.take(name, shape);
        };
        let weight = self.base.take_as(name, shape, Kind::Float)?;
        let update = self.adapter.update(module, shape, weight.device())?;
        Ok((weight + update).to_kind(self.base.kind()))
    }

    fn packs(&self) -> bool {
        self.base.packs()
    }
}

/// The base's weights unchanged, with an adapter in training at its target modules.
pub struct Adapted<'a> {
    pub base: Reader<'a>,
    adapter: Start<'a>,
    names: Names,
    dropout: Option<Rc<Dropout>>,
    parameters: RefCell<Vec<Parameter>>,
}

/// The initial state of an adapter's training.
pub enum Start<'a> {
    /// An existing adapter.
    At(&'a Adapter),
    /// A new adapter, which changes nothing yet: A is initialized as by peft and `nn.Linear`
    /// (Kaiming uniform with a = sqrt 5, which is uniform within 1 / sqrt(inputs)), B is zero.
    Fresh {
        rank: usize,
        alpha: f64,
        seed: u64,
        target_modules: &'a [&'a str],
    },
}

impl<'a> Adapted<'a> {
    /// Module names of a new adapter's file follow `names`; `dropout` applies to the inputs of all
    /// modules.
    pub fn new(
        base: Reader<'a>,
        adapter: Start<'a>,
        names: Names,
        dropout: Option<Rc<Dropout>>,
    ) -> Self {
        Self {
            base,
            adapter,
            names,
            dropout,
            parameters: RefCell::default(),
        }
    }

    /// The matrices of all adapted modules, by peft's names, in the order of taking.
    pub fn into_parameters(self) -> Vec<Parameter> {
        self.parameters.into_inner()
    }
}

impl WeightSource for Adapted<'_> {
    fn take(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
        self.base.take(name, shape)
    }

    fn adapter(&self, module: &str, inputs: i64, outputs: i64) -> Result<Option<Lora>, ModelError> {
        let device = self.base.device();
        let (a, b, scale) = match &self.adapter {
            Start::At(adapter) => {
                if adapter.adapts(&format!("{module}.weight"))?.is_none() {
                    return Ok(None);
                }
                let [a, b] = adapter.matrices(module, [outputs, inputs], device)?;
                (a, b, adapter.scale)
            }
            Start::Fresh {
                rank,
                alpha,
                seed,
                target_modules,
            } => {
                let is_target = |target: &&str| is_module(module, target);
                if !self.names.may_adapt(module) || !target_modules.iter().any(is_target) {
                    return Ok(None);
                }
                let bound = (inputs as f64).sqrt().recip();
                let rank = *rank as i64;
                let a = seeded_uniform(*seed, module, &[rank, inputs], bound);
                let b = Tensor::zeros([outputs, rank], (Kind::Float, device));
                (a.to_device(device), b, alpha / rank as f64)
            }
        };
        let mut parameters = self.parameters.borrow_mut();
        let in_file = self.names.in_file(module);
        let mut trained = |tensor: Tensor, letter: &str| {
            let tensor = tensor.set_requires_grad(true);
            parameters.push(Parameter {
                name: format!("base_model.model.{in_file}.lora_{letter}.weight"),
                tensor: tensor.shallow_clone(),
            });
            tensor
        };
        Ok(Some(Lora {
            a: trained(a, "A"),
            b: trained(b, "B"),
            scale,
            dropout: self.dropout.clone().map(|all| (all, stream(module))),
        }))
    }
}

/// Uniform numbers within `bound` of 0, in float32, that depend only on the seed, the name and the
/// position: libtorch's generator is shared state.
pub fn seeded_uniform(seed: u64, name: &str, shape: &[i64], bound: f64) -> Tensor {
    let stream = digest(&[&seed.to_le_bytes(), name.as_bytes()]);
    let count = shape.iter().product::<i64>() as usize;
    let values: Vec<f32> = (0..count)
        .map(|place| ((uniform(stream, place) * 2.0 - 1.0) * bound) as f32)
        .collect();
    Tensor::from_slice(&values).reshape(shape)
}

/// The random stream of a module.
fn stream(module: &str) -> i64 {
    digest(&[module.as_bytes()])
}

fn digest(parts: &[&[u8]]) -> i64 {
    let hash = parts.iter().fold(Sha256::new(), Digest::chain_update);
    let hash = hash.finalize();
    let start = hash[..8].try_into().map(i64::from_le_bytes);
    start.expect("eight bytes of a longer digest")
}

/// The weights of a policy's `checkpoint` that the adapter in the folder `adapter` changes, with
/// the adapter merged into them.
pub fn merged(checkpoint: &Checkpoint, adapter: &Path) -> Result<Vec<Parameter>, ModelError> {
    let adapter = Adapter::open(&AdapterConfig::open(adapter)?, Names::Transformers)?;
    let base = Reader::new(checkpoint, Device::Cpu, Kind::Float, Purpose::Inference);
    let merged = Merged {
        base,
        adapter: &adapter,
    };
    let mut parameters = Vec::new();
    for module in adapter.modules.keys() {
        let name = format!("{module}.weight");
        let shape = checkpoint.shape(&name)?;
        parameters.push(Parameter {
            tensor: merged.take(&name, &shape)?,
            name,
        });
    }
    Ok(parameters)
}

/// The settings in an adapter's config.
#[derive(Debug, Clone, PartialEq)]
pub struct SavedAdapterConfig<'a> {
    /// The folder of the base weights.
    pub base: &'a Path,
    pub rank: usize,
    pub alpha: f64,
    pub dropout: f64,
    /// Names of linear layers, such as `q_proj`.
    pub targets: Vec<&'a str>,
}

/// Writes an adapter in peft's format, `adapter_config.json` and `adapter_model.safetensors`, to
/// the existing folder `to`.
pub fn save_adapter(
    to: &Path,
    config: &SavedAdapterConfig<'_>,
    names: Names,
    parameters: &[Parameter],
    kind: Kind,
) -> Result<(), ModelError> {
    let path = to.join("adapter_config.json");
    let io = |error: std::io::Error| refuse(&path, error.to_string());
    let settings = json!({
        "base_model_name_or_path": config.base,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_to_transform": null,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": config.rank,
        "target_modules": names.targets(&config.targets),
        "task_type": "CAUSAL_LM",
    });
    let text = serde_json::to_string_pretty(&settings).expect("plain data");
    fs::write(&path, text).map_err(io)?;
    let tensors: Vec<(String, Tensor)> = parameters
        .iter()
        .map(|Parameter { name, tensor }| {
            let tensor = tensor.detach().to_device(Device::Cpu).to_kind(kind);
            (name.clone(), tensor)
        })
        .collect();
    let model = to.join("adapter_model.safetensors");
    save_safetensors(&model, &tensors, &[("format", "pt")])?;
    for written in [&path, to] {
        File::open(written)
            .and_then(|file| file.sync_all())
            .map_err(io)?;
    }
    Ok(())
}

/// A LoRA adapter: two low-rank matrices for each adapted module.
pub struct Adapter {
    weights: Weights,
    rank: i64,
    scale: f64,
    target_modules: Vec<String>,
    /// The adapted modules by their names in the base, such as `model.layers.0.self_attn.q_proj`.
    modules: BTreeMap<String, Matrices>,
    /// The modules that were taken.
    used: RefCell<BTreeSet<String>>,
}

/// The names of a module's two tensors in the adapter's file.
#[derive(Default)]
struct Matrices {
    lora_a: Option<String>, // [rank, in]
    lora_b: Option<String>, // [out, rank]
}

impl Adapter {
    /// Reads the tensor names of the adapter in the folder of `model_config`, which follow `names`.
    /// Fails if a tensor is neither of the two matrices.
    pub fn open(model_config: &AdapterConfig, names: Names) -> Result<Self, ModelError> {
        let weights = Weights::open(&model_config.folder)?;
        let mut modules: BTreeMap<String, Matrices> = BTreeMap::new();
        for name in weights.names() {
            let (module, is_a) = lora_matrix(name).ok_or_else(|| {
                let problem = format!("`{name}` is neither a `lora_A` nor a `lora_B` matrix");
                refuse(weights.path(), problem)
            })?;
            let matrices = modules.entry(names.in_network(module)).or_default();
            let place = if is_a {
                &mut matrices.lora_a
            } else {
                &mut matrices.lora_b
            };
            if let Some(other) = place.replace(name.to_owned()) {
                let problem = format!("`{other}` and `{name}` adapt the same module");
                return Err(refuse(weights.path(), problem));
            }
        }
        Ok(Self {
            rank: model_config.r as i64,
            scale: model_config.scale(),
            target_modules: model_config.target_modules.clone(),
            modules,
            used: RefCell::default(),
            weights,
        })
    }

    /// The module of the weight `name`, if it is adapted. Fails if the config targets the module
    /// but the file does not contain it.
    fn adapts<'n>(&self, name: &'n str) -> Result<Option<&'n str>, ModelError> {
        let Some(module) = name.strip_suffix(".weight") else {
            return Ok(None);
        };
        let is_target = |target: &String| is_module(module, target);
        if self.modules.contains_key(module) {
            Ok(Some(module))
        } else if self.target_modules.iter().any(is_target) {
            let problem = format!(
                "`{module}` has no `lora_A` and `lora_B`, though adapter_config.json names it \
                 among its target_modules"
            );
            Err(refuse(self.weights.path(), problem))
        } else {
            Ok(None)
        }
    }

    /// `scale B A` of a module whose weight has this shape, in float32.
    fn update(&self, module: &str, shape: &[i64], device: Device) -> Result<Tensor, ModelError> {
        let &[outputs, inputs] = shape else {
            let problem = format!("`{module}` is not a linear layer");
            return Err(refuse(self.weights.path(), problem));
        };
        let [a, b] = self.matrices(module, [outputs, inputs], device)?;
        Ok(b.matmul(&a) * self.scale)
    }

    /// A (`[rank, in]`) and B (`[out, rank]`) of a module, in float32.
    fn matrices(
        &self,
        module: &str,
        [outputs, inputs]: [i64; 2],
        device: Device,
    ) -> Result<[Tensor; 2], ModelError> {
        let matrices = &self.modules[module];
        let (Some(a), Some(b)) = (&matrices.lora_a, &matrices.lora_b) else {
            let missing = matrices.lora_a.as_ref().map_or("lora_A", |_| "lora_B");
            let problem = format!("`{module}` has no `{missing}`");
            return Err(refuse(self.weights.path(), problem));
        };
        let take = |name, shape: [i64; 2]| self.weights.take(name, &shape, Kind::Float, device);
        let a = take(a, [self.rank, inputs])?;
        let b = take(b, [outputs, self.rank])?;
        self.used.borrow_mut().insert(module.to_owned());
        Ok([a, b])
    }

    /// The dtype of the stored adapter.
    pub fn kind(&self) -> Option<Kind> {
        let name = self.weights.names().next()?;
        self.weights.kind(name)
    }

    /// Fails if a module of the adapter does not exist in the network.
    pub fn all_used(&self) -> Result<(), ModelError> {
        let used = self.used.borrow();
        match self.modules.keys().find(|module| !used.contains(*module)) {
            None => Ok(()),
            Some(module) => {
                let problem = format!("adapts `{module}`, which the base does not have");
                Err(refuse(self.weights.path(), problem))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_update_is_added_in_float32_and_rounded_once() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("adapter")).unwrap();
        let save = |path: &std::path::Path, tensors: &[(&str, Tensor)]| {
            let named: Vec<_> = tensors
                .iter()
                .map(|(name, tensor)| ((*name).to_owned(), tensor.shallow_clone()))
                .collect();
            save_safetensors(path, &named, &[]).unwrap();
        };
        // 1 + 2^-8 is a tie in bfloat16; the update, too small to have an effect alone, breaks it.
        let weight = Tensor::from_slice2(&[[1.0_f32, 1.0 + 1.0 / 256.0]]);
        let a = Tensor::from_slice2(&[[0.0_f32, 1e-5]]);
        let b = Tensor::from_slice2(&[[1.0_f32]]);
        save(&at("model.safetensors"), &[("q_proj.weight", weight)]);
        save(
            &at("adapter/adapter_model.safetensors"),
            &[("q_proj.lora_A.weight", a), ("q_proj.lora_B.weight", b)],
        );
        let model_config = AdapterConfig {
            folder: at("adapter"),
            r: 1,
            lora_alpha: 0.25,
            use_rslora: false,
            target_modules: vec!["q_proj".to_owned()],
        };
        let base = Checkpoint::open_base(folder.path()).unwrap();
        let kind = Kind::BFloat16;
        let merged = Merged {
            base: Reader::new(&base, Device::Cpu, kind, Purpose::Inference),
            adapter: &Adapter::open(&model_config, Names::Same).unwrap(),
        };
        assert!(merged.adapter.all_used().is_err());
        let weight = merged.take("q_proj.weight", &[1, 2]).unwrap();
        assert_eq!(weight.kind(), Kind::BFloat16);
        let expected = Tensor::from_slice2(&[[1.0_f32, 1.0 + 1.0 / 128.0]]);
        assert_eq!(weight.to_kind(Kind::Float), expected);
        merged.adapter.all_used().unwrap();
    }
}
