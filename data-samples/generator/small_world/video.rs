//! Encoding of a clip as H.264 in MP4 by the program ffmpeg.
//!
//! The bytes depend on the versions of ffmpeg and x264 only: one thread, no date, no name or
//! settings of the encoder in the file.

use std::ffi::OsString;
use std::fs;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use image::RgbImage;

use super::clip_parts::SIDE;
use super::files::Outcome;

/// Frames per second.
const RATE: u32 = 8;

/// The quantizer of x264: 0 is lossless, 51 the worst. It is constant: a quality that x264 controls
/// itself looks ahead, so that the first frame would depend on later ones.
const QUANTIZER: &str = "26";

/// Settings of ffmpeg after its input. The bitstream filter removes the message in which x264 lists
/// its settings, a third of such a small file.
const OUTPUT: [&str; 24] = [
    "-an",
    "-map_metadata",
    "-1",
    "-sws_flags",
    "bitexact+accurate_rnd+full_chroma_int",
    "-c:v",
    "libx264",
    "-qp",
    QUANTIZER,
    "-pix_fmt",
    "yuv420p",
    "-threads",
    "1",
    "-flags:v",
    "+bitexact",
    "-bf",
    "0",
    "-bsf:v",
    "filter_units=remove_types=6",
    "-fflags",
    "+bitexact",
    "-f",
    "mp4",
    "-y",
];

/// Writes `frames`, each [`SIDE`] pixels wide and high, to the MP4 file `path` and creates its folder
/// first.
pub fn write(path: &Path, frames: &[RgbImage]) -> Outcome<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    let mut child = start("ffmpeg", path)?;
    let mut input = child.stdin.take().ok_or("ffmpeg has no standard input")?;
    // If ffmpeg stops reading, its own message says why.
    let fed = frames
        .iter()
        .try_for_each(|frame| input.write_all(frame.as_raw()));
    drop(input);
    let said = child.wait_with_output()?;
    if !said.status.success() {
        let message = String::from_utf8_lossy(&said.stderr);
        return Err(format!("{}: ffmpeg: {}", path.display(), message.trim()).into());
    }
    fed.map_err(|error| format!("{}: ffmpeg: {error}", path.display()))?;
    Ok(())
}

/// Starts ffmpeg, which reads raw frames from its standard input.
fn start(program: &str, path: &Path) -> Outcome<Child> {
    // With a scheme, a path is never read as another protocol or an option.
    let mut to = OsString::from("file:");
    to.push(path);
    let (size, rate) = (format!("{SIDE}x{SIDE}"), RATE.to_string());
    let input = [
        "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", &size, "-r", &rate, "-i", "pipe:0",
    ];
    let started = Command::new(program)
        .args(["-hide_banner", "-loglevel", "error"])
        .args(input)
        .args(OUTPUT)
        .arg(to)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    started.map_err(|error| match error.kind() {
        ErrorKind::NotFound => "ffmpeg is missing: apt-get install ffmpeg".into(),
        _ => format!("ffmpeg: {error}").into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_named_with_its_remedy() {
        let error = start("ovchat-no-such-program", Path::new("clip.mp4")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "ffmpeg is missing: apt-get install ffmpeg"
        );
    }
}
