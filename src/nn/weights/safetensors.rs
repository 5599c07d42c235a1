//! The safetensors format: a JSON header that says where each tensor lies, then the bytes.
//!
//! Layout (huggingface/safetensors, README): eight bytes of little-endian header length, the header
//! `{"name": {"dtype": .., "shape": [..], "data_offsets": [begin, end]}, "__metadata__": {..}}`, and
//! the data, to whose start the offsets are relative.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::{Place, refuse};
use crate::models::ModelError;
use crate::nn::device::torch_error;

/// The longest header that is read; the limit of the safetensors library.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// Bytes that are copied from a tensor to the file at a time.
const CHUNK_BYTES: usize = 16 << 20;

/// What the header says of one tensor.
#[derive(Serialize, Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<i64>,
    /// First byte, and the byte after the last, counted from the end of the header.
    data_offsets: [u64; 2],
}

/// Reads where the tensors of a file lie, and proves that all of them are inside it.
pub(super) fn places(file: &File) -> Result<Vec<(String, Place)>, String> {
    let file_bytes = file.metadata().map_err(|error| error.to_string())?.len();
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0)
        .map_err(|error| error.to_string())?;
    let header_bytes = u64::from_le_bytes(length);
    let data_start = 8 + header_bytes;
    if header_bytes > HEADER_BYTES_MAX || data_start > file_bytes {
        return Err(format!(
            "truncated or damaged: its header should take {header_bytes} bytes, the file has \
             {file_bytes}"
        ));
    }
    let mut header = vec![0; header_bytes as usize];
    file.read_exact_at(&mut header, 8)
        .map_err(|error| error.to_string())?;
    let mut entries: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&header)
        .map_err(|error| format!("the header is not a safetensors header: {error}"))?;
    entries.remove("__metadata__");
    let mut places = Vec::with_capacity(entries.len());
    for (name, value) in entries {
        let place = serde_json::from_value(value)
            .map_err(|error| error.to_string())
            .and_then(|entry| place(&entry, data_start, file_bytes))
            .map_err(|problem| format!("`{name}`: {problem}"))?;
        places.push((name, place));
    }
    Ok(places)
}

fn place(entry: &Entry, data_start: u64, file_bytes: u64) -> Result<Place, String> {
    let kind = kind(&entry.dtype)
        .ok_or_else(|| format!("the element type `{}` is not supported", entry.dtype))?;
    let strides = Place::row_major(&entry.shape);
    let span = strides
        .as_ref()
        .and_then(|strides| Place::span(&entry.shape, strides));
    let bytes = span.and_then(|span| span.checked_mul(kind.elt_size_in_bytes() as u64));
    let [begin, end] = entry.data_offsets;
    let (Some(strides), Some(span)) = (strides, span) else {
        return Err(format!("the shape {:?} is impossible", entry.shape));
    };
    if end.checked_sub(begin) != bytes {
        return Err(format!(
            "the shape {:?} does not fit into the bytes {begin} to {end}",
            entry.shape
        ));
    }
    if end > file_bytes - data_start {
        return Err(format!(
            "the file is truncated: this tensor ends {} bytes after the file's end",
            end - (file_bytes - data_start)
        ));
    }
    Ok(Place {
        kind,
        shape: entry.shape.clone(),
        strides,
        start: data_start + begin,
        span,
    })
}

/// Element types and their names in the header.
const KINDS: [(&str, Kind); 10] = [
    ("F64", Kind::Double),
    ("F32", Kind::Float),
    ("F16", Kind::Half),
    ("BF16", Kind::BFloat16),
    ("I64", Kind::Int64),
    ("I32", Kind::Int),
    ("I16", Kind::Int16),
    ("I8", Kind::Int8),
    ("U8", Kind::Uint8),
    ("BOOL", Kind::Bool),
];

fn kind(dtype: &str) -> Option<Kind> {
    let (_, kind) = KINDS.iter().find(|(name, _)| *name == dtype)?;
    Some(*kind)
}

/// Writes tensors to a new safetensors file and waits until it is on disk (the folder's own entry
/// is the caller's to sync). Each tensor keeps its element type; `metadata` goes into the header,
/// where transformers wants `("format", "pt")`.
///
/// The bytes are streamed: no second copy of a tensor is made, except in passing when it lies on
/// another device or is not contiguous. As in the safetensors library, tensors with wide elements
/// come first, then by name, so that every tensor is aligned; equal tensors make equal files.
///
/// Fails when the file exists or can't be written, two tensors have one name, or one has an element
/// type that the format lacks.
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
        entries.insert("__metadata__".to_owned(), serde_json::json!(words));
    }
    let mut begin = 0;
    for (name, tensor) in tensors {
        let kind = tensor.kind();
        let (dtype, _) = KINDS
            .iter()
            .find(|(_, known)| *known == kind)
            .ok_or_else(|| format!("`{name}`: {kind:?} is not an element type of safetensors"))?;
        let end = begin + (tensor.numel() * kind.elt_size_in_bytes()) as u64;
        let entry = Entry {
            dtype: (*dtype).to_owned(),
            shape: tensor.size(),
            data_offsets: [begin, end],
        };
        if entries
            .insert(name.clone(), serde_json::json!(entry))
            .is_some()
        {
            return Err(format!("two tensors are named `{name}`"));
        }
        begin = end;
    }
    let mut header = serde_json::Value::Object(entries).to_string().into_bytes();
    // Spaces at the end align the data to eight bytes.
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

#[cfg(test)]
mod tests {
    use super::super::Weights;
    use super::*;

    fn all_kinds() -> Vec<(String, Tensor)> {
        KINDS
            .iter()
            .map(|(name, kind)| {
                let tensor = Tensor::from_slice2(&[[0.5_f32, -2.0, 3.25], [1.0, 0.0, -7.0]]);
                ((*name).to_owned(), tensor.to_kind(*kind))
            })
            .collect()
    }

    fn error(path: &Path) -> String {
        Weights::open_file(path).unwrap_err().to_string()
    }

    #[test]
    fn what_is_saved_comes_back_with_its_bits_its_kind_and_its_shape() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.safetensors");
        let mut tensors = all_kinds();
        // Not contiguous, a scalar, an empty one, and one longer than a chunk.
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

    #[test]
    fn a_truncated_file_names_itself_and_the_tensor_that_is_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cut.safetensors");
        save_safetensors(&path, &all_kinds(), &[]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let text = error(&path);
        assert!(
            text.contains("cut.safetensors: `U8`: the file is truncated"),
            "{text}"
        );
        std::fs::write(&path, &bytes[..40]).unwrap();
        assert!(error(&path).contains("truncated or damaged"));
    }

    #[test]
    fn hostile_headers_are_refused_without_allocating_what_they_claim() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.safetensors");
        let check = |header: &str, expected: &str| {
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            std::fs::write(&path, bytes).unwrap();
            let text = error(&path);
            assert!(text.contains(expected), "{text}");
        };
        let entry = |dtype: &str, shape: &str, offsets: &str| {
            format!(
                r#"{{"a": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}"#
            )
        };
        let huge = i64::MAX.to_string();
        check(
            &entry("F32", &format!("[{huge}, {huge}]"), "[0, 4]"),
            "impossible",
        );
        check(
            &entry("F32", &format!("[{huge}]"), "[0, 4]"),
            "does not fit",
        );
        check(&entry("F32", "[-1]", "[0, 4]"), "impossible");
        check(&entry("F32", "[1]", "[4, 0]"), "does not fit");
        check(
            &entry("F32", "[1000000000]", "[0, 4000000000]"),
            "truncated",
        );
        check(&entry("F4", "[1]", "[0, 4]"), "`F4` is not supported");
        check("{\"a\": 3}", "`a`");
        check("{nonsense", "not a safetensors header");
    }
}
