//! Writing tensors: as safetensors, and as torch files for what must be one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::json;
use tch::{Device, Kind, Tensor};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, DateTime, ZipWriter};

use super::kind::kind;
use crate::device::torch_error;
use crate::error::refuse;
use ovchat_models::ModelError;
use ovchat_models::checkpoint::{Element, write_pickle};

/// The number of bytes that are copied from a tensor to the file at a time.
const CHUNK_BYTES: usize = 16 << 20;

/// Writes tensors to a new safetensors file and waits until it is on disk (syncing the folder's
/// entry is up to the caller). Each tensor keeps its dtype; `metadata` goes into the header, where
/// transformers requires `("format", "pt")`.
///
/// The bytes are streamed: no second copy of a tensor is made, except temporarily if it is on
/// another device or not contiguous. As in the safetensors library, tensors are sorted by
/// descending element size, then by name, so that every tensor is aligned; equal tensors produce
/// equal files.
///
/// Fails if the file exists or cannot be written, two tensors have the same name, or a dtype is not
/// supported by the format.
pub fn save_safetensors(
    path: &Path,
    tensors: &[(String, Tensor)],
    metadata: &[(&str, &str)],
) -> Result<(), ModelError> {
    let mut ordered: Vec<&(String, Tensor)> = tensors.iter().collect();
    ordered.sort_by_key(|(name, tensor)| {
        let width = tensor.kind().elt_size_in_bytes();
        (std::cmp::Reverse(width), name)
    });
    let header = header(&ordered, metadata).map_err(|problem| refuse(path, problem))?;
    let in_file = |error: std::io::Error| refuse(path, error.to_string());
    let file = File::create_new(path).map_err(in_file)?;
    let mut out = BufWriter::new(file);
    out.write_all(&(header.len() as u64).to_le_bytes())
        .and_then(|()| out.write_all(&header))
        .map_err(in_file)?;
    for (name, tensor) in ordered {
        write(
            &mut out,
            tensor,
            &|problem| {
                let what = format!("writing `{name}` to {}", path.display());
                torch_error(what, 1, 0, problem)
            },
            &in_file,
        )?;
    }
    let file = out
        .into_inner()
        .map_err(|error| in_file(error.into_error()))?;
    file.sync_all().map_err(in_file)
}

fn header(tensors: &[&(String, Tensor)], metadata: &[(&str, &str)]) -> Result<Vec<u8>, String> {
    let mut entries = serde_json::Map::new();
    if !metadata.is_empty() {
        let words: BTreeMap<_, _> = metadata.iter().copied().collect();
        entries.insert("__metadata__".to_owned(), json!(words));
    }
    let mut begin = 0;
    for (name, tensor) in tensors {
        let kind = tensor.kind();
        let (dtype, element) = Element::NAMES
            .into_iter()
            .find(|(_, element)| self::kind(*element) == kind)
            .ok_or_else(|| format!("`{name}`: safetensors does not support {kind:?}"))?;
        let end = begin + tensor.numel() as u64 * element.bytes();
        let entry = json!({"dtype": dtype, "shape": tensor.size(), "data_offsets": [begin, end]});
        if entries.insert(name.clone(), entry).is_some() {
            return Err(format!("two tensors are named `{name}`"));
        }
        begin = end;
    }
    let mut header = serde_json::Value::Object(entries).to_string().into_bytes();
    // Trailing spaces align the data to eight bytes.
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}

fn write(
    out: &mut impl Write,
    tensor: &Tensor,
    torch_failed: &dyn Fn(&tch::TchError) -> ModelError,
    io_failed: &dyn Fn(std::io::Error) -> ModelError,
) -> Result<(), ModelError> {
    let width = tensor.kind().elt_size_in_bytes();
    let flat = tensor
        .detach()
        .f_to_device(Device::Cpu)
        .and_then(|tensor| tensor.f_contiguous()?.f_view([-1]))
        .map_err(|error| torch_failed(&error))?;
    let count = flat.numel();
    let mut buffer = vec![0; CHUNK_BYTES.min(count * width)];
    for first in (0..count).step_by(CHUNK_BYTES / width) {
        let length = (CHUNK_BYTES / width).min(count - first);
        let bytes = &mut buffer[..length * width];
        flat.f_narrow(0, first as i64, length as i64)
            .and_then(|chunk| chunk.f_copy_data_u8(bytes, length))
            .map_err(|error| torch_failed(&error))?;
        out.write_all(bytes).map_err(io_failed)?;
    }
    Ok(())
}

/// Writes tensors to a new torch file, in float32, as `torch.save` writes a dictionary of them, and
/// waits until it is on disk.
pub fn save_torch(path: &Path, tensors: &[(&str, Tensor)]) -> Result<(), ModelError> {
    let file = File::create_new(path).map_err(|error| refuse(path, error.to_string()))?;
    let mut archive = ZipWriter::new(&file);
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .last_modified_time(DateTime::default());
    let shapes: Vec<(&str, Vec<i64>)> = tensors
        .iter()
        .map(|(name, tensor)| (*name, tensor.size()))
        .collect();
    let mut write = || -> Result<(), zip::result::ZipError> {
        let mut add = |name: &str, bytes: &[u8]| -> Result<(), zip::result::ZipError> {
            archive.start_file(format!("archive/{name}"), options)?;
            Ok(archive.write_all(bytes)?)
        };
        add("data.pkl", &write_pickle(&shapes))?;
        add("byteorder", b"little")?;
        for (number, (_, tensor)) in tensors.iter().enumerate() {
            let values = tensor
                .to_device(Device::Cpu)
                .to_kind(Kind::Float)
                .reshape([-1]);
            let values = Vec::<f32>::try_from(values).expect("float32, one dimension");
            let bytes: Vec<u8> = values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect();
            add(&format!("data/{number}"), &bytes)?;
        }
        add("version", b"3\n")
    };
    write().map_err(|error| refuse(path, error.to_string()))?;
    archive
        .finish()
        .map_err(|error| refuse(path, error.to_string()))?;
    file.sync_all()
        .map_err(|error| refuse(path, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::super::Weights;
    use super::*;

    fn all_kinds() -> Vec<(String, Tensor)> {
        Element::NAMES
            .into_iter()
            .map(|(name, element)| {
                let tensor = Tensor::from_slice2(&[[0.5_f32, -2.0, 3.25], [1.0, 0.0, -7.0]]);
                (name.to_owned(), tensor.to_kind(kind(element)))
            })
            .collect()
    }

    #[test]
    fn what_is_saved_comes_back_with_its_bits_its_kind_and_its_shape() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.safetensors");
        let mut tensors = all_kinds();
        // A non-contiguous tensor, a scalar, an empty one, and one longer than a chunk.
        tensors.push(("turned".to_owned(), tensors[1].1.tr()));
        tensors.push(("scalar".to_owned(), Tensor::from(3_i64)));
        tensors.push((
            "empty".to_owned(),
            Tensor::zeros([0, 4], tch::kind::FLOAT_CPU),
        ));
        let long = Tensor::arange(5_000_001, (Kind::Float, Device::Cpu));
        tensors.push(("long".to_owned(), long));
        save_safetensors(&path, &tensors, &[("format", "pt")]).unwrap();
        let weights = Weights::open_file(&path).unwrap();
        for (name, tensor) in &tensors {
            let read = weights.read(name, Device::Cpu).unwrap();
            assert_eq!(
                (read.kind(), read.size()),
                (tensor.kind(), tensor.size()),
                "{name}"
            );
            assert!(read.equal(tensor), "{name}");
        }
        assert_eq!(weights.names().count(), tensors.len());
    }
}
