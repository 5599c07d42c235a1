//! Opening of the images and videos that records name or hold.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use super::allowed_folders::{AllowedFolders, Place};
use super::fields::Fields;
use super::records::read_fields;
use super::unread::own_name;
use super::video::{DecodedVideo, Ffmpeg, VideoFault, VideoSettings, decode_video};
use super::work::{Failure, Record};
use ovchat_data::store::{Media, Stamp, StoreError, digest, hash_file};
use ovchat_data::tables::{Image, ImageFile, PromptVideo};
use ovchat_io::files;
use ovchat_models::RowFault;
use ovchat_models::preprocess::{Probe, decode, probe};

/// The maximum size of an image file, in bytes.
pub const IMAGE_MAX: u64 = 1 << 30;

/// A record with its media, or the reason why it is rejected.
pub type Opened = Result<(Fields, OpenedMedia), Flaw>;

/// The images and videos of a record.
pub struct OpenedMedia {
    pub images: Vec<Image>,
    pub videos: Vec<Arc<OpenedVideo>>,
}

/// A video of a record.
pub struct OpenedVideo {
    pub shown: PromptVideo,
    /// The video's row and frames, if the run did not have them.
    pub new: Option<DecodedVideo>,
}

/// The reason why a record is rejected.
pub enum Flaw {
    /// Its image or video, as named by the record, lies outside the allowed folders.
    Outside {
        file: String,
        reason: String,
    },
    Other(String),
    /// The stage cannot go on.
    Failure(Failure),
}

impl From<String> for Flaw {
    fn from(reason: String) -> Self {
        Self::Other(reason)
    }
}

/// Opens the images and videos of records, on several threads.
pub struct Opener<'a> {
    /// The folder that relative paths of images start from.
    pub folder: &'a Path,
    /// The folder that relative paths of videos start from.
    pub video_folder: &'a Path,
    /// The folders that may be read; `None` for any.
    pub allowed: Option<&'a AllowedFolders>,
    /// The maximum number of pixels of an image.
    pub pixels_max: u64,
    pub video: &'a VideoSettings,
    pub checked: &'a CheckedImages,
    /// The programs that decode videos; found when the first video is opened.
    pub ffmpeg: &'a OnceLock<Result<Ffmpeg, String>>,
    /// The images and videos of the run.
    pub known: Mutex<&'a mut Media>,
    /// Several questions about a video decode it once.
    pub videos: Mutex<OpenedVideos>,
}

/// The videos that were opened, by their keys.
#[derive(Default)]
pub struct OpenedVideos(HashMap<String, OnceVideo>);

impl OpenedVideos {
    /// Keeps only the reasons of files that cannot be used, so that these are not tried again, and the
    /// frames of others leave the memory.
    pub fn forget_frames(&mut self) {
        self.0
            .retain(|_, opened| matches!(opened.get(), Some(Err(VideoFault::File(_)))));
    }
}

/// A video that is opened once.
type OnceVideo = Arc<OnceLock<Result<Arc<OpenedVideo>, VideoFault>>>;

impl Opener<'_> {
    /// Opens records with videos, in order. The threads are not those of rayon: one that waits for a
    /// resize there may begin another record, and would wait for itself if both have the same video.
    pub fn open_on_threads(&self, records: &[Record]) -> Vec<(String, Opened)> {
        let threads = rayon::current_num_threads().min(records.len());
        let next = AtomicUsize::new(0);
        let work = || {
            let mut opened = Vec::new();
            while let number = next.fetch_add(1, Ordering::Relaxed)
                && let Some(record) = records.get(number)
            {
                opened.push((number, self.open(record)));
            }
            opened
        };
        let mut all: Vec<(usize, (String, Opened))> = thread::scope(|scope| {
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            let opened = threads.into_iter().map(|thread| thread.join());
            opened
                .flat_map(|opened| opened.expect("no panic while opening"))
                .collect()
        });
        all.sort_unstable_by_key(|(number, _)| *number);
        all.into_iter().map(|(_, opened)| opened).collect()
    }

    pub fn open(&self, record: &Record) -> (String, Opened) {
        let place = record.place.clone();
        if files::stopped() {
            // This outcome is discarded.
            return (place, Err(Flaw::Other(String::new())));
        }
        let name = record.fields.as_ref().ok().and_then(own_name);
        let place = match name {
            Some(name) => format!("{place}, {name}"),
            None => place,
        };
        let fields = read_fields(&record.fields, record.embedded.len());
        let opened = fields.map_err(Flaw::Other).and_then(|fields| {
            let images = if record.embedded.is_empty() {
                let paths = fields.paths.iter();
                paths
                    .map(|path| self.image(path))
                    .collect::<Result<_, _>>()?
            } else {
                // `datasets` writes a path without bytes for images that it did not embed.
                let check = |file: ImageFile| match (&file.bytes, &file.path) {
                    (None, Some(path)) => self.image(path),
                    _ => Ok(self.checked.check(file, self.pixels_max)?),
                };
                let files = record.embedded.iter().cloned();
                files.map(check).collect::<Result<_, _>>()?
            };
            let videos = fields.video_paths.iter();
            let videos = videos
                .map(|path| self.video(path))
                .collect::<Result<_, _>>()?;
            Ok((fields, OpenedMedia { images, videos }))
        });
        (place, opened)
    }

    /// Returns the path of a file that a record names, with symbolic links resolved if only some
    /// folders may be read.
    fn locate(&self, kind: &str, name: &str) -> Result<(PathBuf, PathBuf), Flaw> {
        let path = match kind {
            "video" => video_file(self.video_folder, name),
            _ => self.folder.join(name),
        };
        let Some(allowed) = self.allowed else {
            return Ok((path.clone(), path));
        };
        match allowed.place(&path) {
            Err(error) => Err(unreadable(kind, &path, &error).into()),
            Ok(Place::Inside(file)) => Ok((path, file)),
            Ok(Place::Outside(file)) => Err(Flaw::Outside {
                file: name.to_owned(),
                reason: format!(
                    "{kind} {} resolves to {}, outside the folders that this stage may read (`images` and the \
                     folder of `from`); move it there, or set `images_anywhere: true`",
                    path.display(),
                    file.display()
                ),
            }),
        }
    }

    fn image(&self, name: &str) -> Result<Image, Flaw> {
        let (path, file) = self.locate("image", name)?;
        let bytes = files::read_at_most(&file, IMAGE_MAX);
        let bytes = bytes.map_err(|error| unreadable("image", &path, &error))?;
        let path = Some(path.to_string_lossy().into_owned());
        let bytes = Some(bytes);
        let image = self
            .checked
            .check(ImageFile { bytes, path }, self.pixels_max);
        Ok(image?)
    }

    fn video(&self, name: &str) -> Result<Arc<OpenedVideo>, Flaw> {
        let (path, file) = self.locate("video", name)?;
        let before = Stamp::of(&file).ok();
        let video_id = match hash_file(&file) {
            Ok(hash) => hash,
            Err(StoreError::Stopped) => return Err(Flaw::Failure(Failure::Interrupted)),
            Err(StoreError::Io { source, .. }) => {
                return Err(unreadable("video", &path, &source).into());
            }
            Err(error) => return Err(Flaw::Failure(error.into())),
        };
        if video_id == digest(b"") {
            return Err(format!("video {} is empty", path.display()).into());
        }
        let row_key = self.video.key(&video_id);
        let once = {
            let mut all = self.videos.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(all.0.entry(row_key.clone()).or_default())
        };
        let opened = once.get_or_init(|| {
            let opened = self.known_or_decoded(&file, &video_id, &row_key);
            match opened {
                Ok(_) if Stamp::of(&file).ok() != before => Err(VideoFault::File(
                    "the file changed while it was read; load it again when it is complete"
                        .to_owned(),
                )),
                opened => opened,
            }
        });
        opened.clone().map_err(|fault| match fault {
            VideoFault::Stopped => Flaw::Failure(Failure::Interrupted),
            VideoFault::Program(problem) => Flaw::Failure(Failure::Other(format!(
                "cannot decode video {}: {problem}",
                path.display()
            ))),
            VideoFault::File(problem) => {
                // The program names the file itself.
                let problem = problem.replace(&format!("file:{}: ", file.display()), "");
                Flaw::Other(format!("video {}: {problem}", path.display()))
            }
        })
    }

    /// Returns a video with the frames that the run has, or decodes it.
    fn known_or_decoded(
        &self,
        file: &Path,
        video_id: &str,
        row_key: &str,
    ) -> Result<Arc<OpenedVideo>, VideoFault> {
        let opened = |frame_ids: &[String], new| {
            let shown = PromptVideo {
                video_id: video_id.to_owned(),
                frame_ids: frame_ids.to_vec(),
            };
            Ok(Arc::new(OpenedVideo { shown, new }))
        };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let before = known
            .video(row_key)
            .map_err(|error| VideoFault::Program(error.to_string()))?;
        drop(known);
        if let Some((video, true)) = &before {
            return opened(&video.frame_ids, None);
        }
        let ffmpeg = self.ffmpeg.get_or_init(Ffmpeg::find);
        let ffmpeg = ffmpeg
            .as_ref()
            .map_err(|problem| VideoFault::Program(problem.clone()))?;
        let new = decode_video(ffmpeg, self.video, file, video_id)?;
        let frame_ids = new.row.frame_ids.clone();
        if let Some((before, _)) = before
            && before.frame_ids != frame_ids
        {
            return Err(VideoFault::Program(format!(
                "{} decodes it to other frames than {} did in this run; install that version again, or \
                 start a new run",
                new.row.decoder, before.decoder
            )));
        }
        opened(&frame_ids, Some(new))
    }
}

/// The endings of video files that may be left out, the most common first.
const VIDEO_ENDINGS: [&str; 8] = ["mp4", "MP4", "mkv", "webm", "avi", "mov", "MOV", "m4v"];

/// Returns the path of a video, which may be named without the ending of its file, as benchmarks do.
pub fn video_file(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    if path.exists() {
        return path;
    }
    let with = VIDEO_ENDINGS
        .iter()
        .map(|ending| folder.join(format!("{name}.{ending}")));
    with.into_iter().find(|path| path.exists()).unwrap_or(path)
}

/// Returns the reason why a file cannot be read.
fn unreadable(kind: &str, path: &Path, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => format!("{kind} not found: {}", path.display()),
        _ => format!("cannot read {kind} {}: {error}", path.display()),
    }
}

/// The images that were decoded, so that one of several questions is decoded once.
#[derive(Default)]
pub struct CheckedImages(Mutex<HashMap<String, Checked>>);

/// The header and the hashes of a decoded image, or its fault.
type Checked = Arc<OnceLock<Result<(Probe, String, u64), RowFault>>>;

/// The maximum number of images that are remembered.
const CHECKED_MAX: usize = 1 << 16;

impl CheckedImages {
    /// Decodes an image once, so that a corrupt one is rejected here instead of failing during
    /// sampling.
    fn check(&self, file: ImageFile, pixels_max: u64) -> Result<Image, String> {
        let name = file.path.clone().unwrap_or_else(|| "(embedded)".to_owned());
        let bytes = file
            .bytes
            .as_deref()
            .ok_or_else(|| format!("image {name} has no bytes"))?;
        let image_id = digest(bytes);
        let checked = {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if all.len() >= CHECKED_MAX {
                all.clear();
            }
            Arc::clone(all.entry(image_id.clone()).or_default())
        };
        let header = checked.get_or_init(|| {
            let header = probe(bytes)?;
            let image = decode(bytes, pixels_max)?;
            Ok((header, image.pixel_hash(), image.look()))
        });
        let (header, pixels, look) = header
            .as_ref()
            .map_err(|fault| format!("image {name}: {fault}"))?;
        Ok(Image {
            image_id,
            width: header.width as i32,
            height: header.height as i32,
            format: header.format.to_string(),
            pixels: Some(pixels.clone()),
            look: Some(look.cast_signed()),
            image: file,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A limit of 0 pixels refuses an image that is decoded.
    #[test]
    fn an_image_of_several_questions_is_decoded_once() {
        let checked = CheckedImages::default();
        let file = |name: &str, bytes: &[u8]| ImageFile {
            bytes: Some(bytes.to_vec()),
            path: Some(name.to_owned()),
        };
        let dot = b"P6\n1 1\n255\nabc";
        let first = checked.check(file("a.ppm", dot), 100).unwrap();
        let again = checked.check(file("b.ppm", dot), 0).unwrap();
        assert_eq!((first.image_id, first.width), (again.image_id, again.width));
        assert_eq!(again.image.path.as_deref(), Some("b.ppm"));
        let other = checked.check(file("c.ppm", b"P6\n1 1\n255\nabd"), 0);
        assert!(other.unwrap_err().starts_with("image c.ppm: "));
        for name in ["d.ppm", "e.ppm"] {
            let fault = checked.check(file(name, b"P6\n1 1\n255\na"), 100);
            let begin = format!("image {name}: ");
            assert!(fault.unwrap_err().starts_with(&begin));
        }
    }
}
