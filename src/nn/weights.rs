//! Weights on disk: safetensors and torch files, single or in shards, read one tensor at a time.
//!
//! Opening reads the directories only (the header of a safetensors file, the zip directory and the
//! pickle of a torch file); [`Weights::take`] then reads the bytes of one tensor. So never more than
//! one tensor lies in memory beside the model that is being built, and a reader that names the
//! shapes it expects finds a wrong checkpoint before it has copied a byte of it.
//!
//! A torch file holds a pickle, which in Python may run any code. Here nothing is ever executed:
//! [`pickle`] knows the few words that a dictionary of tensors is made of and refuses all others.

mod pickle;
mod safetensors;
mod torch;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, TchError, Tensor};

use super::device::torch_error;
use crate::models::ModelError;

pub use self::safetensors::save_safetensors;
pub use self::torch::save_torch;
#[cfg(test)]
pub(super) use self::torch::tests::write_archive;

/// The weights of one model: every tensor of a folder's shards, or of one file.
#[derive(Debug)]
pub struct Weights {
    /// What was opened, for errors about the whole.
    path: PathBuf,
    shards: Vec<Shard>,
    /// Where each tensor lies: the index of its shard, and the place in it.
    tensors: BTreeMap<String, (usize, Place)>,
}

/// What a file says about one of its tensors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TensorInfo<'a> {
    /// The type of its elements, as stored.
    pub kind: Kind,
    /// Its shape, outermost dimension first.
    pub shape: &'a [i64],
    /// The file that holds it.
    pub file: &'a Path,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
}

/// Where a tensor lies in its file. The readers of both formats promise that every byte of it is
/// inside the file.
#[derive(Debug, Clone, PartialEq)]
struct Place {
    kind: Kind,
    shape: Vec<i64>,
    /// Steps in elements, one for each dimension.
    strides: Vec<i64>,
    /// The file's byte at which element 0 begins.
    start: u64,
    /// Elements from element 0 to the last one, both included, the gaps between them too.
    span: u64,
}

/// The files that may hold a model, in the order in which transformers and peft look for them; an
/// index names the shards.
const SINGLE_OR_INDEX: [(&str, bool); 6] = [
    ("model.safetensors", false),
    ("model.safetensors.index.json", true),
    ("pytorch_model.bin", false),
    ("pytorch_model.bin.index.json", true),
    ("adapter_model.safetensors", false),
    ("adapter_model.bin", false),
];

impl Weights {
    /// Opens the weights in `folder`: the first there is of `model.safetensors`, its shards,
    /// `pytorch_model.bin`, its shards, `adapter_model.safetensors` and `adapter_model.bin`.
    ///
    /// Fails when none is there, a shard is missing, truncated or damaged, or a torch file holds
    /// anything but tensors.
    pub fn open(folder: &Path) -> Result<Self, ModelError> {
        for (name, is_index) in SINGLE_OR_INDEX {
            let path = folder.join(name);
            if path.is_file() {
                let weights = if is_index {
                    Self::open_index(folder, &path)
                } else {
                    Self::open_file(&path)
                };
                return weights.map(|weights| Self {
                    path: folder.to_owned(),
                    ..weights
                });
            }
        }
        let wanted = SINGLE_OR_INDEX.map(|(name, _)| name).join(", ");
        Err(refuse(
            folder,
            format!("no weights; expected one of {wanted}"),
        ))
    }

    /// Opens one file, whatever its name: safetensors or torch (told apart by how it begins).
    pub fn open_file(path: &Path) -> Result<Self, ModelError> {
        let (shard, places) = Shard::open(path)?;
        let tensors = places
            .into_iter()
            .map(|(name, place)| (name, (0, place)))
            .collect();
        Ok(Self {
            path: path.to_owned(),
            shards: vec![shard],
            tensors,
        })
    }

    /// Opens the shards that an index file names. A tensor that lies in several shards is taken
    /// from the one that the index names.
    fn open_index(folder: &Path, index: &Path) -> Result<Self, ModelError> {
        let shard_of = read_index(index)?;
        let mut names: Vec<&str> = shard_of.values().map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        let mut shards = Vec::new();
        let mut tensors = BTreeMap::new();
        for name in names {
            let path = folder.join(name);
            if Path::new(name).file_name() != Some(name.as_ref()) {
                return Err(refuse(
                    index,
                    format!("`{name}` is not the name of a shard"),
                ));
            }
            if !path.is_file() {
                let problem = format!("the shard `{name}` is missing from {}", folder.display());
                return Err(refuse(index, problem));
            }
            let (shard, places) = Shard::open(&path)?;
            for (tensor, place) in places {
                if shard_of.get(&tensor).is_none_or(|owner| owner == name) {
                    tensors.insert(tensor, (shards.len(), place));
                }
            }
            shards.push(shard);
        }
        for (tensor, shard) in &shard_of {
            if !tensors.contains_key(tensor) {
                let problem = format!("`{tensor}` is not in the shard `{shard}`");
                return Err(refuse(index, problem));
            }
        }
        Ok(Self {
            path: folder.to_owned(),
            shards,
            tensors,
        })
    }

    /// The folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The files that hold the weights, sorted by name.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|shard| shard.path.as_path())
    }

    /// The stored type, the shape and the file of a tensor.
    pub fn info(&self, name: &str) -> Option<TensorInfo<'_>> {
        let (shard, place) = self.tensors.get(name)?;
        Some(TensorInfo {
            kind: place.kind,
            shape: &place.shape,
            file: &self.shards[*shard].path,
        })
    }

    /// Reads the tensor `name`, which must have the shape `shape`, as `kind` onto `device`.
    ///
    /// Fails when it is missing or has another shape (both shapes are named), can't be read, or
    /// does not fit into the device's memory.
    pub fn take(
        &self,
        name: &str,
        shape: &[i64],
        kind: Kind,
        device: Device,
    ) -> Result<Tensor, ModelError> {
        let (shard, place) = self.find(name)?;
        if place.shape != shape {
            let problem = format!(
                "`{name}` has the shape {:?}, expected {shape:?}; does config.json belong to \
                 these weights?",
                place.shape
            );
            return Err(refuse(&shard.path, problem));
        }
        shard.read(name, place, kind, device)
    }

    /// Reads the tensor `name` onto `device` in the type and shape that are stored.
    pub fn read(&self, name: &str, device: Device) -> Result<Tensor, ModelError> {
        let (shard, place) = self.find(name)?;
        shard.read(name, place, place.kind, device)
    }

    fn find(&self, name: &str) -> Result<(&Shard, &Place), ModelError> {
        let (shard, place) = self
            .tensors
            .get(name)
            .ok_or_else(|| refuse(&self.path, format!("the tensor `{name}` is missing")))?;
        Ok((&self.shards[*shard], place))
    }
}

impl Shard {
    /// Opens a file and reads where its tensors lie.
    fn open(path: &Path) -> Result<(Self, Vec<(String, Place)>), ModelError> {
        let in_file = |problem: String| refuse(path, problem);
        let mut file = File::open(path).map_err(|error| in_file(error.to_string()))?;
        let mut start = Vec::new();
        (&mut file)
            .take(16)
            .read_to_end(&mut start)
            .map_err(|error| in_file(error.to_string()))?;
        let places = match start.as_slice() {
            // A header's length in eight bytes, little-endian, then the header, which is JSON.
            [_, _, _, _, 0, 0, 0, 0, b'{', ..] => safetensors::places(&file),
            [b'P', b'K', 3, 4, ..] => torch::places(&file),
            [0x80, 2..=5, ..] => Err(
                "a torch file in the form from before torch 1.6, which is not \
                 read; load it with a current torch and save it again, best with safetensors"
                    .to_owned(),
            ),
            b"version https://" => {
                Err("a Git LFS pointer, not the file itself; run `git lfs pull`".to_owned())
            }
            [] => Err("the file is empty".to_owned()),
            _ => Err("neither a safetensors nor a torch file, or its beginning is damaged".into()),
        };
        let places = places.map_err(in_file)?;
        let path = path.to_owned();
        Ok((Self { path, file }, places))
    }

    fn read(
        &self,
        name: &str,
        place: &Place,
        kind: Kind,
        device: Device,
    ) -> Result<Tensor, ModelError> {
        let mut bytes = vec![0; place.span as usize * place.kind.elt_size_in_bytes()];
        self.file
            .read_exact_at(&mut bytes, place.start)
            .map_err(|error| refuse(&self.path, format!("`{name}`: {error}")))?;
        let load = || -> Result<Tensor, TchError> {
            Tensor::f_from_data_size(&bytes, &[place.span as i64], place.kind)?
                .f_as_strided(&place.shape, &place.strides, 0)?
                .f_to_device(device)?
                .f_to_kind(kind)?
                .f_contiguous()
        };
        let what = format!("reading `{name}` of {}", self.path.display());
        load().map_err(|error| torch_error(what, 1, 0, &error))
    }
}

impl Place {
    /// The steps of a tensor of this shape whose elements follow each other, last dimension
    /// fastest; `None` when the shape is negative or has more elements than can be counted.
    fn row_major(shape: &[i64]) -> Option<Vec<i64>> {
        let mut strides = vec![0; shape.len()];
        let mut elements = 1_i64;
        for (stride, &size) in strides.iter_mut().zip(shape).rev() {
            *stride = elements;
            elements = elements.checked_mul(size).filter(|_| size >= 0)?;
        }
        Some(strides)
    }

    /// Elements from the first to the last of a tensor, both included; `None` when a number is
    /// negative or the sum is too large to be counted.
    fn span(shape: &[i64], strides: &[i64]) -> Option<u64> {
        if shape.len() != strides.len() || shape.iter().chain(strides).any(|&n| n < 0) {
            return None;
        }
        if shape.contains(&0) {
            return Some(0);
        }
        let mut last = 0_i64;
        for (size, stride) in shape.iter().zip(strides) {
            last = last.checked_add((size - 1).checked_mul(*stride)?)?;
        }
        Some(last as u64 + 1)
    }
}

/// Reads `weight_map` of an index: which shard holds which tensor.
fn read_index(index: &Path) -> Result<BTreeMap<String, String>, ModelError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read(index).map_err(|error| refuse(index, error.to_string()))?;
    let index_read: Index =
        serde_json::from_slice(&text).map_err(|error| refuse(index, error.to_string()))?;
    if index_read.weight_map.is_empty() {
        return Err(refuse(index, "`weight_map` is empty".to_owned()));
    }
    Ok(index_read.weight_map)
}

/// An error about a file of the model.
pub(super) fn refuse(path: &Path, problem: String) -> ModelError {
    ModelError::Weights {
        path: path.to_owned(),
        problem,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(shape: &[i64]) -> Tensor {
        let count = shape.iter().product::<i64>();
        Tensor::arange(count, (Kind::Float, Device::Cpu)).reshape(shape)
    }

    fn save(path: &Path, tensors: &[(&str, Tensor)]) {
        let named: Vec<_> = tensors
            .iter()
            .map(|(name, tensor)| ((*name).to_owned(), tensor.shallow_clone()))
            .collect();
        save_safetensors(path, &named, &[("format", "pt")]).unwrap();
    }

    /// What `open` says about a folder, as a user would read it.
    fn complaint(folder: &Path) -> String {
        Weights::open(folder).unwrap_err().to_string()
    }

    #[test]
    fn tensors_are_found_across_shards_and_cast_when_taken() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        save(&at("one.safetensors"), &[("a", numbers(&[2, 3]))]);
        save(
            &at("two.safetensors"),
            &[("b", numbers(&[4])), ("c", numbers(&[1]))],
        );
        let index = r#"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#;
        std::fs::write(at("model.safetensors.index.json"), index).unwrap();
        let weights = Weights::open(folder.path()).unwrap();
        assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(weights.info("b").unwrap().file, at("two.safetensors"));
        let a = weights
            .take("a", &[2, 3], Kind::BFloat16, Device::Cpu)
            .unwrap();
        assert_eq!(a.kind(), Kind::BFloat16);
        assert_eq!(a.to_kind(Kind::Float), numbers(&[2, 3]));
    }

    #[test]
    fn a_wrong_shape_names_the_file_the_tensor_and_both_shapes() {
        let folder = tempfile::tempdir().unwrap();
        save(
            &folder.path().join("model.safetensors"),
            &[("a", numbers(&[2, 3]))],
        );
        let weights = Weights::open(folder.path()).unwrap();
        let error = weights
            .take("a", &[3, 2], Kind::Float, Device::Cpu)
            .unwrap_err();
        let text = error.to_string();
        for part in ["model.safetensors", "`a`", "[2, 3]", "[3, 2]"] {
            assert!(text.contains(part), "{text} lacks {part}");
        }
    }

    #[test]
    fn a_missing_tensor_a_missing_shard_and_an_empty_folder_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        assert!(complaint(folder.path()).contains("model.safetensors.index.json"));
        save(&at("one.safetensors"), &[("a", numbers(&[1]))]);
        let write_index = |map: &str| {
            let text = format!(r#"{{"weight_map": {map}}}"#);
            std::fs::write(at("model.safetensors.index.json"), text).unwrap();
        };
        write_index(r#"{"a": "one.safetensors", "b": "two.safetensors"}"#);
        assert!(complaint(folder.path()).contains("the shard `two.safetensors` is missing"));
        write_index(r#"{"a": "one.safetensors", "b": "one.safetensors"}"#);
        assert!(complaint(folder.path()).contains("`b` is not in the shard `one.safetensors`"));
        write_index(r#"{"a": "../one.safetensors"}"#);
        assert!(complaint(folder.path()).contains("is not the name of a shard"));
        write_index(r#"{"a": "one.safetensors"}"#);
        let weights = Weights::open(folder.path()).unwrap();
        let error = weights.read("z", Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("the tensor `z` is missing"), "{error}");
    }

    #[test]
    fn torch_files_are_read_bit_for_bit_as_torch_reads_them() {
        // Recorded by tests/parity/record_reward.py: the same tensors in both formats.
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/reward");
        let found = Weights::open_file(&folder.join("tensors.bin")).unwrap();
        let expected = Weights::open_file(&folder.join("tensors.safetensors")).unwrap();
        assert_eq!(found.names().count(), 9);
        assert!(found.names().eq(expected.names()));
        for name in expected.names() {
            let found = found.read(name, Device::Cpu).unwrap();
            let expected = expected.read(name, Device::Cpu).unwrap();
            assert_eq!(
                (found.kind(), found.size()),
                (expected.kind(), expected.size()),
                "{name}"
            );
            assert!(found.equal(&expected), "{name}");
        }
    }

    #[test]
    fn files_that_hold_no_weights_say_what_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pytorch_model.bin");
        let check = |bytes: &[u8], expected: &str| {
            std::fs::write(&path, bytes).unwrap();
            let text = complaint(folder.path());
            assert!(text.contains(expected), "{text}");
            assert!(text.contains("pytorch_model.bin"), "{text}");
        };
        check(b"", "empty");
        check(b"version https://git-lfs.github.com/spec/v1\n", "Git LFS");
        check(
            b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.",
            "before torch 1.6",
        );
        check(b"hello, world", "neither a safetensors nor a torch file");
        check(b"PK\x03\x04 and then nothing", "truncated");
    }
}
