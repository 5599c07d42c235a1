//! The safetensors files of a folder by their headers: which tensors there are, and where.
//!
//! A file is eight bytes with the header's length (little endian), a JSON header, and the data. Only
//! headers are read here, so a folder of 15 GB is listed in milliseconds, and a missing or truncated
//! file is found before anything runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::PrepError;
use super::section::Section;

/// The longest header that is believed: what the safetensors library allows.
const HEADER_MAX: u64 = 100_000_000;

/// One tensor, as a header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// `F32`, `F16`, `BF16`, …
    pub dtype: String,
    pub shape: Vec<usize>,
    /// The file that holds it.
    pub path: PathBuf,
    /// Where in the file its first byte is.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// The tensors of a folder, by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shards {
    folder: PathBuf,
    pub tensors: BTreeMap<String, TensorInfo>,
}

/// A tensor's entry in a header.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

impl Shards {
    /// Reads the headers of `model.safetensors`, or of the files that
    /// `model.safetensors.index.json` names.
    pub fn open(folder: &Path) -> Result<Self, PrepError> {
        let mut tensors = BTreeMap::new();
        let index = folder.join("model.safetensors.index.json");
        if index.exists() {
            read_all(&index, folder, &mut tensors)?;
        } else {
            let single = folder.join("model.safetensors");
            if !single.exists() {
                let problem = "holds neither model.safetensors nor model.safetensors.index.json";
                return Err(PrepError::new(folder, problem));
            }
            read_header(&single, &mut tensors)?;
        }
        Ok(Self {
            folder: folder.to_owned(),
            tensors,
        })
    }

    /// A folder that holds these tensors.
    #[cfg(test)]
    pub(super) fn of(folder: &Path, tensors: BTreeMap<String, TensorInfo>) -> Self {
        Self {
            folder: folder.to_owned(),
            tensors,
        }
    }

    /// The tensor of a name that must be there.
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo, PrepError> {
        self.tensors
            .get(name)
            .ok_or_else(|| PrepError::new(&self.folder, format!("has no tensor `{name}`")))
    }

    /// The folder that was read.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The files that hold tensors, in the order of their names.
    pub fn files(&self) -> BTreeSet<&Path> {
        self.tensors
            .values()
            .map(|tensor| tensor.path.as_path())
            .collect()
    }

    /// Bytes of all tensors together.
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|tensor| tensor.length).sum()
    }
}

/// Reads the headers of all files that an index names, and checks that they hold what it says.
fn read_all(
    index: &Path,
    folder: &Path,
    tensors: &mut BTreeMap<String, TensorInfo>,
) -> Result<(), PrepError> {
    let places = weight_map(index)?;
    let files: BTreeSet<&String> = places.values().collect();
    for file in files {
        let path = folder.join(file);
        if !path.exists() {
            let problem = "is missing; model.safetensors.index.json names it";
            return Err(PrepError::new(&path, problem));
        }
        read_header(&path, tensors)?;
    }
    match places.iter().find(|(name, _)| !tensors.contains_key(*name)) {
        Some((name, file)) => {
            let problem =
                format!("has no tensor `{name}`, which model.safetensors.index.json puts there");
            Err(PrepError::new(&folder.join(file), problem))
        }
        None => Ok(()),
    }
}

/// Which file holds which tensor. File names must be plain: an index can't point out of its folder.
fn weight_map(index: &Path) -> Result<BTreeMap<String, String>, PrepError> {
    let file = Section::open(index)?;
    let places = file
        .get("weight_map")
        .and_then(|map| BTreeMap::<String, String>::deserialize(map).ok())
        .filter(|places| !places.is_empty())
        .ok_or_else(|| file.fault("weight_map", "must name a file for each tensor"))?;
    match places
        .values()
        .find(|name| name.contains(['/', '\\']) || name.starts_with('.'))
    {
        Some(name) => Err(file.fault(
            "weight_map",
            format!("names `{name}`, not a plain file name"),
        )),
        None => Ok(places),
    }
}

/// Reads the header of one file and checks that the file is as long as it says.
fn read_header(path: &Path, tensors: &mut BTreeMap<String, TensorInfo>) -> Result<(), PrepError> {
    let io = |error: std::io::Error| PrepError::io(path, &error);
    let mut file = File::open(path).map_err(io)?;
    let total = file.metadata().map_err(io)?.len();
    let truncated = |needed: u64| {
        let problem = format!("is truncated: {total} bytes of at least {needed}; copy it again");
        PrepError::new(path, problem)
    };
    if total < 8 {
        return Err(truncated(8));
    }
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(io)?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_MAX {
        return Err(PrepError::new(path, "is not a safetensors file"));
    }
    let start = 8 + length;
    if total < start {
        return Err(truncated(start));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(io)?;
    let header: Map<String, Value> = serde_json::from_slice(&header)
        .map_err(|error| PrepError::new(path, format!("is not a safetensors file: {error}")))?;

    let mut end = start;
    for (name, value) in header {
        if name == "__metadata__" {
            continue;
        }
        let bad = |problem: &str| PrepError::new(path, format!("tensor `{name}`: {problem}"));
        let entry = Entry::deserialize(&value).map_err(|error| bad(&error.to_string()))?;
        let [first, last] = entry.data_offsets;
        let length = last
            .checked_sub(first)
            .ok_or_else(|| bad("ends before it begins"))?;
        let offset = start
            .checked_add(first)
            .ok_or_else(|| bad("begins beyond any file"))?;
        let last = offset
            .checked_add(length)
            .ok_or_else(|| bad("ends beyond any file"))?;
        let size =
            element_size(&entry.dtype).ok_or_else(|| bad("has a dtype that is not known"))?;
        let bytes = entry
            .shape
            .iter()
            .try_fold(size, |bytes, &side| bytes.checked_mul(side as u64));
        if bytes != Some(length) {
            return Err(bad("its shape and its length do not agree"));
        }
        end = end.max(last);
        let info = TensorInfo {
            dtype: entry.dtype,
            shape: entry.shape,
            path: path.to_owned(),
            offset,
            length,
        };
        if let Some(other) = tensors.insert(name.clone(), info) {
            return Err(bad(&format!("is also in {}", other.path.display())));
        }
    }
    if total < end {
        return Err(truncated(end));
    }
    Ok(())
}

/// Bytes of one element.
fn element_size(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" => 1,
        "U16" | "I16" | "F16" | "BF16" => 2,
        "U32" | "I32" | "F32" => 4,
        "U64" | "I64" | "F64" => 8,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::prep::testbed::write;

    /// Writes a file of float32 tensors, all zero.
    fn shard(path: &Path, tensors: &[(&str, &[usize])]) {
        let mut header = Map::new();
        let mut end = 0;
        for (name, shape) in tensors {
            let length = 4 * shape.iter().product::<usize>();
            let entry =
                json!({"dtype": "F32", "shape": shape, "data_offsets": [end, end + length]});
            header.insert((*name).to_owned(), entry);
            end += length;
        }
        let header = Value::Object(header).to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + end, 0);
        std::fs::write(path, bytes).unwrap();
    }

    fn two_shards() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        shard(&folder.path().join("a.safetensors"), &[("x", &[2, 3])]);
        shard(
            &folder.path().join("b.safetensors"),
            &[("y", &[4]), ("z", &[])],
        );
        let places = json!({"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}});
        write(folder.path(), "model.safetensors.index.json", &places);
        folder
    }

    #[test]
    fn all_shards_are_listed_with_types_shapes_and_places() {
        let folder = two_shards();
        let shards = Shards::open(folder.path()).unwrap();
        assert_eq!(shards.tensors.keys().collect::<Vec<_>>(), ["x", "y", "z"]);
        let z = shards.tensor("z").unwrap();
        assert_eq!(
            (
                z.dtype.as_str(),
                z.length,
                z.path.ends_with("b.safetensors")
            ),
            ("F32", 4, true)
        );
        assert!(z.shape.is_empty());
        assert_eq!((shards.files().len(), shards.bytes()), (2, 24 + 16 + 4));
        let bytes = std::fs::metadata(&z.path).unwrap().len();
        assert_eq!(z.offset + z.length, bytes);
    }

    #[test]
    fn a_missing_shard_is_named() {
        let folder = two_shards();
        std::fs::remove_file(folder.path().join("b.safetensors")).unwrap();
        let complaint = Shards::open(folder.path()).unwrap_err();
        assert!(complaint.path.ends_with("b.safetensors"));
        assert!(complaint.problem.starts_with("is missing"));
    }

    #[test]
    fn a_truncated_shard_is_named_wherever_it_ends() {
        let folder = two_shards();
        let path = folder.path().join("b.safetensors");
        let whole = std::fs::read(&path).unwrap();
        for length in [0, 7, 8, 20, whole.len() - 1] {
            std::fs::write(&path, &whole[..length]).unwrap();
            let complaint = Shards::open(folder.path()).unwrap_err();
            assert_eq!(complaint.path, path);
            assert!(
                complaint.problem.contains("truncated"),
                "{length}: {complaint}"
            );
        }
    }

    #[test]
    fn a_missing_tensor_is_named_with_the_file_that_should_hold_it() {
        let folder = two_shards();
        shard(&folder.path().join("b.safetensors"), &[("y", &[4])]);
        let complaint = Shards::open(folder.path()).unwrap_err();
        assert!(complaint.path.ends_with("b.safetensors"));
        assert!(complaint.problem.contains("no tensor `z`"), "{complaint}");
    }

    #[test]
    fn an_index_can_not_point_out_of_its_folder() {
        let folder = two_shards();
        let places = json!({"weight_map": {"x": "../a.safetensors"}});
        write(folder.path(), "model.safetensors.index.json", &places);
        let complaint = Shards::open(folder.path()).unwrap_err();
        assert!(
            complaint.problem.contains("not a plain file name"),
            "{complaint}"
        );
    }

    #[test]
    fn a_header_that_lies_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let header = r#"{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#;
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend([0; 8]);
        std::fs::write(&path, &bytes).unwrap();
        let complaint = Shards::open(folder.path()).unwrap_err();
        assert!(complaint.problem.contains("do not agree"), "{complaint}");
        std::fs::write(&path, [255; 64]).unwrap();
        let complaint = Shards::open(folder.path()).unwrap_err();
        assert_eq!(complaint.problem, "is not a safetensors file");
    }

    #[test]
    fn a_folder_without_weights_is_said_to_hold_none() {
        let folder = tempfile::tempdir().unwrap();
        let complaint = Shards::open(folder.path()).unwrap_err();
        assert!(complaint.problem.contains("neither model.safetensors nor"));
    }
}
