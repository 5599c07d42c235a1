//! Torch files (`.bin`, `.pt`): a zip archive with a pickle that describes the tensors and one
//! uncompressed file per storage.
//!
//! Layout (torch `caffe2/serialize/inline_container.cc`): a single top-level folder of any name
//! contains `data.pkl`, `byteorder` (`little`, since torch 2.1) and `data/0`, `data/1`, … A storage
//! may be shared by several tensors, and a tensor may have any strides in its storage.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;

use zip::{CompressionMethod, ZipArchive};

use super::pickle::{self, PickledTensor};
use super::tensor::TensorLocation;

/// Maximum size of the pickle. A model of 720 tensors has one of 100 kB.
const PICKLE_BYTES_MAX: u64 = 256 << 20;

/// Reads the tensor locations of a file, and verifies that all of them are inside it.
pub(super) fn places(file: &File) -> Result<Vec<(String, TensorLocation)>, String> {
    let file_bytes = file.metadata().map_err(|error| error.to_string())?.len();
    let mut archive = ZipArchive::new(file).map_err(|error| {
        format!(
            "truncated or corrupt: cannot read the zip directory at the end of the file: {error}"
        )
    })?;
    let root = archive
        .file_names()
        .find_map(|name| Some(name.ok()?.strip_suffix("data.pkl")?.to_owned()))
        .ok_or("not a torch file: the zip archive contains no `data.pkl`")?;
    if read_entry(&mut archive, &format!("{root}byteorder"))?.is_some_and(|order| order == b"big") {
        return Err("big-endian torch files are not supported".to_owned());
    }
    let pickle = read_entry(&mut archive, &format!("{root}data.pkl"))?
        .ok_or("the archive contains no `data.pkl`")?;
    let mut storages = HashMap::new();
    let mut places = Vec::new();
    for (name, tensor) in pickle::read(&pickle)? {
        let bytes = match storages.get(&tensor.storage) {
            Some(bytes) => bytes,
            None => storages.entry(tensor.storage.clone()).or_insert(storage(
                &mut archive,
                &root,
                &tensor.storage,
                file_bytes,
            )?),
        };
        let place = place(&tensor, bytes).map_err(|problem| format!("`{name}`: {problem}"))?;
        places.push((name, place));
    }
    Ok(places)
}

/// Reads a small file of the archive; `None` if it does not exist.
fn read_entry(archive: &mut ZipArchive<&File>, name: &str) -> Result<Option<Vec<u8>>, String> {
    let entry = match archive.by_name(name) {
        Ok(entry) => entry,
        Err(zip::result::ZipError::FileNotFound) => return Ok(None),
        Err(error) => return Err(format!("`{name}`: {error}")),
    };
    let mut content = Vec::new();
    entry
        .take(PICKLE_BYTES_MAX + 1)
        .read_to_end(&mut content)
        .map_err(|error| format!("`{name}`: {error}"))?;
    if content.len() as u64 > PICKLE_BYTES_MAX {
        return Err(format!("`{name}` is larger than {PICKLE_BYTES_MAX} bytes"));
    }
    Ok(Some(content))
}

/// Returns the byte range of the file that contains a storage.
fn storage(
    archive: &mut ZipArchive<&File>,
    root: &str,
    key: &str,
    file_bytes: u64,
) -> Result<Range<u64>, String> {
    let name = format!("{root}data/{key}");
    let entry = archive
        .by_name(&name)
        .map_err(|error| format!("`{name}`: {error}"))?;
    if entry.compression() != CompressionMethod::Stored {
        return Err(format!(
            "`{name}` is compressed, but torch writes storages uncompressed"
        ));
    }
    let start = entry.data_start();
    start
        .and_then(|start| Some((start, start.checked_add(entry.size())?)))
        .filter(|(_, end)| *end <= file_bytes)
        .map(|(start, end)| start..end)
        .ok_or_else(|| format!("truncated: `{name}` extends past the end of the file"))
}

fn place(tensor: &PickledTensor, storage: &Range<u64>) -> Result<TensorLocation, String> {
    let width = tensor.element.bytes();
    let refuse = |problem: &str| {
        let (shape, strides) = (&tensor.shape, &tensor.strides);
        let storage = &tensor.storage;
        format!("the shape {shape:?} with the strides {strides:?} {problem} `data/{storage}`")
    };
    let impossible = || refuse("is invalid in");
    let span = TensorLocation::span(&tensor.shape, &tensor.strides).ok_or_else(impossible)?;
    let offset = u64::try_from(tensor.offset).map_err(|_| impossible())?;
    let elements = (storage.end - storage.start) / width;
    if offset.checked_add(span).is_none_or(|end| end > elements) {
        return Err(refuse("extends past the end of"));
    }
    // A stride of 0 repeats elements, so a small file could require any amount of memory.
    let sizes = || tensor.shape.iter().copied();
    let count = sizes().try_fold(1_i64, i64::checked_mul);
    if count.is_none_or(|count| count as u64 > elements) && !sizes().any(|size| size == 0) {
        return Err(refuse(
            "repeats elements (make the tensor contiguous in Python and save it again) of",
        ));
    }
    Ok(TensorLocation {
        element: tensor.element,
        shape: tensor.shape.clone(),
        strides: tensor.strides.clone(),
        start: storage.start + offset * width,
        span,
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::Path;

    use super::super::Shards;
    use super::*;

    /// Writes a torch file as `torch.save` would: its pickle, then `data/0`, `data/1`, …
    fn write_archive(path: &Path, pickle: &[u8], storages: &[&[u8]], byteorder: &str) {
        let mut archive = zip::ZipWriter::new(File::create(path).unwrap());
        let stored =
            zip::write::SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        let mut add = |name: String, content: &[u8]| {
            archive.start_file(name, stored).unwrap();
            archive.write_all(content).unwrap();
        };
        add("model/data.pkl".to_owned(), pickle);
        add("model/byteorder".to_owned(), byteorder.as_bytes());
        for (key, content) in storages.iter().enumerate() {
            add(format!("model/data/{key}"), content);
        }
        archive.finish().unwrap();
    }

    /// Returns the pickle of `{name: tensor}` over the float32 storage 0.
    fn pickle_of(name: &str, offset: u8, shape: &[u8], strides: &[u8]) -> Vec<u8> {
        let text = |text: &str| {
            let mut bytes = vec![b'X'];
            bytes.extend((text.len() as u32).to_le_bytes());
            bytes.extend(text.as_bytes());
            bytes
        };
        let tuple = |items: &[u8]| {
            let mut bytes = vec![b'('];
            for item in items {
                bytes.extend([b'K', *item]);
            }
            bytes.push(b't');
            bytes
        };
        [
            b"\x80\x02}".to_vec(),
            text(name),
            b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
            text("storage"),
            b"ctorch\nFloatStorage\n".to_vec(),
            text("0"),
            text("cpu"),
            b"K\x06tQK".to_vec(),
            vec![offset],
            tuple(shape),
            tuple(strides),
            b"\x89ccollections\nOrderedDict\n)RtRs.".to_vec(),
        ]
        .concat()
    }

    fn floats(numbers: &[f32]) -> Vec<u8> {
        numbers
            .iter()
            .flat_map(|number| number.to_le_bytes())
            .collect()
    }

    fn open(pickle: &[u8], storage: &[u8], byteorder: &str) -> Result<Shards, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("reward_head");
        write_archive(&path, pickle, &[storage], byteorder);
        Shards::open_file(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn a_turned_tensor_keeps_its_steps() {
        let pickle = pickle_of("a", 1, &[3, 2], &[1, 3]);
        let shards = open(&pickle, &floats(&[0.0; 7]), "little").unwrap();
        let (_, a) = shards.place("a").unwrap();
        assert_eq!((a.strides.as_slice(), a.span), ([1, 3].as_slice(), 6));
    }

    #[test]
    fn a_tensor_that_is_larger_than_its_storage_is_refused() {
        let storage = floats(&[0.0; 6]);
        for (offset, shape, strides) in [
            (1, [3, 2], [2, 1]),
            (0, [3, 2], [3, 1]),
            (0, [1, 255], [0, 255]),
        ] {
            let error = open(
                &pickle_of("a", offset, &shape, &strides),
                &storage,
                "little",
            )
            .unwrap_err();
            assert!(
                error.contains("extends past the end of `data/0`"),
                "{error}"
            );
        }
        let error = open(&pickle_of("a", 0, &[200, 200], &[0, 0]), &storage, "little").unwrap_err();
        assert!(error.contains("repeats elements"), "{error}");
        let error = open(&pickle_of("a", 0, &[6], &[]), &storage, "little").unwrap_err();
        assert!(error.contains("is invalid in"), "{error}");
    }

    #[test]
    fn foreign_archives_are_refused_in_words() {
        let exploit = b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.";
        let error = open(exploit, &[], "little").unwrap_err();
        let big = open(&pickle_of("a", 0, &[1], &[1]), &[0; 4], "big").unwrap_err();
        assert!(
            error.contains("reward_head: contains `posix.system`"),
            "{error}"
        );
        assert!(big.contains("big-endian"), "{big}");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("some.zip");
        let mut archive = zip::ZipWriter::new(File::create(&path).unwrap());
        archive
            .start_file("a", zip::write::SimpleFileOptions::default())
            .unwrap();
        archive.finish().unwrap();
        let error = Shards::open_file(&path).unwrap_err().to_string();
        assert!(error.contains("no `data.pkl`"), "{error}");
    }

    #[test]
    fn an_archive_cut_anywhere_is_an_error_and_never_a_panic() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cut.bin");
        write_archive(
            &path,
            &pickle_of("a", 0, &[6], &[1]),
            &[&floats(&[0.0; 6])],
            "little",
        );
        let bytes = std::fs::read(&path).unwrap();
        for length in 0..bytes.len() {
            std::fs::write(&path, &bytes[..length]).unwrap();
            assert!(
                Shards::open_file(&path).is_err(),
                "{length} of {} bytes",
                bytes.len()
            );
        }
    }
}
