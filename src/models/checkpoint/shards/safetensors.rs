//! The safetensors format: a JSON header with the location of each tensor, followed by the data.
//!
//! Layout (huggingface/safetensors, README): eight bytes of little-endian header length, the header
//! `{"name": {"dtype": .., "shape": [..], "data_offsets": [begin, end]}, "__metadata__": {..}}`,
//! and the data, to whose start the offsets are relative.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use serde::Deserialize;

use super::tensor::{Element, TensorLocation};

/// Maximum length of the header, which is the limit of the safetensors library.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// The header's entry of one tensor.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<i64>,
    /// First byte, and the byte after the last, counted from the end of the header.
    data_offsets: [u64; 2],
}

/// Reads the tensor locations of a file, and verifies that all of them are inside it.
pub(super) fn places(file: &File) -> Result<Vec<(String, TensorLocation)>, String> {
    let file_bytes = file.metadata().map_err(|error| error.to_string())?.len();
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0)
        .map_err(|error| error.to_string())?;
    let header_bytes = u64::from_le_bytes(length);
    let data_start = 8 + header_bytes;
    if header_bytes > HEADER_BYTES_MAX || data_start > file_bytes {
        return Err(format!(
            "truncated or corrupt: the header length is {header_bytes} bytes, but the file has \
             {file_bytes}"
        ));
    }
    let mut header = vec![0; header_bytes as usize];
    file.read_exact_at(&mut header, 8)
        .map_err(|error| error.to_string())?;
    let mut entries: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&header)
        .map_err(|error| format!("not a safetensors header: {error}"))?;
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

fn place(entry: &Entry, data_start: u64, file_bytes: u64) -> Result<TensorLocation, String> {
    let element = Element::named(&entry.dtype)
        .ok_or_else(|| format!("the dtype `{}` is not supported", entry.dtype))?;
    let strides = TensorLocation::row_major(&entry.shape);
    let span = strides
        .as_ref()
        .and_then(|strides| TensorLocation::span(&entry.shape, strides));
    let bytes = span.and_then(|span| span.checked_mul(element.bytes()));
    let [begin, end] = entry.data_offsets;
    let (Some(strides), Some(span)) = (strides, span) else {
        return Err(format!("invalid shape {:?}", entry.shape));
    };
    if end.checked_sub(begin) != bytes {
        return Err(format!(
            "the shape {:?} does not fit the byte range {begin} to {end}",
            entry.shape
        ));
    }
    if end > file_bytes - data_start {
        return Err(format!(
            "the file is truncated: this tensor ends {} bytes after the end of the file",
            end - (file_bytes - data_start)
        ));
    }
    Ok(TensorLocation {
        element,
        shape: entry.shape.clone(),
        strides,
        start: data_start + begin,
        span,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::Shards;

    fn error(path: &Path) -> String {
        Shards::open_file(path).unwrap_err().to_string()
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
            "invalid shape",
        );
        check(
            &entry("F32", &format!("[{huge}]"), "[0, 4]"),
            "does not fit",
        );
        check(&entry("F32", "[-1]", "[0, 4]"), "invalid shape");
        check(&entry("F32", "[1]", "[4, 0]"), "does not fit");
        check(
            &entry("F32", "[1000000000]", "[0, 4000000000]"),
            "truncated",
        );
        check(&entry("F4", "[1]", "[0, 4]"), "`F4` is not supported");
        check("{\"a\": 3}", "`a`");
        check("{nonsense", "not a safetensors header");
    }

    #[test]
    fn a_truncated_file_names_itself_and_the_tensor_that_is_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cut.safetensors");
        crate::test_util::shard(&path, &[("a", &[3]), ("b", &[2])]);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let text = error(&path);
        assert!(
            text.contains("cut.safetensors: `b`: the file is truncated"),
            "{text}"
        );
        std::fs::write(&path, &bytes[..40]).unwrap();
        assert!(error(&path).contains("truncated or corrupt"));
    }
}
