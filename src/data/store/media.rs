//! The images and videos of a run, which belong to no table version.

use std::path::Path;

use super::{Images, Manifest, StoreError, Videos};
use crate::tables::Video;

/// Indexes of a run's images and videos.
pub struct Media {
    pub images: Images,
    pub videos: Videos,
}

impl Media {
    pub fn open(root: &Path, manifest: &Manifest) -> Result<Self, StoreError> {
        Ok(Self {
            images: Images::open(root, &manifest.images)?,
            videos: Videos::open(root, &manifest.videos)?,
        })
    }

    /// Returns the video with a key, and whether all of its frames are there.
    pub fn video(&mut self, row_key: &str) -> Result<Option<(Video, bool)>, StoreError> {
        let found = self.videos.find(row_key)?;
        Ok(found.map(|video| {
            let mut frames = video.frame_ids.iter();
            let is_whole = frames.all(|id| self.images.contains(id));
            (video, is_whole)
        }))
    }
}
