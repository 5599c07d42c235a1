//! Storage of a run: a folder of Parquet files and a manifest.
//!
//! `runs/<run>/{manifest.json, <table>/round-2/part-00003.parquet, <static
//! table>/part-00000.parquet, images/, videos/, rejects/, checkpoints/round-2/, .cache/}`. Only files listed
//! in the manifest are part of the run; a file on disk that is not listed is ignored. Files are
//! written under a temporary name that readers ignore, synced and renamed, and then committed to
//! the manifest.

mod atomic;
mod error;
mod fingerprint;
mod folder;
mod footer;
mod images;
mod key;
mod labels;
mod lease;
mod lock;
mod lookup;
mod manifest;
mod media;
mod pages;
mod parquet;
mod place;
mod positions;
mod rates;
mod rebuild;
mod record;
mod sealed;
mod versions;
mod videos;

pub use atomic::{copy_folder, create_folder, sync_folder, write_atomically, write_folder};
pub use error::StoreError;
pub use fingerprint::{Fingerprints, Stamp, hash_file};
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
pub use media::Media;
pub use parquet::{
    BLOCK, ParquetStream, TableReader, TableWriter, read_file, schema_of_file, unstorable,
};
pub use place::Place;
pub use positions::rows_at;
pub use rates::Rates;
pub use rebuild::Flaw;
pub use videos::Videos;
