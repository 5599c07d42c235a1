//! Videos of a source: the choice of their frames, and the decoding to images.
//!
//! A video is decoded once, when its record is loaded. Its frames become images of the run, so that
//! models, judges and people see the same pixels, and machines without a decoder can use them.

mod fault;
mod ffmpeg;
mod frames;

use std::collections::BTreeMap;
use std::num::{NonZeroU16, NonZeroU32};
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::fault::VideoFault;
use self::ffmpeg::Deadline;
pub use self::ffmpeg::Ffmpeg;
pub use self::frames::FrameRule;
use ovchat_data::store::{Key, digest};
use ovchat_data::tables::{Image, ImageFile, Video};
use ovchat_models::preprocess::{Bicubic, Rgb};

/// The version of the arguments that decide the pixels of a frame.
const DECODING: &str = "1";

/// The choice of the frames of a video that models are shown, and their storage.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VideoSettings {
    /// The number of frames, or the largest number with `rule: llava_next`. Each takes 196 tokens of
    /// LLaVA-OneVision.
    pub frames: FrameCount,
    /// The rule by which frames are chosen: `uniform`, `llava_next` or `transformers`.
    pub rule: FrameRule,
    /// The largest width and height of a stored frame, in pixels. Larger frames are resized to a
    /// square of this size, as the vision tower of LLaVA-OneVision reads them; set it to the image
    /// size of another tower.
    pub size: NonZeroU16,
    /// The time that a decoder may take for one file, in seconds.
    pub timeout_s: NonZeroU32,
}

impl Default for VideoSettings {
    fn default() -> Self {
        Self {
            frames: FrameCount(32),
            rule: FrameRule::Uniform,
            size: const { NonZeroU16::new(384).unwrap() },
            timeout_s: const { NonZeroU32::new(600).unwrap() },
        }
    }
}

impl VideoSettings {
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Returns the largest number of bytes that the frames of a video take in memory.
    pub fn bytes_max(&self) -> usize {
        3 * self.frames.get() * usize::from(self.size.get()).pow(2)
    }

    /// Returns the key of a video in the table `videos`.
    pub fn key(&self, video_id: &str) -> String {
        let Self {
            frames, rule, size, ..
        } = self;
        let of_settings = format!("{rule:?} {} {size}", frames.get());
        Key::new("video")
            .with(video_id)
            .with(of_settings)
            .with(DECODING)
            .finish()
    }

    fn deadline(&self) -> Deadline {
        Deadline::after(self.timeout_s.get().into())
    }
}

/// A number of frames, from 1 to 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "u32")]
pub struct FrameCount(#[schemars(range(min = 1, max = 1024))] u32);

impl FrameCount {
    pub fn get(self) -> usize {
        self.0 as usize
    }
}

impl TryFrom<u32> for FrameCount {
    type Error = String;

    fn try_from(count: u32) -> Result<Self, String> {
        match count {
            1..=1024 => Ok(Self(count)),
            _ => Err(format!("must be from 1 to 1024, got {count}")),
        }
    }
}

/// A decoded video: its row, and its frames as images.
pub struct DecodedVideo {
    pub row: Video,
    pub frames: Vec<Image>,
}

/// Decodes the chosen frames of a video file.
pub fn decode_video(
    ffmpeg: &Ffmpeg,
    settings: &VideoSettings,
    file: &Path,
    video_id: &str,
) -> Result<DecodedVideo, VideoFault> {
    let until = settings.deadline();
    let mut probed = ffmpeg.probe(file, until)?;
    let choose = |total| {
        let rule = settings.rule;
        rule.indices(total, settings.frames.get(), probed.fps)
            .map_err(VideoFault::File)
    };
    let mut indices = choose(probed.frames)?;
    let mut images = decode(ffmpeg, settings, file, &probed, &indices, until)?;
    if images.is_none() {
        let frames = ffmpeg.count(file, until)?;
        if frames < probed.frames {
            indices = choose(frames)?;
            probed.frames = frames;
            images = decode(ffmpeg, settings, file, &probed, &indices, until)?;
        }
    }
    let images = images.ok_or_else(|| {
        VideoFault::File("the video stream ends before its last frame".to_owned())
    })?;
    let mut frame_ids = Vec::with_capacity(indices.len());
    for index in &indices {
        frame_ids.push(images[index].image_id.clone());
    }
    let row = Video {
        row_key: settings.key(video_id),
        video_id: video_id.to_owned(),
        path: file.to_string_lossy().into_owned(),
        codec: probed.codec,
        width: probed.width as i32,
        height: probed.height as i32,
        frames: probed.frames as i64,
        fps: probed.fps,
        indices: indices.into_iter().map(|index| index as i64).collect(),
        frame_ids,
        decoder: format!("ffmpeg {}", ffmpeg.version),
    };
    Ok(DecodedVideo {
        row,
        frames: images.into_values().collect(),
    })
}

/// Decodes the frames at some positions; `None` if the stream ends before the last of them.
fn decode(
    ffmpeg: &Ffmpeg,
    settings: &VideoSettings,
    file: &Path,
    probed: &ffmpeg::Probed,
    indices: &[usize],
    until: Deadline,
) -> Result<Option<BTreeMap<usize, Image>>, VideoFault> {
    let size = usize::from(settings.size.get());
    let (width, height) = (probed.width, probed.height);
    let mut images = BTreeMap::new();
    let mut take = |index: usize, data: Vec<u8>| {
        let mut frame = Rgb {
            width,
            height,
            data,
        };
        if width.max(height) > size {
            frame = Bicubic::Pillow.resize(&frame, size, size);
        }
        let path = format!("{}#{index}", file.display());
        images.insert(index, stored(&frame, path)?);
        Ok(())
    };
    let is_whole = ffmpeg.frames(file, probed, indices, until, &mut take)?;
    Ok(is_whole.then_some(images))
}

/// Returns a frame as a PNG file.
fn stored(frame: &Rgb, path: String) -> Result<Image, VideoFault> {
    let bytes = frame.to_png().map_err(VideoFault::File)?;
    Ok(Image {
        image_id: digest(&bytes),
        width: frame.width as i32,
        height: frame.height as i32,
        format: "png".to_owned(),
        pixels: Some(frame.pixel_hash()),
        look: Some(frame.look().cast_signed()),
        image: ImageFile {
            bytes: Some(bytes),
            path: Some(path),
        },
    })
}
