//! A checkpoint as it lies on disk: read by canonical names, written back as it was.
//!
//! Of LLaVA-OneVision, the same weights are found under several names (transformers 4.45 to 4.57 has
//! `vision_tower.vision_model.…`, 5.x no `vision_model`, third parties what they are in memory, with a
//! leading `model.`, and LLaVA-NeXT names of its own). Networks ask by one name each; the checkpoint
//! remembers what each is called in its files. Writing keeps those names, the shards, the element
//! types, every tensor that no network asked for, and every other file of the folder, so whatever
//! could load the original can load the copy. The folders of a reward model's base and tower are kept
//! likewise. What is in torch files is written as safetensors.

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

/// The canonical names of the embedding and of the head, which may be one parameter.
pub const EMBEDDING: &str = "language_model.model.embed_tokens.weight";
pub const HEAD: &str = "language_model.lm_head.weight";

/// What the names of a tower's weights begin with.
pub const TOWER: &str = "vision_tower.";

/// An opened checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    weights: Weights,
    /// From canonical names to those in the files.
    names: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens the weights of `folder`; reads their headers only.
    pub fn open(folder: &Path) -> Result<Self, ModelError> {
        let weights = Weights::open(folder)?;
        let names = weights
            .names()
            .map(|name| (canonical(name), name.to_owned()))
            .collect();
        Ok(Self { weights, names })
    }

    /// Opens the base of a reward model: Llama and a projector, by the names that they have.
    pub fn open_base(folder: &Path) -> Result<Self, ModelError> {
        let weights = Weights::open(folder)?;
        let names = weights
            .names()
            .map(|name| (name.to_owned(), name.to_owned()));
        let names = names.collect();
        Ok(Self { weights, names })
    }

    /// Opens a folder with CLIP's tower. Its tensors are asked for below [`TOWER`]; a whole CLIP and
    /// transformers up to 4.x write them below `vision_model.`, transformers 5.x as they are.
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

    /// The element type that a tensor of this canonical name is stored in.
    pub fn kind(&self, name: &str) -> Option<Kind> {
        let stored = self.names.get(name)?;
        self.weights.kind(stored)
    }

    /// The shape of the tensor of this canonical name.
    pub fn shape(&self, name: &str) -> Result<Vec<i64>, ModelError> {
        let stored = self.names.get(name);
        let info = stored.and_then(|stored| self.weights.info(stored));
        let missing = || problem_with(self.weights.path(), &format!("has no tensor `{name}`"));
        Ok(info.ok_or_else(missing)?.shape.to_vec())
    }

    /// Whether a tensor of this canonical name is stored.
    pub fn has(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    /// Writes the checkpoint into the new folder `to`, with the values of `parameters` in the place
    /// of those that were read, each rounded to the element type that it was stored in. Returns when
    /// everything is on disk.
    pub fn save(&self, to: &Path, parameters: &[Parameter]) -> Result<(), ModelError> {
        self.save_as(to, parameters, None)
    }

    /// The same, in another layout.
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
            let folder = path.parent().expect("a file lies in a folder");
            fs::create_dir_all(folder)
                .and_then(|()| write_synced(&path, text))
                .and_then(|()| File::open(folder)?.sync_all())
                .map_err(io)?;
        }
        let mut values: HashMap<&str, &Tensor> = parameters
            .iter()
            .map(|parameter| (parameter.name.as_str(), &parameter.tensor))
            .collect();
        // A tied head that is stored nevertheless is stored as the embedding.
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

    /// The tensors of one shard under their names in it.
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

    /// Copies config, tokenizer, processor and whatever else lies beside the weights: every file
    /// that does not hold weights itself, but for those that a conversion replaces; and the config of
    /// a folder below, which may be the tower that a config of LLaVA-NeXT names.
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

/// Tensors of a file under the names of another layout, with rows for its placeholders.
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

/// The name of a shard once it is safetensors: `pytorch_model-00001-of-00002.bin` becomes
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

/// Whether the weights that are taken will be trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    Inference,
    /// Those of some parts are trained, in float32.
    TrainingState(Parts),
}

/// Some parts of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts([bool; Part::ALL.len()]);

impl Parts {
    pub const NONE: Self = Self([false; Part::ALL.len()]);

    /// Those that `wanted` says.
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

/// A checkpoint as a source of weights, on one device; in one precision, but for those that are
/// trained. Keeps what was taken for training.
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

    /// The precision of what is not trained.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The tensor of that canonical name, in the precision `kind`, not to be trained.
    pub fn take_as(&self, name: &str, shape: &[i64], kind: Kind) -> Result<Tensor, ModelError> {
        let Checkpoint { weights, names } = self.checkpoint;
        // An unknown name is asked for as it is, for the error to say that it is missing.
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
