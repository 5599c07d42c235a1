//! Names and shapes of the tensors of LLaVA-RLHF's reward model and of LoRA adapters.
//!
//! Llama and the projector are named as in LLaVA, CLIP as in transformers, adapters as in peft
//! (`utils/save_and_load.py`). Only the headers of files are read.

use std::collections::BTreeMap;

use crate::LlavaRlhfSpec;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::{AdapterConfig, LlavaRlhfConfig};
use crate::checkpoint::names::{Tensors, clip, decoder, has_shape};
use crate::checkpoint::shards::Shards;

/// The file of the reward head, next to the adapter.
pub const HEAD_FILE: &str = "reward_head";

/// A tensor of bases whose projector is that of LLaVA 1.5, with two layers.
pub const TWO_LAYERS: &str = "model.mm_projector.0.weight";

/// The prefixes of CLIP's tensor names: as written by transformers up to 4.x, or by 5.x.
const TOWERS: [&str; 2] = ["vision_model.", ""];

impl LlavaRlhfConfig {
    /// Checks, by the headers, that the three folders contain every tensor that scoring needs, in
    /// the right shape: Llama and the projector, CLIP, the adapter and the reward head.
    pub fn check(&self, spec: &LlavaRlhfSpec) -> Result<(), CheckpointError> {
        let base = Shards::open(&spec.base)?;
        let needed = self.base_tensors(base.has(TWO_LAYERS));
        has_all(&base, &needed)?;
        let vision = Shards::open(&spec.vision)?;
        let class = |tower: &&str| vision.has(&format!("{tower}embeddings.class_embedding"));
        let tower = TOWERS.into_iter().find(class).unwrap_or(TOWERS[0]);
        has_all(&vision, &self.tower_tensors(tower))?;
        if let (Some(adapter), Some(folder)) = (&self.adapter, &spec.adapter) {
            adapter.check(&needed, str::to_owned)?;
            let head = folder.join(HEAD_FILE);
            if !head.is_file() {
                let problem = format!(
                    "the file `{HEAD_FILE}` is missing; a LLaVA-RLHF reward model has it next to \
                     its adapter"
                );
                return Err(CheckpointError::new(folder, problem));
            }
            let hidden = self.text_config.hidden_size;
            let wanted = [("weight", vec![1, hidden]), ("bias", vec![1])];
            let wanted = wanted.map(|(name, shape)| (name.to_owned(), shape));
            has_all(&Shards::open_file(&head)?, &wanted)?;
        }
        Ok(())
    }

    /// Returns the tensors of Llama without its head, and of the projector.
    fn base_tensors(&self, two_layers: bool) -> Tensors {
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: &[usize]| tensors.push((name, shape.to_vec()));
        let (hidden, features) = (self.text_config.hidden_size, self.vision_config.hidden_size);
        let projector = "model.mm_projector";
        let layers = if two_layers {
            vec![
                (format!("{projector}.0"), features),
                (format!("{projector}.2"), hidden),
            ]
        } else {
            vec![(projector.to_owned(), features)]
        };
        for (layer, input) in layers {
            add(format!("{layer}.weight"), &[hidden, input]);
            add(format!("{layer}.bias"), &[hidden]);
        }
        decoder(&self.text_config, "model", &mut add);
        tensors
    }

    /// Returns the tensors of CLIP up to the layer whose output is used.
    fn tower_tensors(&self, tower: &str) -> Tensors {
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: &[usize]| tensors.push((name, shape.to_vec()));
        let layers = self.mm_vision_select_layer;
        clip(&self.vision_config, layers, tower, &mut add);
        tensors
    }
}

impl AdapterConfig {
    /// Checks, by the headers, that each adapted module exists in the network, with both of its
    /// matrices in the right shape, and that no target module is missing. `tensors` are those of
    /// the network; `named` maps a module's name in the file to the network's.
    pub(crate) fn check(
        &self,
        tensors: &Tensors,
        named: fn(&str) -> String,
    ) -> Result<(), CheckpointError> {
        let shards = Shards::open(&self.folder)?;
        let mut modules: BTreeMap<String, [Option<&str>; 2]> = BTreeMap::new();
        for name in shards.names() {
            let (module, is_a) = lora_matrix(name).ok_or_else(|| {
                let problem = format!("`{name}` is neither a `lora_A` nor a `lora_B` matrix");
                CheckpointError::new(shards.path(), problem)
            })?;
            modules.entry(named(module)).or_default()[usize::from(!is_a)] = Some(name);
        }
        let linear = tensors.iter().filter_map(|(name, shape)| {
            let &[outputs, inputs] = shape.as_slice() else {
                return None;
            };
            Some((name.strip_suffix(".weight")?, [outputs, inputs]))
        });
        let linear: BTreeMap<&str, [usize; 2]> = linear.collect();
        for (module, matrices) in &modules {
            let Some([outputs, inputs]) = linear.get(module.as_str()) else {
                let problem =
                    format!("contains an adapter for `{module}`, which the base does not have");
                return Err(CheckpointError::new(shards.path(), problem));
            };
            let wanted = [
                ("lora_A", [self.r, *inputs]),
                ("lora_B", [*outputs, self.r]),
            ];
            for (stored, (matrix, shape)) in matrices.iter().zip(wanted) {
                let Some(tensor) = stored.and_then(|stored| shards.info(stored)) else {
                    let problem = format!("missing `{matrix}` of `{module}`");
                    return Err(CheckpointError::new(shards.path(), problem));
                };
                if !shape
                    .iter()
                    .map(|&size| size as i64)
                    .eq(tensor.shape.iter().copied())
                {
                    let problem = format!(
                        "`{matrix}` of `{module}` has shape {:?}, but adapter_config.json and the base require \
                         {shape:?}",
                        tensor.shape
                    );
                    return Err(CheckpointError::new(tensor.file, problem));
                }
            }
        }
        let is_target = |module: &&str| {
            let mut targets = self.target_modules.iter();
            targets.any(|target| is_module(module, target))
        };
        let mut missing = linear.into_keys().filter(is_target);
        match missing.find(|module| !modules.contains_key(*module)) {
            None => Ok(()),
            Some(module) => {
                let problem = format!(
                    "missing `lora_A` and `lora_B` of `{module}`, which adapter_config.json lists \
                     in target_modules"
                );
                Err(CheckpointError::new(shards.path(), problem))
            }
        }
    }
}

/// True if `module` is the linear layer that a config calls `target`.
pub fn is_module(module: &str, target: &str) -> bool {
    let rest = module.strip_suffix(target);
    rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Splits the name of a tensor in an adapter's file into the module that it adapts and a flag, true
/// for `lora_A` and false for `lora_B`. peft writes `base_model.model.<module>.lora_A.weight`, and
/// with the adapter's own name, such as `lora_default` or `default`, before `weight` while it
/// trains.
pub fn lora_matrix(name: &str) -> Option<(&str, bool)> {
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

/// Checks that all of these tensors are in the files, in the right shape.
fn has_all(shards: &Shards, needed: &[(String, Vec<usize>)]) -> Result<(), CheckpointError> {
    for (name, shape) in needed {
        let Some(tensor) = shards.info(name) else {
            return Err(CheckpointError::new(
                shards.path(),
                format!("missing tensor `{name}`"),
            ));
        };
        has_shape(&tensor, name, shape)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::test_util::{reward_folder, shard};

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

    /// Writes a file with tensors of these shapes except one.
    fn write_without(path: &Path, tensors: &Tensors, without: &str) {
        let kept = tensors.iter().filter(|(name, _)| name != without);
        let kept: Vec<(&str, &[usize])> = kept
            .map(|(name, shape)| (name.as_str(), shape.as_slice()))
            .collect();
        shard(path, &kept);
    }

    #[test]
    fn every_file_that_scoring_needs_is_looked_into() {
        let (_folder, spec) = reward_folder();
        let config = LlavaRlhfConfig::open(&spec).unwrap();
        let adapter = spec.adapter.clone().unwrap();
        let base = config.base_tensors(false);
        let tower = config.tower_tensors("vision_model.");
        let module =
            |layer: usize, part: &str| format!("model.layers.{layer}.self_attn.{part}_proj");
        let matrices = (0..2).flat_map(|layer| ["q", "v"].map(|part| module(layer, part)));
        let matrices: Tensors = matrices
            .flat_map(|module| {
                let name = |letter| format!("base_model.model.{module}.lora_{letter}.weight");
                [(name("A"), vec![4, 8]), (name("B"), vec![8, 4])]
            })
            .collect();
        let head: Tensors = vec![
            ("weight".to_owned(), vec![1, 8]),
            ("bias".to_owned(), vec![1]),
        ];
        let files = [
            (spec.base.join("model.safetensors"), &base),
            (spec.vision.join("model.safetensors"), &tower),
            (adapter.join("adapter_model.safetensors"), &matrices),
            (adapter.join(HEAD_FILE), &head),
        ];
        for (path, _) in &files {
            let diagnostic = config.check(&spec).unwrap_err();
            assert!(path.starts_with(&diagnostic.path), "{diagnostic}");
            for (path, tensors) in &files {
                if !path.exists() {
                    write_without(path, tensors, "");
                    break;
                }
            }
        }
        config.check(&spec).unwrap();
        // Each tensor is required, and in its shape.
        for (path, tensors) in &files {
            for (name, _) in tensors.iter() {
                write_without(path, tensors, name);
                let diagnostic = config.check(&spec).unwrap_err();
                assert!(path.starts_with(&diagnostic.path), "{name}: {diagnostic}");
            }
            let mut misshapen = (*tensors).clone();
            misshapen[0].1.push(1);
            write_without(path, &misshapen, "");
            let diagnostic = config.check(&spec).unwrap_err();
            assert!(diagnostic.problem.contains("has shape"), "{diagnostic}");
            write_without(path, tensors, "");
        }
        std::fs::remove_file(adapter.join(HEAD_FILE)).unwrap();
        let diagnostic = config.check(&spec).unwrap_err().problem;
        assert!(
            diagnostic.contains("the file `reward_head` is missing"),
            "{diagnostic}"
        );
    }
}
