//! Failures of reading a source.

use std::path::Path;

use super::super::work::Failure;

/// The maximum size of a record, in bytes, which bounds the memory for a record that never ends.
pub const RECORD_MAX: u64 = 64 << 20;

/// The failure at `place` of a file.
pub fn input(path: &Path, place: &str, problem: String) -> Failure {
    Failure::Input {
        path: path.to_owned(),
        place: place.to_owned(),
        problem,
    }
}

/// The failure of a file without records.
pub fn empty(path: &Path) -> Failure {
    input(path, "", "no records found".to_owned())
}
