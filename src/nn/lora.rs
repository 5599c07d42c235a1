//! LoRA adapters: merged into the weights that they adapt while those are read, or trained.
//!
//! An adapted weight is `W + scale B A` (Hu et al. 2021, equation 3), added in float32 and rounded
//! once, so that nothing of the adapter is left when the network runs. Files as peft writes them
//! (`utils/save_and_load.py`); a tensor that has no place in the network, and a module that the
//! config names and the file lacks, are errors.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::checkpoint::Reader;
use super::layers::{Lora, Source};
use super::optimizer::Parameter;
use super::sampling::uniform;
use super::weights::{Weights, refuse};
use crate::models::ModelError;
use crate::prep::AdapterCard;

/// The base's weights with the adapter added to them.
pub struct Merged {
    pub base: Weights,
    pub adapter: Adapter,
    /// The precision that the sum is rounded to.
    pub kind: Kind,
    pub device: Device,
}

impl Source for Merged {
    fn take(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
        let Some(module) = self.adapter.adapts(name)? else {
            return self.base.take(name, shape, self.kind, self.device);
        };
        let weight = self.base.take(name, shape, Kind::Float, self.device)?;
        let update = self.adapter.update(module, shape, self.device)?;
        Ok((weight + update).to_kind(self.kind))
    }
}

/// The base's weights as they are, with an adapter in training at its target modules.
pub struct Adapted<'a> {
    pub base: Reader<'a>,
    adapter: Start<'a>,
    device: Device,
    parameters: RefCell<Vec<Parameter>>,
}

/// Where an adapter's training begins.
pub enum Start<'a> {
    /// At an adapter that there is.
    At(&'a Adapter),
    /// At a fresh one, which changes nothing yet: A as peft and `nn.Linear` initialize it
    /// (Kaiming's uniform distribution with a = sqrt 5, which is uniform within one over the root of
    /// the inputs), B zero.
    Fresh {
        rank: usize,
        alpha: f64,
        seed: u64,
        target_modules: &'a [&'a str],
    },
}

impl<'a> Adapted<'a> {
    pub fn new(base: Reader<'a>, adapter: Start<'a>, device: Device) -> Self {
        Self {
            base,
            adapter,
            device,
            parameters: RefCell::default(),
        }
    }

    /// The matrices of all adapted modules, by peft's names, in the order of taking.
    pub fn into_parameters(self) -> Vec<Parameter> {
        self.parameters.into_inner()
    }
}

impl Source for Adapted<'_> {
    fn take(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
        self.base.take(name, shape)
    }

    fn adapter(&self, module: &str, inputs: i64, outputs: i64) -> Result<Option<Lora>, ModelError> {
        let (a, b, scale) = match &self.adapter {
            Start::At(adapter) => {
                if adapter.adapts(&format!("{module}.weight"))?.is_none() {
                    return Ok(None);
                }
                let [a, b] = adapter.matrices(module, [outputs, inputs], self.device)?;
                (a, b, adapter.scale)
            }
            Start::Fresh {
                rank,
                alpha,
                seed,
                target_modules,
            } => {
                let is_target = |target: &&str| is_module(module, target);
                if !target_modules.iter().any(is_target) {
                    return Ok(None);
                }
                let bound = (inputs as f64).sqrt().recip();
                let rank = *rank as i64;
                let a = seeded_uniform(*seed, module, &[rank, inputs], bound);
                let b = Tensor::zeros([outputs, rank], (Kind::Float, self.device));
                (a.to_device(self.device), b, alpha / rank as f64)
            }
        };
        let mut parameters = self.parameters.borrow_mut();
        let mut trained = |tensor: Tensor, letter: &str| {
            let tensor = tensor.set_requires_grad(true);
            parameters.push(Parameter {
                name: format!("base_model.model.{module}.lora_{letter}.weight"),
                tensor: tensor.shallow_clone(),
            });
            tensor
        };
        Ok(Some(Lora {
            a: trained(a, "A"),
            b: trained(b, "B"),
            scale,
        }))
    }
}

/// Whether `module` is the linear layer that a config calls `target`.
fn is_module(module: &str, target: &str) -> bool {
    let rest = module.strip_suffix(target);
    rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Numbers uniform within `bound` of 0, in float32, that depend on the seed, the name and the place
/// and on nothing else: libtorch's generator is shared state.
pub fn seeded_uniform(seed: u64, name: &str, shape: &[i64], bound: f64) -> Tensor {
    let digest = Sha256::new()
        .chain_update(seed.to_le_bytes())
        .chain_update(name)
        .finalize();
    let stream = digest[..8].try_into().map(i64::from_le_bytes);
    let stream = stream.expect("eight bytes of a longer digest");
    let count = shape.iter().product::<i64>() as usize;
    let values: Vec<f32> = (0..count)
        .map(|place| ((uniform(stream, place) * 2.0 - 1.0) * bound) as f32)
        .collect();
    Tensor::from_slice(&values).reshape(shape)
}

/// A LoRA adapter: two thin matrices for each adapted module.
pub struct Adapter {
    weights: Weights,
    rank: i64,
    scale: f64,
    target_modules: Vec<String>,
    /// The adapted modules by their names in the base, such as `model.layers.0.self_attn.q_proj`.
    modules: BTreeMap<String, Matrices>,
    /// Those that were merged.
    used: RefCell<BTreeSet<String>>,
}

/// The names of a module's two tensors in the adapter's file.
#[derive(Default)]
struct Matrices {
    lora_a: Option<String>, // [rank, in]
    lora_b: Option<String>, // [out, rank]
}

impl Adapter {
    /// Reads which modules the adapter in the folder of `card` adapts. Fails when a tensor of it is
    /// neither of the two matrices.
    pub fn open(card: &AdapterCard) -> Result<Self, ModelError> {
        let weights = Weights::open(&card.folder)?;
        let mut modules: BTreeMap<String, Matrices> = BTreeMap::new();
        for name in weights.names() {
            let (module, is_a) = lora_matrix(name).ok_or_else(|| {
                let problem = format!("`{name}` is neither a `lora_A` nor a `lora_B` matrix");
                refuse(weights.path(), problem)
            })?;
            let matrices = modules.entry(module.to_owned()).or_default();
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
            rank: card.r as i64,
            scale: card.scale(),
            target_modules: card.target_modules.clone(),
            modules,
            used: RefCell::default(),
            weights,
        })
    }

    /// The module that the weight `name` belongs to, if it is adapted. Fails when it should be by
    /// the config and is not.
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

    /// The element type that the adapter is stored in.
    pub fn kind(&self) -> Option<Kind> {
        let name = self.weights.names().next()?;
        self.weights.kind(name)
    }

    /// Fails when a module of the adapter had no place in the network.
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

/// Splits the name of a tensor in an adapter's file into the module that it adapts and whether it
/// is `lora_A` (else `lora_B`). peft writes `base_model.model.<module>.lora_A.weight`, and with the
/// adapter's own name, such as `lora_default` or `default`, before `weight` while it trains.
fn lora_matrix(name: &str) -> Option<(&str, bool)> {
    let name = name.strip_prefix("base_model.model.").unwrap_or(name);
    let (module, rest) = name.split_once(".lora_")?;
    let (letter, rest) = rest.split_once('.')?;
    let is_weight = rest == "weight"
        || rest
            .strip_suffix(".weight")
            .is_some_and(|own_name| !own_name.contains('.'));
    match letter {
        "A" if is_weight => Some((module, true)),
        "B" if is_weight => Some((module, false)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::weights::save_safetensors;
    use super::*;

    #[test]
    fn peft_names_are_split_with_and_without_the_name_of_the_adapter() {
        let module = "model.layers.0.mlp.up_proj";
        for name in [
            "lora_A.weight",
            "lora_A.default.weight",
            "lora_A.lora_default.weight",
        ] {
            let name = format!("base_model.model.{module}.{name}");
            assert_eq!(lora_matrix(&name), Some((module, true)), "{name}");
        }
        let b = format!("{module}.lora_B.weight");
        assert_eq!(lora_matrix(&b), Some((module, false)));
        for name in ["lora_A.bias", "lora_C.weight", "lora_embedding_A", "weight"] {
            assert_eq!(lora_matrix(&format!("{module}.{name}")), None, "{name}");
        }
    }

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
        // 1 + 2^-8 is a tie in bfloat16; the update, too small to be seen alone, breaks it.
        let weight = Tensor::from_slice2(&[[1.0_f32, 1.0 + 1.0 / 256.0]]);
        let a = Tensor::from_slice2(&[[0.0_f32, 1e-5]]);
        let b = Tensor::from_slice2(&[[1.0_f32]]);
        save(&at("model.safetensors"), &[("q_proj.weight", weight)]);
        save(
            &at("adapter/adapter_model.safetensors"),
            &[("q_proj.lora_A.weight", a), ("q_proj.lora_B.weight", b)],
        );
        let card = AdapterCard {
            folder: at("adapter"),
            r: 1,
            lora_alpha: 0.25,
            use_rslora: false,
            target_modules: vec!["q_proj".to_owned()],
        };
        let merged = Merged {
            base: Weights::open(folder.path()).unwrap(),
            adapter: Adapter::open(&card).unwrap(),
            kind: Kind::BFloat16,
            device: Device::Cpu,
        };
        assert!(merged.adapter.all_used().is_err());
        let weight = merged.take("q_proj.weight", &[1, 2]).unwrap();
        assert_eq!(weight.kind(), Kind::BFloat16);
        let expected = Tensor::from_slice2(&[[1.0_f32, 1.0 + 1.0 / 128.0]]);
        assert_eq!(weight.to_kind(Kind::Float), expected);
        merged.adapter.all_used().unwrap();
    }
}
