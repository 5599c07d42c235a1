//! Row type of videos: files that were decoded to frames, and how.

use super::row::rows;

rows! {
    /// A video file that a loading stage decoded. The frames are in the table `images`.
    pub struct Video: "video" => {
        /// Hash of the file and of the settings that choose its frames; identifies the row.
        pub row_key: String,
        /// SHA-256 of the file, in hex.
        pub video_id: String,
        /// Path of the file when it was decoded.
        pub path: String,
        /// Codec of the video stream: `h264`, `hevc`, `vp9`, …
        pub codec: String,
        /// Width of a decoded frame, in pixels, after rotation.
        pub width: i32,
        /// Height of a decoded frame, in pixels, after rotation.
        pub height: i32,
        /// Number of frames of the video stream.
        pub frames: i64,
        /// Average number of frames per second; null if the file does not say.
        pub fps: Option<f64>,
        /// Positions of the chosen frames in the stream, from 0.
        pub indices: Vec<i64>,
        /// IDs of the chosen frames in the table `images`, in the same order.
        pub frame_ids: Vec<String>,
        /// Program that decoded the file, with its version: `ffmpeg 5.1.6`.
        pub decoder: String,
    }
}
