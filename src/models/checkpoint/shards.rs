//! Tensor locations in a checkpoint: safetensors and torch files, single or in shards.
//!
//! Only directories are read here (the header of a safetensors file; the zip directory and the
//! pickle of a torch file), so a folder of 15 GB is listed in milliseconds, and a missing,
//! truncated or corrupt file is found before anything runs. Every listed location is verified to be
//! inside its file.
//!
//! A torch file contains a pickle, which in Python may run any code. Here nothing is ever executed:
//! [`pickle`] accepts only the few names that a dictionary of tensors consists of.

mod pickle;
mod safetensors;
mod tensor;
mod torch;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

pub use pickle::write_pickle;
pub use tensor::{Element, TensorLocation};

use crate::checkpoint::CheckpointError;
use ovchat_io::files;

/// The tensors of one model: those of a folder's shards, or of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shards {
    /// The path that was opened, for errors.
    path: PathBuf,
    files: Vec<PathBuf>,
    /// Locations by tensor name: the index of the file, and the location in it.
    tensors: BTreeMap<String, (usize, TensorLocation)>,
}

/// Type, shape and file of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorInfo<'a> {
    pub element: Element,
    /// The shape, outermost dimension first.
    pub shape: &'a [i64],
    /// The file that contains the tensor.
    pub file: &'a Path,
}

/// The files that may contain a model, in the order in which transformers and peft look for them;
/// `true` marks an index, which lists shards.
const SINGLE_OR_INDEX: [(&str, bool); 6] = [
    ("model.safetensors", false),
    ("model.safetensors.index.json", true),
    ("pytorch_model.bin", false),
    ("pytorch_model.bin.index.json", true),
    ("adapter_model.safetensors", false),
    ("adapter_model.bin", false),
];

impl Shards {
    /// Opens the weights in `folder`: the first that exists of `model.safetensors`, its shards,
    /// `pytorch_model.bin`, its shards, `adapter_model.safetensors` and `adapter_model.bin`.
    ///
    /// Fails if there are none, if a shard is missing, truncated or corrupt, or if a torch file
    /// contains anything but tensors.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
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
        Err(CheckpointError::new(
            folder,
            format!("no weights found; expected one of {wanted}"),
        ))
    }

    /// Opens one file of any name: safetensors or torch, detected from its first bytes.
    pub fn open_file(path: &Path) -> Result<Self, CheckpointError> {
        let places = places(path)?.into_iter();
        Ok(Self {
            path: path.to_owned(),
            files: vec![path.to_owned()],
            tensors: places.map(|(name, place)| (name, (0, place))).collect(),
        })
    }

    /// Opens the shards that an index file lists. A tensor that is in several shards is taken from
    /// the one that the index gives for it.
    fn open_index(folder: &Path, index: &Path) -> Result<Self, CheckpointError> {
        let shard_of = read_index(index)?;
        let mut names: Vec<&str> = shard_of.values().map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        let mut files = Vec::new();
        let mut tensors = BTreeMap::new();
        for name in names {
            let path = folder.join(name);
            if Path::new(name).file_name() != Some(name.as_ref()) {
                return Err(CheckpointError::new(
                    index,
                    format!("`{name}` is not a valid shard name"),
                ));
            }
            if !path.is_file() {
                let problem = format!("the shard `{name}` is missing from {}", folder.display());
                return Err(CheckpointError::new(index, problem));
            }
            for (tensor, place) in places(&path)? {
                if shard_of.get(&tensor).is_none_or(|owner| owner == name) {
                    tensors.insert(tensor, (files.len(), place));
                }
            }
            files.push(path);
        }
        for (tensor, shard) in &shard_of {
            if !tensors.contains_key(tensor) {
                let problem = format!("`{tensor}` is not in the shard `{shard}`");
                return Err(CheckpointError::new(index, problem));
            }
        }
        Ok(Self {
            path: folder.to_owned(),
            files,
            tensors,
        })
    }

    /// Creates a folder whose one file contains float32 tensors of these shapes.
    #[cfg(test)]
    pub(super) fn of(folder: &Path, tensors: &BTreeMap<String, Vec<i64>>) -> Self {
        let place = |shape: &Vec<i64>| TensorLocation {
            element: Element::F32,
            shape: shape.clone(),
            strides: TensorLocation::row_major(shape).expect("small"),
            start: 0,
            span: shape.iter().product::<i64>() as u64,
        };
        let tensors = tensors.iter();
        Self {
            path: folder.to_owned(),
            files: vec![folder.join("model.safetensors")],
            tensors: tensors
                .map(|(name, shape)| (name.clone(), (0, place(shape))))
                .collect(),
        }
    }

    /// Returns the folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// True if there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Returns the files that contain the weights, sorted by name.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(PathBuf::as_path)
    }

    /// Returns the stored type, the shape and the file of a tensor.
    pub fn info(&self, name: &str) -> Option<TensorInfo<'_>> {
        let (shard, place) = self.tensors.get(name)?;
        Some(TensorInfo {
            element: place.element,
            shape: &place.shape,
            file: &self.files[*shard],
        })
    }

    /// Returns the index of a tensor's file in [`Shards::files`] and its location in that file.
    pub fn place(&self, name: &str) -> Option<(usize, &TensorLocation)> {
        let (file, place) = self.tensors.get(name)?;
        Some((*file, place))
    }
}

/// Reads the tensor locations of a file.
fn places(path: &Path) -> Result<Vec<(String, TensorLocation)>, CheckpointError> {
    let in_file = |problem: String| CheckpointError::new(path, problem);
    let mut file = files::open(path).map_err(|error| in_file(error.to_string()))?;
    let mut start = Vec::new();
    (&mut file)
        .take(16)
        .read_to_end(&mut start)
        .map_err(|error| in_file(error.to_string()))?;
    let places = match start.as_slice() {
        // A safetensors file: the length of the header in eight bytes, little-endian, then the
        // header in JSON.
        [_, _, _, _, 0, 0, 0, 0, b'{', ..] => safetensors::places(&file),
        [b'P', b'K', 3, 4, ..] => torch::places(&file),
        [0x80, 2..=5, ..] => Err("unsupported torch format from before torch 1.6; \
             load the file with a current torch and save it again, preferably as safetensors"
            .to_owned()),
        b"version https://" => {
            Err("a Git LFS pointer, not the file itself; run `git lfs pull`".to_owned())
        }
        [] => Err("the file is empty".to_owned()),
        _ => Err("neither a safetensors nor a torch file, or corrupt at its start".into()),
    };
    places.map_err(in_file)
}

/// Reads `weight_map` of an index: the shard of each tensor.
fn read_index(index: &Path) -> Result<BTreeMap<String, String>, CheckpointError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text =
        files::read(index).map_err(|error| CheckpointError::new(index, error.to_string()))?;
    let index_read: Index = serde_json::from_slice(&text)
        .map_err(|error| CheckpointError::new(index, error.to_string()))?;
    if index_read.weight_map.is_empty() {
        return Err(CheckpointError::new(
            index,
            "`weight_map` is empty".to_owned(),
        ));
    }
    Ok(index_read.weight_map)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::test_util::shard;

    /// Returns the error of `open` for a folder, as a user would see it.
    fn diagnostic(folder: &Path) -> String {
        Shards::open(folder).unwrap_err().to_string()
    }

    #[test]
    fn a_missing_tensor_a_missing_shard_and_an_empty_folder_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        assert!(diagnostic(folder.path()).contains("model.safetensors.index.json"));
        shard(&at("one.safetensors"), &[("a", &[1])]);
        let write_index = |map: &str| {
            let text = format!(r#"{{"weight_map": {map}}}"#);
            std::fs::write(at("model.safetensors.index.json"), text).unwrap();
        };
        write_index(r#"{"a": "one.safetensors", "b": "two.safetensors"}"#);
        assert!(diagnostic(folder.path()).contains("the shard `two.safetensors` is missing"));
        write_index(r#"{"a": "one.safetensors", "b": "one.safetensors"}"#);
        assert!(diagnostic(folder.path()).contains("`b` is not in the shard `one.safetensors`"));
        write_index(r#"{"a": "../one.safetensors"}"#);
        assert!(diagnostic(folder.path()).contains("is not a valid shard name"));
        write_index(r#"{"a": "one.safetensors"}"#);
    }

    #[test]
    fn files_that_hold_no_weights_say_what_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pytorch_model.bin");
        let check = |bytes: &[u8], expected: &str| {
            std::fs::write(&path, bytes).unwrap();
            let text = diagnostic(folder.path());
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

    #[test]
    fn all_shards_are_listed_with_types_shapes_and_places() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        shard(&at("a.safetensors"), &[("x", &[2, 3])]);
        shard(&at("b.safetensors"), &[("y", &[4]), ("z", &[])]);
        let index = json!({"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}});
        std::fs::write(at("model.safetensors.index.json"), index.to_string()).unwrap();
        let shards = Shards::open(folder.path()).unwrap();
        assert_eq!(shards.names().collect::<Vec<_>>(), ["x", "y", "z"]);
        assert_eq!(shards.info("x").unwrap().shape, [2, 3]);
        let (file, z) = shards.place("z").unwrap();
        assert_eq!((file, z.element, z.span), (1, Element::F32, 1));
        let bytes = std::fs::metadata(at("b.safetensors")).unwrap().len();
        assert_eq!(z.start + 4, bytes);
    }
}
