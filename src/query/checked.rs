//! File reads with checksum verification: a query never computes with corrupt data.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use datafusion::object_store::local::LocalFileSystem;
use datafusion::object_store::path::Path;
use datafusion::object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload,
    ObjectMeta, ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use futures::StreamExt;
use futures::stream::{self, BoxStream};

use ovchat_data::store::{BLOCK, StoreError, TableFile};

/// The local file system, with a CRC-32 for each block of some of its files.
#[derive(Debug)]
pub struct CheckedFiles {
    inner: LocalFileSystem,
    files: HashMap<Path, TableFile>,
    /// Blocks that passed verification.
    intact: Mutex<HashSet<(Path, u64)>>,
    /// The corrupt file, once one was found.
    corrupt: Arc<Mutex<Option<PathBuf>>>,
}

impl CheckedFiles {
    pub fn new<'f>(files: impl IntoIterator<Item = &'f TableFile>) -> Self {
        let files = files.into_iter().filter(|file| !file.crc32.is_empty());
        let files = files.filter_map(|file| {
            let path = std::path::absolute(&file.path).ok()?;
            Some((Path::from_absolute_path(path).ok()?, file.clone()))
        });
        Self {
            inner: LocalFileSystem::new(),
            files: files.collect(),
            intact: Mutex::default(),
            corrupt: Arc::default(),
        }
    }

    /// Returns the corrupt file that made a query fail, once one has.
    pub fn corrupt(&self) -> Arc<Mutex<Option<PathBuf>>> {
        Arc::clone(&self.corrupt)
    }

    /// Reads a range of a file after verifying all blocks that it touches.
    fn read(&self, location: &Path, file: &TableFile, range: &Range<u64>) -> Result<Bytes> {
        let failed = |error: io::Error| Error::Generic {
            store: "run",
            source: StoreError::io("read", &file.path)(error).into(),
        };
        let opened = File::open(&file.path).map_err(failed)?;
        let length = opened.metadata().map_err(failed)?.len();
        if length.div_ceil(BLOCK) != file.crc32.len() as u64 {
            return Err(self.found_corrupt(file));
        }
        let blocks = range.start / BLOCK..range.end.min(length).div_ceil(BLOCK);
        let is_intact = {
            let intact = self.intact.lock().expect("no panic while locked");
            let mut blocks = blocks.clone();
            blocks.all(|block| intact.contains(&(location.clone(), block)))
        };
        let read = if is_intact {
            range.start..range.end.min(length)
        } else {
            blocks.start * BLOCK..(blocks.end * BLOCK).min(length)
        };
        let mut bytes = vec![0; (read.end - read.start) as usize];
        opened
            .read_exact_at(&mut bytes, read.start)
            .map_err(failed)?;
        if is_intact {
            return Ok(bytes.into());
        }
        for (block, bytes) in blocks.clone().zip(bytes.chunks(BLOCK as usize)) {
            if crc32fast::hash(bytes) != file.crc32[block as usize] {
                return Err(self.found_corrupt(file));
            }
        }
        let mut intact = self.intact.lock().expect("no panic while locked");
        intact.extend(blocks.map(|block| (location.clone(), block)));
        let start = (range.start - read.start) as usize;
        let end = (range.end.min(length) - read.start) as usize;
        Ok(Bytes::from(bytes).slice(start..end))
    }

    fn found_corrupt(&self, file: &TableFile) -> Error {
        let path = file.path.clone();
        *self.corrupt.lock().expect("no panic while locked") = Some(path.clone());
        Error::Generic {
            store: "run",
            source: StoreError::Corrupt { path }.into(),
        }
    }
}

impl fmt::Display for CheckedFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CheckedFiles")
    }
}

#[async_trait]
impl ObjectStore for CheckedFiles {
    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let is_head = options.head;
        let found = self.inner.get_opts(location, options).await?;
        let Some(file) = self.files.get(location).filter(|_| !is_head) else {
            return Ok(found);
        };
        let bytes = self.read(location, file, &found.range)?;
        let payload = stream::once(async move { Ok(bytes) }).boxed();
        Ok(GetResult {
            payload: GetResultPayload::Stream(payload),
            ..found
        })
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let Some(file) = self.files.get(location) else {
            return self.inner.get_ranges(location, ranges).await;
        };
        let mut ranges = ranges.iter();
        ranges.try_fold(Vec::new(), |mut all, range| {
            all.push(self.read(location, file, range)?);
            Ok(all)
        })
    }

    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        self.inner.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
