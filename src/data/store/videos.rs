//! Storage of a run's videos: one row for each file and choice of its frames. Like images, videos are
//! never removed.

use std::path::Path;

use super::{FileRecord, Lookup, StoreError, TableWriter};
use crate::tables::{Row, Video};

/// An index of videos by the file and the settings that choose its frames.
pub struct Videos {
    lookup: Lookup,
}

impl Videos {
    pub fn open(root: &Path, files: &[FileRecord]) -> Result<Self, StoreError> {
        let files = files.iter().map(|file| root.join(&file.file)).collect();
        Ok(Self {
            lookup: Lookup::open(files, "row_key")?,
        })
    }

    /// Returns the video with this key.
    pub fn find(&mut self, row_key: &str) -> Result<Option<Video>, StoreError> {
        self.lookup.row(row_key)
    }

    /// Writes new videos. The returned records go into the manifest; then [`Videos::added`] is
    /// called.
    pub fn write(
        root: &Path,
        number: usize,
        videos: &[Video],
    ) -> Result<Vec<FileRecord>, StoreError> {
        let name = format!("videos/part-{number:05}");
        let mut writer = TableWriter::new(root, &name, Video::schema(), &[]);
        writer.write(&Video::to_batch(videos))?;
        writer.finish()
    }

    /// Adds a committed file to the index.
    pub fn added(&mut self, root: &Path, file: &FileRecord) -> Result<(), StoreError> {
        self.lookup.add_file(root.join(&file.file))
    }
}
