//! Storage of a run's images, identified by content. Images are never removed: an image that no
//! current prompt uses may be used again later, and dropping it would save little.

use std::path::Path;
use std::sync::Arc;

use super::{FileRecord, Lookup, StoreError, TableWriter, digest};
use crate::tables::{Image, Row};
use ovchat_io::files;

/// An index of images by content hash.
pub struct Images {
    lookup: Lookup,
}

impl Images {
    pub fn open(root: &Path, files: &[FileRecord]) -> Result<Self, StoreError> {
        let files = files.iter().map(|file| root.join(&file.file)).collect();
        Ok(Self {
            lookup: Lookup::open(files, "image_id")?,
        })
    }

    pub fn contains(&self, image_id: &str) -> bool {
        self.lookup.contains(image_id)
    }

    /// Writes new images. The returned records go into the manifest; then [`Images::added`] is
    /// called.
    pub fn write(
        root: &Path,
        number: usize,
        images: &[Image],
    ) -> Result<Vec<FileRecord>, StoreError> {
        let mut writer = TableWriter::new(
            root,
            &format!("images/part-{number:05}"),
            Image::schema(),
            &[],
        );
        for image in images {
            // One row at a time, so that row groups are split by bytes: images may be large.
            writer.write(&Image::to_batch(std::slice::from_ref(image)))?;
        }
        writer.finish()
    }

    /// Adds a committed file to the index.
    pub fn added(&mut self, root: &Path, file: &FileRecord) -> Result<(), StoreError> {
        self.lookup.add_file(root.join(&file.file))
    }

    /// Returns the bytes of an image, from the run or, with `keep_images: reference`, from its
    /// original path.
    pub fn bytes(&mut self, image_id: &str) -> Result<Arc<[u8]>, StoreError> {
        let fault = |problem: String| StoreError::Image {
            id: image_id.to_owned(),
            problem,
        };
        let row: Image = self
            .lookup
            .row(image_id)?
            .ok_or_else(|| fault("not found in this run".to_owned()))?;
        if let Some(bytes) = row.image.bytes {
            if digest(&bytes) != image_id {
                let path = self.lookup.file_of(image_id).expect("it was just read");
                return Err(StoreError::Corrupt {
                    path: path.to_owned(),
                });
            }
            return Ok(bytes.into());
        }
        let path = row
            .image
            .path
            .ok_or_else(|| fault("neither its bytes nor its path are stored".to_owned()))?;
        let bytes =
            files::read(Path::new(&path)).map_err(StoreError::io("read", Path::new(&path)))?;
        if digest(&bytes) != image_id {
            return Err(fault(format!(
                "{path} has changed since it was loaded; restore the file, or start a new run with `keep_images: bytes`"
            )));
        }
        Ok(bytes.into())
    }
}
