//! The properties of a video file, as `ffprobe` prints them.

use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use super::super::fault::VideoFault;
use ovchat_io::files;

/// The properties of a file's video stream.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Probed {
    pub codec: String,
    /// The size of a decoded frame in pixels, after rotation.
    pub width: usize,
    pub height: usize,
    /// The number of frames.
    pub frames: usize,
    /// The average number of frames per second.
    pub fps: Option<f64>,
    /// The presentation times of all frames in units of `time_base`, ascending; empty if frames
    /// cannot be found by their times.
    pub times: Vec<i64>,
    /// Those of the key frames.
    pub keys: Vec<i64>,
    /// Seconds per unit of time, as a fraction.
    time_base: [i64; 2],
    /// The time at which the file starts, in seconds.
    pub start: f64,
    /// The names of the container, separated by commas.
    pub format: String,
    /// True if a decoder may show fewer frames than there are packets.
    pub hides_frames: bool,
}

impl Probed {
    /// Converts a time to seconds.
    pub fn seconds(&self, time: f64) -> f64 {
        let [units, per] = self.time_base;
        time * units as f64 / per as f64
    }
}

/// The properties that lines of `ffprobe` gave so far.
#[derive(Default)]
pub struct Probing {
    probed: Probed,
    is_turned: bool,
    is_encrypted: bool,
    /// True if the file says that some packets are not shown.
    discards: bool,
    /// True if some packets have no time.
    lacks_times: bool,
}

impl Probing {
    /// Reads a line.
    pub fn line(&mut self, line: &str) {
        let is_packet = line.starts_with("packet|");
        let mut time: Option<i64> = None;
        let [mut is_shown, mut is_key] = [true, false];
        for (key, value) in fields(line) {
            match key {
                "pts" if is_packet => time = value.parse().ok(),
                "flags" if is_packet => {
                    is_shown = !value.contains('D');
                    is_key = value.contains('K');
                }
                "side_data_type" => self.is_encrypted |= value.starts_with("Encryption"),
                "codec_name" => value.clone_into(&mut self.probed.codec),
                "width" => self.probed.width = value.parse().unwrap_or(0),
                "height" => self.probed.height = value.parse().unwrap_or(0),
                "avg_frame_rate" => {
                    self.probed.fps = fraction(value)
                        .filter(|[count, seconds]| *count > 0 && *seconds > 0)
                        .map(|[count, seconds]| count as f64 / seconds as f64);
                }
                "time_base" => {
                    self.probed.time_base = fraction(value)
                        .filter(|[_, per]| *per > 0)
                        .unwrap_or([0, 1]);
                }
                "rotation" => {
                    let degrees: f64 = value.parse().unwrap_or(0.0);
                    self.is_turned = (degrees.abs() % 180.0 - 90.0).abs() < 1.0;
                }
                "format_name" => value.clone_into(&mut self.probed.format),
                "start_time" => self.probed.start = value.parse().unwrap_or(0.0),
                _ => {}
            }
        }
        if is_packet {
            self.probed.frames += usize::from(is_shown);
            self.discards |= !is_shown;
            self.lacks_times |= time.is_none();
            self.probed.times.extend(time.filter(|_| is_shown));
            self.probed.keys.extend(time.filter(|_| is_key));
        }
    }

    /// Returns the properties, once all lines were read.
    pub fn finish(mut self) -> Result<Probed, VideoFault> {
        let problem = if self.is_encrypted {
            "the video stream is encrypted; decrypt the file first"
        } else if self.probed.codec.is_empty() {
            "the file has no video stream"
        } else if self.probed.width * self.probed.height == 0 {
            "the size of its frames is unknown, or larger than 8K (7680 x 4320)"
        } else {
            ""
        };
        if !problem.is_empty() {
            return Err(VideoFault::File(problem.to_owned()));
        }
        if self.is_turned {
            std::mem::swap(&mut self.probed.width, &mut self.probed.height);
        }
        let mut probed = self.probed;
        let first = probed.times.first().copied();
        probed.times.sort_unstable();
        probed.keys.sort_unstable();
        // The alternate reference frames of VP8, and the frames before the first key frame of a stream
        // that was cut, are packets that no decoder shows.
        probed.hides_frames = probed.codec == "vp8"
            || self.lacks_times
            || probed.times.windows(2).any(|pair| pair[0] == pair[1])
            || probed.times.first().copied() != first;
        let formats = ["mov", "matroska"];
        let has_index = formats.iter().any(|name| probed.format.starts_with(name));
        if !has_index || self.discards || probed.hides_frames {
            probed.times.clear();
        }
        Ok(probed)
    }
}

/// Returns the keys and values of a line of `-of compact`: `stream|codec_name=h264|width=160`.
pub fn fields(line: &str) -> impl Iterator<Item = (&str, &str)> {
    line.split('|').filter_map(|field| field.split_once('='))
}

fn fraction(text: &str) -> Option<[i64; 2]> {
    let (above, below) = text.split_once('/')?;
    Some([above.parse().ok()?, below.parse().ok()?])
}

/// True if a GIF file ends as one; the decoder does not notice that the rest is missing. Some programs
/// append zeros or a line end.
pub fn ends_as_gif(file: &Path) -> bool {
    const TRAILER: u8 = 0x3b;
    let mut end = [0; 64];
    let mut read = || -> io::Result<usize> {
        let mut file = files::open(file)?;
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(end.len() as u64)))?;
        file.take(end.len() as u64).read(&mut end)
    };
    let count = read().unwrap_or(0);
    let mut last = end[..count].iter().rev();
    last.find(|byte| !matches!(byte, 0 | b'\r' | b'\n')) == Some(&TRAILER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_ffprobe_become_properties() {
        let mut probing = Probing::default();
        for line in [
            "packet|pts=1024|flags=K_",
            "packet|pts=0|flags=__D",
            "packet|pts=N/A|flags=__",
            "stream|codec_name=h264|width=160|height=90|avg_frame_rate=30000/1001|time_base=1/15360|side_data|rotation=-90",
            "format|format_name=mov,mp4,m4a,3gp,3g2,mj2",
            "",
            "width",
        ] {
            probing.line(line);
        }
        let probed = probing.finish().unwrap();
        // A packet has no time, so frames are counted and not sought.
        assert!(probed.hides_frames && probed.times.is_empty());
        assert_eq!(probed.frames, 2);
        // Turned by a right angle.
        assert_eq!((&*probed.codec, probed.width), ("h264", 90));
        assert!((probed.fps.unwrap() - 29.97).abs() < 0.001);
    }

    #[test]
    fn frames_are_sought_where_every_packet_is_one() {
        let read = |packets: &[&str], codec: &str| {
            let mut probing = Probing::default();
            for packet in packets {
                probing.line(&format!("packet|{packet}"));
            }
            probing.line(&format!(
                "stream|codec_name={codec}|width=8|height=8|time_base=1/10"
            ));
            probing.line("format|format_name=matroska,webm|start_time=0.5");
            probing.finish().unwrap()
        };
        let plain = read(
            &["pts=5|flags=K_", "pts=9|flags=__", "pts=7|flags=__"],
            "h264",
        );
        assert_eq!(
            (plain.times, plain.keys, plain.start),
            (vec![5, 7, 9], vec![5], 0.5)
        );
        for (packets, codec) in [
            (["pts=5|flags=K_", "pts=5|flags=__"], "h264"),
            (["pts=7|flags=K_", "pts=5|flags=__"], "h264"),
            (["pts=5|flags=K_", "pts=7|flags=__"], "vp8"),
        ] {
            let hiding = read(&packets, codec);
            assert!(
                hiding.hides_frames && hiding.times.is_empty(),
                "{packets:?}"
            );
        }
    }
}
