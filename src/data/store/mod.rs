//! Where tables lie: a run is a folder of Parquet and a manifest.
//!
//! `runs/<run>/{manifest.json, <table>/round-2/part-00003.parquet, <static table>/part-00000.parquet,
//! images/, rejects/, checkpoints/round-2/, .cache/}`. A file's existence proves nothing: only what
//! the manifest lists is part of the run. Files are written under a name that no reader looks at,
//! synced, and renamed; then the manifest takes them in.

mod atomic;
mod error;
mod fingerprint;
mod folder;
mod footer;
mod images;
mod key;
mod labels;
mod lock;
mod lookup;
mod manifest;
mod pages;
mod parquet;
mod place;
mod rates;
mod rebuild;
mod sealed;
mod versions;

pub use atomic::{copy_folder, create_folder, sync_folder, write_atomically, write_folder};
pub use error::StoreError;
pub use fingerprint::{Fingerprints, hash_file};
pub use folder::{Opened, RunFolder, TableFile, files_in};
pub use images::Images;
pub use key::{Key, digest};
pub use labels::{LABELS, LabelFiles, LabelLine, LabelTask, LabelVerdict, LabelWriter, NUMBER_MAX};
pub use lock::{Lock, lock_holder};
pub use lookup::{Lookup, Name};
pub use manifest::{
    ArchivedTable, CheckpointRecord, Event, Expected, FileRecord, Fork, Manifest, PartRecord,
    StateRecord, TableVersion, Took,
};
pub use parquet::{
    BLOCK, ParquetStream, TableReader, TableWriter, read_file, schema_of_file, unstorable,
};
pub use place::Place;
pub use rates::Rates;
pub use rebuild::Flaw;
