//! Decoding of video files by the programs `ffmpeg` and `ffprobe`.
//!
//! A decoder of untrusted files stays outside of this process: its memory and time are limited, it
//! cannot write files, it has no environment, and it opens only the formats and codecs listed here,
//! from local files. A playlist that is named like a video would otherwise open other files.

mod probing;
mod process;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub use self::probing::Probed;
use self::probing::{Probing, ends_as_gif, fields};
pub use self::process::Deadline;
use self::process::{Ended, Program};
use super::super::programs::is_executable;
use super::fault::VideoFault;

/// The containers that are accepted.
const FORMATS: &str = "mov,matroska,avi,gif";

/// The decoders that are accepted. `libdav1d` is that of AV1 in most builds; `mjpeg` and `png` also read
/// covers. Audio and subtitles are never decoded, but `ffprobe` fails at a stream without a decoder.
const VIDEO: &str = "h264,hevc,vp8,vp9,av1,libdav1d,libaom-av1,mpeg4,mjpeg,gif,png";
const AUDIO: &str = "aac,aac_fixed,aac_latm,ac3,ac3_fixed,eac3,alac,dca,flac,mp1,mp1float,mp2,mp2float,mp3,\
                     mp3float,opus,libopus,vorbis,libvorbis,amrnb,amrwb,libopencore_amrnb,libopencore_amrwb,\
                     pcm_s16le,pcm_s16be,pcm_s24le,pcm_s32le,pcm_f32le,pcm_u8,pcm_alaw,pcm_mulaw,adpcm_ms,\
                     adpcm_ima_wav,adpcm_ima_qt";
const SUBTITLES: &str = "mov_text,subrip,srt,ass,ssa,webvtt,text";

/// The maximum size of a frame, in pixels: 8K (7680 × 4320).
const PIXELS_MAX: &str = "33177600";

/// The oldest version that is known to work.
const OLDEST: (u32, u32) = (4, 4);

/// The version that has `-fps_mode` in place of `-vsync`.
const WITH_FPS_MODE: (u32, u32) = (5, 1);

/// Frames that lie further apart are sought one by one instead of decoding everything between.
const SEEK_DISTANCE: usize = 250;

/// The programs `ffmpeg` and `ffprobe`.
#[derive(Debug, Clone)]
pub struct Ffmpeg {
    ffmpeg: PathBuf,
    ffprobe: PathBuf,
    /// The version as the program prints it: `5.1.6-0+deb12u1`.
    pub version: String,
    has_fps_mode: bool,
}

impl Ffmpeg {
    /// Finds the programs on the `PATH`.
    ///
    /// # Errors
    ///
    /// Fails if one is missing, too old or does not start.
    pub fn find() -> Result<Self, String> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let [ffmpeg, ffprobe] = ["ffmpeg", "ffprobe"].map(|name| {
            let found = std::env::split_paths(&path).map(|folder| folder.join(name));
            let mut found = found.into_iter();
            found.find(|file| is_executable(file)).ok_or_else(|| {
                format!(
                    "`{name}` was not found; install ffmpeg {}.{} or later (Debian, Ubuntu: `apt-get install \
                     ffmpeg`)",
                    OLDEST.0, OLDEST.1
                )
            })
        });
        let (ffmpeg, ffprobe) = (ffmpeg?, ffprobe?);
        let version = version(&ffmpeg)?;
        let number = number(&version);
        if number.is_some_and(|number| number < OLDEST) {
            return Err(format!(
                "{} has version {version}, which is too old; install ffmpeg {}.{} or later",
                ffmpeg.display(),
                OLDEST.0,
                OLDEST.1
            ));
        }
        Ok(Self {
            ffmpeg,
            ffprobe,
            version,
            // Builds from the repository have no number; they are newer.
            has_fps_mode: number.is_none_or(|number| number >= WITH_FPS_MODE),
        })
    }

    /// Reads the properties of the first video stream. Its frames are counted without decoding them,
    /// unless there can be fewer of them than packets.
    pub fn probe(&self, file: &Path, until: Deadline) -> Result<Probed, VideoFault> {
        let entries = "stream=codec_name,width,height,avg_frame_rate,time_base:stream_side_data=rotation:\
                       packet=pts,flags:packet_side_data=side_data_type:format=format_name,start_time";
        let mut probing = Probing::default();
        let arguments = ["-v", "error", "-show_entries", entries, "-of", "compact"];
        self.ask(file, &arguments, until, &mut |line| probing.line(line))?;
        let mut probed = probing.finish()?;
        if probed.format == "gif" && !ends_as_gif(file) {
            return Err(VideoFault::File("the file is truncated".to_owned()));
        }
        if probed.hides_frames {
            probed.frames = self.count(file, until)?;
        }
        if probed.frames == 0 {
            return Err(VideoFault::File(
                "the video stream has no frames".to_owned(),
            ));
        }
        Ok(probed)
    }

    /// Counts the frames by decoding them.
    pub fn count(&self, file: &Path, until: Deadline) -> Result<usize, VideoFault> {
        let mut count = None;
        let arguments = [
            "-v",
            "error",
            "-threads",
            "1",
            "-count_frames",
            "-show_entries",
            "stream=nb_read_frames",
            "-of",
            "compact",
        ];
        self.ask(file, &arguments, until, &mut |line| {
            for (key, value) in fields(line) {
                if key == "nb_read_frames" {
                    count = value.parse().ok();
                }
            }
        })?;
        Ok(count.unwrap_or(0))
    }

    /// Runs `ffprobe` and passes the lines of its output on.
    fn ask(
        &self,
        file: &Path,
        arguments: &[&str],
        until: Deadline,
        line: &mut dyn FnMut(&str),
    ) -> Result<(), VideoFault> {
        let mut all: Vec<OsString> = arguments.iter().map(OsString::from).collect();
        all.extend(guards().map(OsString::from));
        all.extend(["-select_streams", "V:0", "-i"].map(OsString::from));
        all.push(local(file));
        let program = Program {
            name: "ffprobe",
            path: &self.ffprobe,
            arguments: &all,
            until,
        };
        // The start of a line whose rest has not come yet.
        let mut begun = Vec::new();
        let ended = program.run(1 << 16, &mut |bytes| {
            begun.extend_from_slice(&bytes);
            if let Some(end) = begun.iter().rposition(|byte| *byte == b'\n') {
                let rest = begun.split_off(end + 1);
                String::from_utf8_lossy(&begun).lines().for_each(&mut *line);
                begun = rest;
            }
            Ok(())
        })?;
        ended.result("ffprobe").map(drop)
    }

    /// Decodes the frames at `indices`, which are ascending, and passes each on as RGB bytes, row by
    /// row. Equal indices are decoded once; a frame may be passed on twice.
    ///
    /// Returns false if the stream ended before the last of them.
    pub fn frames(
        &self,
        file: &Path,
        probed: &Probed,
        indices: &[usize],
        until: Deadline,
        take: &mut dyn FnMut(usize, Vec<u8>) -> Result<(), VideoFault>,
    ) -> Result<bool, VideoFault> {
        let wanted: BTreeSet<usize> = indices.iter().copied().collect();
        let wanted: Vec<usize> = wanted.into_iter().collect();
        let gaps = wanted.windows(2).map(|pair| pair[1] - pair[0]);
        let gap = gaps.max().unwrap_or(wanted[0]);
        if gap > SEEK_DISTANCE && !probed.times.is_empty() {
            let mut exact = true;
            for &index in &wanted {
                let Some(frame) = self.sought(file, probed, index, until)? else {
                    exact = false;
                    break;
                };
                take(index, frame)?;
            }
            if exact {
                return Ok(true);
            }
        }
        let select = format!("select='{}',showinfo", any_of(&wanted));
        let arguments = self.decoding(file, &["-copyts"], &["-vf", &select]);
        let mut done = 0;
        let ended = self.decoded(&arguments, probed, until, &mut |frame| {
            let index = wanted.get(done).ok_or_else(changing)?;
            done += 1;
            take(*index, frame)
        })?;
        let words = ended.result("ffmpeg")?;
        match words.matches("] config in time_base:").count() {
            1 => {}
            0 if done == 0 => {}
            0 => {
                return Err(VideoFault::Program(format!(
                    "ffmpeg {} does not log the frames that it shows; install another version",
                    self.version
                )));
            }
            // A new graph of filters counts frames from 0 again.
            _ => return Err(changing()),
        }
        let shown: Vec<i64> = words.lines().filter_map(shown_time).collect();
        let known: Vec<i64> = (wanted.iter())
            .filter_map(|index| probed.times.get(*index).copied())
            .collect();
        if !probed.times.is_empty() && shown != known[..shown.len().min(known.len())] {
            return Err(VideoFault::File(
                "the times of the decoded frames are not those of the file".to_owned(),
            ));
        }
        Ok(done == wanted.len())
    }

    /// Decodes one frame from a key frame before it. `None` if another frame came, or a fault: then only
    /// decoding from the start is exact.
    ///
    /// The time that the filter `showinfo` prints proves that it is the frame. From the nearest key
    /// frame, all errors count, because in streams with gradual refresh the right frame may come with
    /// wrong pixels; from the one before that, these are right.
    fn sought(
        &self,
        file: &Path,
        probed: &Probed,
        index: usize,
        until: Deadline,
    ) -> Result<Option<Vec<u8>>, VideoFault> {
        let Some(&time) = probed.times.get(index) else {
            return Ok(None);
        };
        let show = ["-vf", "showinfo", "-frames:v", "1"];
        let Some(before) = index.checked_sub(1).map(|before| probed.times[before]) else {
            let arguments = self.decoding(file, &["-copyts"], &show);
            return self.proven(&arguments, probed, time, until);
        };
        // Between the frame and the one before it, out of reach of rounding.
        let middle = probed.seconds((time as f64 + before as f64) / 2.0);
        let place = format!("{:.6}", middle - probed.start);
        if middle > probed.start {
            let seek = ["-err_detect", "explode", "-copyts", "-ss", &place];
            let arguments = self.decoding(file, &seek, &show);
            let frame = self.proven(&arguments, probed, time, until)?;
            if frame.is_some() {
                return Ok(frame);
            }
        }
        let earlier = probed.keys.partition_point(|key| *key <= time);
        let Some(key) = earlier.checked_sub(2).map(|key| probed.keys[key]) else {
            return Ok(None);
        };
        let place = format!("{:.6}", probed.seconds(key as f64) - probed.start);
        let seek = ["-copyts", "-noaccurate_seek", "-ss", &place];
        let select = format!("select='gte(t,{middle:.6})',showinfo");
        let arguments = self.decoding(file, &seek, &["-vf", &select, "-frames:v", "1"]);
        self.proven(&arguments, probed, time, until)
    }

    /// Returns the frame that a decoding writes, if it is the one with this presentation time.
    fn proven(
        &self,
        arguments: &[OsString],
        probed: &Probed,
        time: i64,
        until: Deadline,
    ) -> Result<Option<Vec<u8>>, VideoFault> {
        let mut frames = Vec::new();
        let decoded = self.decoded(arguments, probed, until, &mut |frame| {
            frames.push(frame);
            Ok(())
        });
        let words = match decoded.and_then(|ended| ended.result("ffmpeg")) {
            Ok(words) => words,
            Err(VideoFault::File(_)) => return Ok(None),
            Err(fault) => return Err(fault),
        };
        let shown = words.lines().find_map(shown_time);
        let frame = frames.pop();
        Ok(frame.filter(|_| frames.is_empty() && shown == Some(time)))
    }

    /// Returns the arguments of a decoding to raw RGB frames.
    fn decoding(&self, file: &Path, before: &[&str], after: &[&str]) -> Vec<OsString> {
        let fixed = [
            "-nostdin",
            "-hide_banner",
            "-nostats",
            "-v",
            "level+info",
            "-xerror",
            "-threads",
            "1",
            "-filter_threads",
            "1",
        ];
        let passthrough = if self.has_fps_mode {
            ["-fps_mode", "passthrough"]
        } else {
            ["-vsync", "0"]
        };
        // `bilinear` converts 10-bit colors and odd heights as decord does; others do not depend on it.
        let output = [
            "-sws_flags",
            "bilinear",
            "-f",
            "rawvideo",
            "-pix_fmt",
            "rgb24",
            "pipe:1",
        ];
        let mut all: Vec<OsString> = fixed.map(OsString::from).to_vec();
        all.extend(guards().map(OsString::from));
        all.extend(before.iter().map(OsString::from));
        all.extend([OsString::from("-i"), local(file)]);
        all.extend(["-map", "0:V:0", "-an", "-sn", "-dn"].map(OsString::from));
        all.extend(after.iter().map(OsString::from));
        all.extend(passthrough.map(OsString::from));
        all.extend(output.map(OsString::from));
        all
    }

    /// Runs `ffmpeg` and passes whole frames on.
    fn decoded(
        &self,
        arguments: &[OsString],
        probed: &Probed,
        until: Deadline,
        take: &mut dyn FnMut(Vec<u8>) -> Result<(), VideoFault>,
    ) -> Result<Ended, VideoFault> {
        let frame = 3 * probed.width * probed.height;
        let program = Program {
            name: "ffmpeg",
            path: &self.ffmpeg,
            arguments,
            until,
        };
        program.run(frame, &mut |bytes| {
            if bytes.len() != frame {
                return Err(changing());
            }
            take(bytes)
        })
    }
}

fn changing() -> VideoFault {
    VideoFault::File(
        "the size or the pixel format of the frames changes, or ffmpeg wrote too few bytes; convert the file, \
         as with `ffmpeg -i FILE -c:v libx264 -pix_fmt yuv420p NEW.mp4`"
            .to_owned(),
    )
}

/// Returns an expression of ffmpeg that is true for some frames. Sums are nested, because a sum has at
/// most 100 terms.
fn any_of(frames: &[usize]) -> String {
    match frames {
        [frame] => format!("eq(n,{frame})"),
        _ => {
            let (first, last) = frames.split_at(frames.len() / 2);
            format!("({}+{})", any_of(first), any_of(last))
        }
    }
}

/// The arguments that restrict what is opened.
fn guards() -> [&'static str; 12] {
    [
        "-protocol_whitelist",
        "file",
        "-format_whitelist",
        FORMATS,
        "-codec_whitelist:v",
        VIDEO,
        "-codec_whitelist:a",
        AUDIO,
        "-codec_whitelist:s",
        SUBTITLES,
        "-max_pixels",
        PIXELS_MAX,
    ]
}

/// Returns a path as an argument that is no other protocol and no option.
fn local(file: &Path) -> OsString {
    let mut name = OsString::from("file:");
    name.push(file);
    name
}

/// Returns the version of an ffmpeg: `5.1.6-0+deb12u1`.
fn version(ffmpeg: &Path) -> Result<String, String> {
    let run = Command::new(ffmpeg)
        .arg("-version")
        .env_clear()
        .stdin(Stdio::null())
        .output();
    let output = run.map_err(|error| format!("cannot start {}: {error}", ffmpeg.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut words = text.lines().next().unwrap_or_default().split_whitespace();
    let version = match (words.next(), words.next(), words.next()) {
        (Some("ffmpeg"), Some("version"), Some(version)) => Some(version),
        _ => None,
    };
    let version = version.filter(|_| output.status.success());
    let version: Option<String> = version.map(|version| version.chars().take(60).collect());
    version.ok_or_else(|| {
        format!(
            "`{} -version` does not print a version; install ffmpeg {}.{} or later",
            ffmpeg.display(),
            OLDEST.0,
            OLDEST.1
        )
    })
}

/// Returns the major and minor number of a version: those of `n5.1`, `4.4.2-0ubuntu0` and `7:6.0`.
fn number(version: &str) -> Option<(u32, u32)> {
    let version = version.strip_prefix('n').unwrap_or(version);
    let mut numbers = version.split(|c: char| !c.is_ascii_digit());
    let major: u32 = numbers.next()?.parse().ok()?;
    let minor = numbers.next().and_then(|minor| minor.parse().ok());
    // A date, as in builds of one day.
    (major < 1000).then_some((major, minor.unwrap_or(0)))
}

/// Returns the presentation time of the first frame that the filter `showinfo` describes in a line.
fn shown_time(line: &str) -> Option<i64> {
    let (_, said) = line.split_once("Parsed_showinfo")?;
    let (_, said) = said.split_once("] n:")?;
    let (_, said) = said.split_once("pts:")?;
    said.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_have_two_numbers_or_none() {
        assert_eq!(number("5.1.6-0+deb12u1"), Some((5, 1)));
        assert_eq!(number("4.4.2-0ubuntu0.22.04.1"), Some((4, 4)));
        assert_eq!(number("n7.0"), Some((7, 0)));
        assert_eq!(number("8"), Some((8, 0)));
        assert_eq!(number("N-113456-gabc"), None);
        assert_eq!(number("2024-01-01-git-abc"), None);
    }

    #[test]
    fn the_time_of_a_frame_is_read_from_the_log() {
        let line = "[Parsed_showinfo_0 @ 0x55] [info] n:   0 pts: 153088 pts_time:9.96667 pos: 1";
        assert_eq!(shown_time(line), Some(153_088));
        assert_eq!(
            shown_time("[Parsed_showinfo_0 @ 0x55] [info] config in time_base: 1/15360"),
            None
        );
    }
}
