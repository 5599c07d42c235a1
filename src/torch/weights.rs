//! Weights on disk: the tensors of [`Shards`] as libtorch tensors, read one at a time.
//!
//! Opening reads only the directories; [`Weights::take`] then reads the bytes of one tensor. Thus
//! at most one tensor is in memory in addition to the model that is being built, and a caller that
//! expects certain shapes detects a wrong checkpoint before any of its bytes are copied.

mod kind;
mod save;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use tch::{Device, Kind, TchError, Tensor};

use self::kind::kind;
use super::device::torch_error;
use super::error::refuse;
use ovchat_models::ModelError;
use ovchat_models::checkpoint::{Shards, TensorInfo, TensorLocation};

pub use self::save::{save_safetensors, save_torch};

/// The weights of one model: every tensor of a folder's shards, or of one file.
#[derive(Debug)]
pub struct Weights {
    shards: Shards,
    /// The open files of `shards`.
    files: Vec<File>,
}

impl Weights {
    /// Opens the weights in `folder`; see [`Shards::open`].
    pub fn open(folder: &Path) -> Result<Self, ModelError> {
        Self::of(Shards::open(folder)?)
    }

    /// Opens one file; see [`Shards::open_file`].
    pub fn open_file(path: &Path) -> Result<Self, ModelError> {
        Self::of(Shards::open_file(path)?)
    }

    fn of(shards: Shards) -> Result<Self, ModelError> {
        let open = |path: &Path| File::open(path).map_err(|error| refuse(path, error.to_string()));
        Ok(Self {
            files: shards.files().map(open).collect::<Result<_, _>>()?,
            shards,
        })
    }

    /// The folder or file that was opened.
    pub fn path(&self) -> &Path {
        self.shards.path()
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.shards.names()
    }

    /// True if there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.shards.has(name)
    }

    /// The files that hold the weights, sorted by name.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.shards.files()
    }

    /// The stored dtype, the shape and the file of a tensor.
    pub fn info(&self, name: &str) -> Option<TensorInfo<'_>> {
        self.shards.info(name)
    }

    /// The dtype that a tensor is stored in.
    pub fn kind(&self, name: &str) -> Option<Kind> {
        self.info(name).map(|info| kind(info.element))
    }

    /// Reads the tensor `name` with the expected `shape` onto `device` as `kind`.
    ///
    /// Fails if it is missing or has another shape (the error names both shapes), cannot be read,
    /// or does not fit into the device's memory.
    pub fn take(
        &self,
        name: &str,
        shape: &[i64],
        kind: Kind,
        device: Device,
    ) -> Result<Tensor, ModelError> {
        let (file, place) = self.find(name)?;
        if place.shape != shape {
            let problem = format!(
                "`{name}` has shape {:?}, expected {shape:?}; does config.json belong to \
                 these weights?",
                place.shape
            );
            return Err(refuse(self.path_of(file), problem));
        }
        self.load(name, file, place, kind, device)
    }

    /// Reads the tensor `name` onto `device` with its stored dtype and shape.
    pub fn read(&self, name: &str, device: Device) -> Result<Tensor, ModelError> {
        let (file, place) = self.find(name)?;
        self.load(name, file, place, kind(place.element), device)
    }

    fn find(&self, name: &str) -> Result<(usize, &TensorLocation), ModelError> {
        let missing = || refuse(self.path(), format!("the tensor `{name}` is missing"));
        self.shards.place(name).ok_or_else(missing)
    }

    fn path_of(&self, file: usize) -> &Path {
        let mut files = self.shards.files();
        files
            .nth(file)
            .expect("the index refers to one of the files")
    }

    fn load(
        &self,
        name: &str,
        file: usize,
        place: &TensorLocation,
        wanted: Kind,
        device: Device,
    ) -> Result<Tensor, ModelError> {
        let path = self.path_of(file);
        let mut bytes = vec![0; (place.span * place.element.bytes()) as usize];
        self.files[file]
            .read_exact_at(&mut bytes, place.start)
            .map_err(|error| refuse(path, format!("`{name}`: {error}")))?;
        let load = || -> Result<Tensor, TchError> {
            Tensor::f_from_data_size(&bytes, &[place.span as i64], kind(place.element))?
                .f_as_strided(&place.shape, &place.strides, 0)?
                .f_to_device(device)?
                .f_to_kind(wanted)?
                .f_contiguous()
        };
        let what = format!("reading `{name}` of {}", path.display());
        load().map_err(|error| torch_error(what, 1, 0, &error))
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
    fn torch_files_are_read_bit_for_bit_as_torch_reads_them() {
        // Recorded by tests/parity/record_reward.py: the same tensors in both formats.
        let folder =
            Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("tests/parity/reward");
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
}
