//! Checkpoints on disk: reading tensors by canonical names and writing them back.
//!
//! The weights of LLaVA-OneVision come under several naming schemes (transformers 4.45 to 4.57
//! writes `vision_tower.vision_model.…`, 5.x omits `vision_model`, third parties write the names in
//! memory with a leading `model.`, and LLaVA-NeXT has names of its own). Networks ask for one
//! canonical name each; the checkpoint maps it to the name in its files. Writing keeps the stored
//! names, the shards, the dtypes, every tensor that no network asked for and every other file of
//! the folder, so whatever can load the original can load the copy. The folders of a reward model's
//! base and tower are kept in the same way. Torch files are written as safetensors.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::Path;

use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::layers::WeightSource;
use super::optimizer::Parameter;
use super::weights::{Weights, save_safetensors};
use ovchat_models::checkpoint::{Conversion, canonical, part_of};
use ovchat_models::{ModelError, Part, Tower};

/// The canonical names of the embedding and the head, which may be one parameter.
pub const EMBEDDING: &str = "language_model.model.embed_tokens.weight";
pub const HEAD: &str = "language_model.lm_head.weight";

/// The prefix of a vision tower's tensor names.
pub const TOWER: &str = "vision_tower.";

/// An open checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    weights: Weights,
    /// Maps canonical names to those in the files.
    names: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens the weights of `folder`; reads only their headers.
    pub fn open(folder: &Path) -> Result<Self, ModelError> {
        let weights = Weights::open(folder)?;
        let names = weights
            .names()
            .map(|name| (canonical(name), name.to_owned()))
            .collect();
        Ok(Self { weights, names })
    }

    /// Opens the base of a reward model, Llama and a projector, whose stored names are canonical.
    pub fn open_base(folder: &Path) -> Result<Self, ModelError> {
        let weights = Weights::open(folder)?;
        let names = weights
            .names()
            .map(|name| (name.to_owned(), name.to_owned()));
        let names = names.collect();
        Ok(Self { weights, names })
    }

    /// Opens a folder with a CLIP tower. Its canonical names begin with [`TOWER`]; a whole CLIP and
    /// transformers up to 4.x store the tensors below `vision_model.`, transformers 5.x without a
    /// prefix.
    pub fn open_clip(folder: &Path) -> Result<Self, ModelError> {
        let weights = Weights::open(folder)?;
        let is_there = |prefix: &&str| weights.has(&format!("{prefix}embeddings.class_embedding"));
        let prefix = ["vision_model.", ""].into_iter().find(is_there);
        let prefix = prefix.ok_or_else(|| {
            let problem = "holds no CLIP tower: neither `vision_model.embeddings.class_embedding` \
                           nor `embeddings.class_embedding` is among its tensors";
            problem_with(folder, problem)
        })?;
        let names = weights.names().map(|name| {
            let canonical = match name.strip_prefix(prefix) {
                Some(rest) => format!("{TOWER}{rest}"),
                None => name.to_owned(),
            };
            (canonical, name.to_owned())
        });
        let names = names.collect();
        Ok(Self { weights, names })
    }

    /// The dtype of the stored tensor with this canonical name.
    pub fn kind(&self, name: &str) -> Option<Kind> {
        let stored = self.names.get(name)?;
        self.weights.kind(stored)
    }

    /// The shape of the stored tensor with this canonical name.
    pub fn shape(&self, name: &str) -> Result<Vec<i64>, ModelError> {
        let stored = self.names.get(name);
        let info = stored.and_then(|stored| self.weights.info(stored));
        let missing = || problem_with(self.weights.path(), &format!("has no tensor `{name}`"));
        Ok(info.ok_or_else(missing)?.shape.to_vec())
    }

    /// True if a tensor with this canonical name is stored.
    pub fn has(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    /// Writes the checkpoint to the new folder `to`, with the values of `parameters` in place of
    /// the stored ones, each cast to its stored dtype. Returns when everything is on disk.
    pub fn save(&self, to: &Path, parameters: &[Parameter]) -> Result<(), ModelError> {
        self.save_as(to, parameters, None)
    }

    /// Like [`Checkpoint::save`], converted to another checkpoint layout.
    pub fn save_as(
        &self,
        to: &Path,
        parameters: &[Parameter],
        conversion: Option<&Conversion>,
    ) -> Result<(), ModelError> {
        let io = |error: std::io::Error| problem_with(to, &error.to_string());
        fs::create_dir(to).map_err(io)?;
        self.copy_other_files(to, conversion)?;
        for (name, text) in conversion.iter().flat_map(|conversion| &conversion.files) {
            let path = to.join(name);
            let folder = path.parent().expect("a file has a parent folder");
            fs::create_dir_all(folder)
                .and_then(|()| write_synced(&path, text))
                .and_then(|()| File::open(folder)?.sync_all())
                .map_err(io)?;
        }
        let mut values: HashMap<&str, &Tensor> = parameters
            .iter()
            .map(|parameter| (parameter.name.as_str(), &parameter.tensor))
            .collect();
        // A tied head that is stored nevertheless gets the values of the embedding.
        if let (None, Some(&embedding)) = (values.get(HEAD), values.get(EMBEDDING)) {
            values.insert(HEAD, embedding);
        }
        let mut shard_of = serde_json::Map::new();
        for file in self.weights.files() {
            let mut tensors = self.tensors_of(file, &values)?;
            if let Some(conversion) = conversion {
                tensors = converted(tensors, conversion);
            }
            let name = safetensors_name(file);
            save_safetensors(&to.join(&name), &tensors, &[("format", "pt")])?;
            for (tensor, _) in tensors {
                shard_of.insert(tensor, name.clone().into());
            }
        }
        let index = to.join("model.safetensors.index.json");
        if self.weights.files().count() > 1 && !index.exists() {
            let text = json!({ "metadata": {}, "weight_map": shard_of }).to_string();
            write_synced(&index, &text).map_err(io)?;
        }
        File::open(to)
            .and_then(|folder| folder.sync_all())
            .map_err(io)
    }

    /// The tensors of one shard under their stored names.
    fn tensors_of(
        &self,
        file: &Path,
        values: &HashMap<&str, &Tensor>,
    ) -> Result<Vec<(String, Tensor)>, ModelError> {
        let mut tensors = Vec::new();
        for (canonical, name) in &self.names {
            let lies_here = self
                .weights
                .info(name)
                .is_some_and(|info| info.file == file);
            let Some(kind) = self.weights.kind(name).filter(|_| lies_here) else {
                continue;
            };
            let tensor = match values.get(canonical.as_str()) {
                Some(value) => value.detach().to_device(Device::Cpu).to_kind(kind),
                None => self.weights.read(name, Device::Cpu)?,
            };
            tensors.push((name.clone(), tensor));
        }
        Ok(tensors)
    }

    /// Copies the config, tokenizer, processor and every other file that holds no weights, except
    /// those that a conversion replaces; also copies `config.json` of subfolders, since a
    /// LLaVA-NeXT config may name one as its tower.
    fn copy_other_files(
        &self,
        to: &Path,
        conversion: Option<&Conversion>,
    ) -> Result<(), ModelError> {
        let from = self.weights.path();
        let io = |error: std::io::Error| problem_with(from, &error.to_string());
        let copy = |path: &Path, copy: &Path| {
            fs::copy(path, copy)
                .and_then(|_| File::open(copy)?.sync_all())
                .map_err(|error| problem_with(copy, &error.to_string()))
        };
        for entry in fs::read_dir(from).map_err(io)? {
            let entry = entry.map_err(io)?;
            let path = entry.path();
            let holds_weights = path.extension().is_some_and(|end| {
                ["safetensors", "bin", "pt", "pth", "gguf", "h5", "msgpack"]
                    .iter()
                    .any(|other| end == *other)
            }) || path.ends_with("pytorch_model.bin.index.json");
            let name = entry.file_name();
            let is_kept = conversion.is_none_or(|new| new.keeps(&name.to_string_lossy()));
            let nested = path.join("config.json");
            if nested.is_file() && conversion.is_none() {
                let folder = to.join(&name);
                fs::create_dir(&folder)
                    .map_err(|error| problem_with(&folder, &error.to_string()))?;
                copy(&nested, &folder.join("config.json"))?;
                File::open(&folder)
                    .and_then(|folder| folder.sync_all())
                    .map_err(io)?;
            } else if path.is_file() && !holds_weights && is_kept {
                copy(&path, &to.join(&name))?;
            }
        }
        Ok(())
    }
}

/// Renames the tensors of a file to another layout and adds rows for its placeholder tokens.
fn converted(tensors: Vec<(String, Tensor)>, conversion: &Conversion) -> Vec<(String, Tensor)> {
    let named = tensors.into_iter().filter_map(|(name, tensor)| {
        let canonical = canonical(&name);
        let rows = conversion.vocab_size as i64;
        let has_vocabulary = canonical == EMBEDDING || canonical == HEAD;
        let missing = if has_vocabulary {
            rows - tensor.size()[0]
        } else {
            0
        };
        let tensor = if missing > 0 {
            let mean = tensor.mean_dim(0, true, Kind::Float).to_kind(tensor.kind());
            Tensor::cat(&[&tensor, &mean.expand([missing, -1], false)], 0)
        } else {
            tensor
        };
        Some((conversion.name(&canonical)?, tensor))
    });
    let mut named: Vec<_> = named.collect();
    named.sort_by(|(one, _), (other, _)| one.cmp(other));
    named
}

fn write_synced(path: &Path, text: &str) -> std::io::Result<()> {
    fs::write(path, text)?;
    File::open(path)?.sync_all()
}

/// The name of a shard as a safetensors file: `pytorch_model-00001-of-00002.bin` becomes
/// `model-00001-of-00002.safetensors`.
fn safetensors_name(file: &Path) -> String {
    let name = file.file_name().expect("a shard is a file");
    let name = name.to_string_lossy();
    match name.strip_suffix(".bin") {
        Some(stem) => format!(
            "{}.safetensors",
            stem.strip_prefix("pytorch_").unwrap_or(stem)
        ),
        None => name.into_owned(),
    }
}

fn problem_with(path: &Path, problem: &str) -> ModelError {
    ModelError::Weights {
        path: path.to_owned(),
        problem: problem.to_owned(),
    }
}

/// The purpose that weights are loaded for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    Inference,
    /// Training of some parts, whose weights are in float32.
    TrainingState(Parts),
}

/// A set of parts of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts([bool; Part::ALL.len()]);

impl Parts {
    pub const NONE: Self = Self([false; Part::ALL.len()]);

    /// The parts for which `wanted` returns true.
    pub fn which(wanted: impl Fn(Part) -> bool) -> Self {
        Self(Part::ALL.map(wanted))
    }

    pub fn has(self, part: Part) -> bool {
        self.0[part as usize]
    }
}

impl From<Tower> for Parts {
    fn from(tower: Tower) -> Self {
        Self::which(|part| part != Part::VisionTower || tower == Tower::Train)
    }
}

/// A checkpoint as a source of weights on one device. Trained weights are in float32, all others in
/// one dtype. Collects the parameters that were taken for training.
#[derive(Debug)]
pub struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    device: Device,
    kind: Kind,
    purpose: Purpose,
    parameters: RefCell<Vec<Parameter>>,
}

impl<'a> Reader<'a> {
    pub fn new(checkpoint: &'a Checkpoint, device: Device, kind: Kind, purpose: Purpose) -> Self {
        let parameters = RefCell::default();
        Self {
            checkpoint,
            device,
            kind,
            purpose,
            parameters,
        }
    }

    pub fn device(&self) -> Device {
        self.device
    }

    /// The dtype of weights that are not trained.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns the tensor with this canonical name in dtype `kind`, without gradients.
    pub fn take_as(&self, name: &str, shape: &[i64], kind: Kind) -> Result<Tensor, ModelError> {
        let Checkpoint { weights, names } = self.checkpoint;
        // An unknown name is looked up unchanged, so that the error names it as missing.
        let stored = names.get(name).map_or(name, String::as_str);
        weights.take(stored, shape, kind, self.device)
    }

    /// The weights that were taken for training, in the order of taking.
    pub fn into_parameters(self) -> Vec<Parameter> {
        self.parameters.into_inner()
    }
}

impl WeightSource for Reader<'_> {
    fn take(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
        let is_trained = match self.purpose {
            Purpose::Inference => false,
            Purpose::TrainingState(parts) => parts.has(part_of(name)),
        };
        if !is_trained {
            return self.take_as(name, shape, self.kind);
        }
        let tensor = self.take_as(name, shape, Kind::Float)?;
        let tensor = tensor.set_requires_grad(true);
        self.parameters.borrow_mut().push(Parameter {
            name: name.to_owned(),
            tensor: tensor.shallow_clone(),
        });
        Ok(tensor)
    }

    fn packs(&self) -> bool {
        matches!(self.purpose, Purpose::Inference)
            && self.kind == Kind::Float
            && self.device == Device::Cpu
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_checkpoint_has_the_same_names_types_and_untouched_tensors() {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("from");
        fs::create_dir(&from).unwrap();
        fs::write(from.join("config.json"), "{}").unwrap();
        let stored = |name: &str, values: &[f32], kind| {
            (name.to_owned(), Tensor::from_slice(values).to_kind(kind))
        };
        let tensors = [
            stored("image_newline", &[1.0, 2.0], Kind::BFloat16),
            stored(
                "vision_tower.vision_model.post_layernorm.bias",
                &[0.1],
                Kind::Float,
            ),
            stored(
                "language_model.model.embed_tokens.weight",
                &[3.0],
                Kind::Half,
            ),
            stored("language_model.lm_head.weight", &[3.0], Kind::Half),
        ];
        let path = from.join("model.safetensors");
        save_safetensors(&path, &tensors, &[("format", "pt")]).unwrap();

        let checkpoint = Checkpoint::open(&from).unwrap();
        let reader = Reader::new(
            &checkpoint,
            Device::Cpu,
            Kind::Float,
            Purpose::TrainingState(Tower::Train.into()),
        );
        let newline = reader.take("image_newline", &[2]).unwrap();
        let embedding = reader.take(EMBEDDING, &[1]).unwrap();
        tch::no_grad(|| {
            let _ = newline.detach().g_add_scalar_(0.25);
            let _ = embedding.detach().g_add_scalar_(1.0);
        });
        let to = folder.path().join("to");
        checkpoint.save(&to, &reader.into_parameters()).unwrap();

        assert_eq!(fs::read_to_string(to.join("config.json")).unwrap(), "{}");
        let saved = Weights::open(&to).unwrap();
        assert!(saved.names().eq(checkpoint.weights.names()));
        let [changed, untouched, tied, head] = tensors.map(|(name, before)| {
            let after = saved.read(&name, Device::Cpu).unwrap();
            assert_eq!(after.kind(), before.kind());
            Vec::<f32>::try_from(after.to_kind(Kind::Float)).unwrap()
        });
        assert_eq!((changed, untouched), (vec![1.25, 2.25], vec![0.1]));
        assert_eq!((tied, head), (vec![4.0], vec![4.0]));
        let again = checkpoint.save(&to, &[]).unwrap_err().to_string();
        assert!(again.contains("to: File exists"), "{again}");
    }
}
