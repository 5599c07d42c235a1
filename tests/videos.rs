//! Videos: the frames of all kinds of files, rejects of files that cannot be used, and faults of the
//! decoder itself.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use ovchat_data::store::{Images, RunFolder};
use ovchat_data::tables::{Pair, Prompt, Row, Video};
use ovchat_models::preprocess::{Bicubic, Rgb, decode};
use serde_json::json;

use crate::bad_input::rejects;
use crate::people::Page;
use crate::run::{SCRIPTED, rows};
use crate::scene::{CommandOutput, Scene, said};

/// The folder of `ffmpeg`, if it is installed.
static FFMPEG: LazyLock<Option<PathBuf>> = LazyLock::new(|| {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).find(|folder| folder.join("ffmpeg").is_file())
});

/// Returns false, and says so past the capture of the test harness, if there is no decoder.
pub fn has_ffmpeg(test: &str) -> bool {
    if FFMPEG.is_none() {
        writeln!(
            std::io::stderr(),
            "SKIPPED {test}: ffmpeg is not installed (apt-get install ffmpeg)"
        )
        .unwrap();
    }
    FFMPEG.is_some()
}

/// True if the installed `ffmpeg` is version 6 or later, which has other options than 5.1.
fn is_modern() -> bool {
    let output = Command::new("ffmpeg").arg("-version").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.strip_prefix("ffmpeg version ").unwrap_or_default();
    let major = version.trim_start_matches('n').split('.').next();
    major
        .and_then(|major| major.parse().ok())
        .is_none_or(|major: u32| major >= 6)
}

/// The option for the times of frames.
fn pace(mode: &str) -> String {
    let option = if is_modern() { "-fps_mode" } else { "-vsync" };
    format!("{option} {mode}")
}

/// Makes a file in a scene with `ffmpeg`.
fn make(scene: &Scene, name: &str, arguments: &str) {
    let output = Command::new("ffmpeg")
        .args(["-nostdin", "-v", "error", "-y"])
        .args(arguments.split_whitespace())
        .arg(scene.path(name))
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{name}: {words}");
}

/// The start of the arguments for a moving test pattern: size, frames a second, seconds.
fn pattern(size: &str, rate: u32, seconds: u32) -> String {
    format!("-f lavfi -i testsrc2=size={size}:rate={rate}:duration={seconds}")
}

const H264: &str = "-c:v libx264 -preset ultrafast -pix_fmt yuv420p -threads 1";

/// Makes a film of the moving pattern in a scene.
fn film(scene: &Scene, name: &str, size: &str, rate: u32, seconds: u32) {
    let arguments = format!("{} {H264}", pattern(size, rate, seconds));
    make(scene, name, &arguments);
}

/// Writes a pipeline over records, each about one file, and their list.
fn records(scene: &Scene, names: &[&str], settings: &str) {
    let record = |name: &&str| json!({"id": name, "video": name, "prompt": "What happens?"});
    let list: Vec<_> = names.iter().map(record).collect();
    scene.write("prompts.json", serde_json::to_vec(&list).unwrap());
    let from = format!("from: prompts.json, video: {{ {settings} }}");
    scene.write("p.yaml", SCRIPTED.replace("from: prompts.json", &from));
}

/// Loads the prompts; all records may be rejects.
const LOAD: [&str; 6] = [
    "run",
    "p.yaml",
    "--until",
    "prompts",
    "--set",
    "reject_share_max=1",
];

/// Loads records about files.
fn load(scene: &Scene, names: &[&str], settings: &str) -> CommandOutput {
    records(scene, names, settings);
    scene.pipeline(&LOAD)
}

fn videos(scene: &Scene) -> Vec<Video> {
    let run = RunFolder::read(&scene.path("runs/scripted")).unwrap();
    let files = run.manifest().videos.iter();
    let files = files.map(|file| run.root().join(&file.file)).collect();
    ovchat_data::store::TableReader::new(files)
        .flat_map(|batch| Video::from_batch(&batch.unwrap()).unwrap())
        .collect()
}

/// Returns the pixels of a frame of a run.
fn pixels(scene: &Scene, id: &str) -> Rgb {
    let run = RunFolder::read(&scene.path("runs/scripted")).unwrap();
    let mut images = Images::open(run.root(), &run.manifest().images).unwrap();
    decode(&images.bytes(id).unwrap(), 1 << 24).unwrap()
}

/// Decodes all frames of a file in one go.
fn all_frames(file: &Path, width: usize, height: usize) -> Vec<Vec<u8>> {
    let output = Command::new("ffmpeg")
        .args(["-nostdin", "-v", "error", "-i"])
        .arg(file)
        .args(pace("passthrough").split(' '))
        .args(["-f", "rawvideo", "-pix_fmt", "rgb24", "-"])
        .output()
        .unwrap();
    let frames = output.stdout.chunks_exact(3 * width * height);
    frames.map(<[u8]>::to_vec).collect()
}

#[test]
fn frames_become_images_once_and_prompts_name_them() {
    if !has_ffmpeg("frames_become_images_once_and_prompts_name_them") {
        return;
    }
    let scene = Scene::new();
    film(&scene, "a.mp4", "64x48", 10, 3);
    film(&scene, "big.mp4", "500x200", 10, 1);
    let list = json!([
        {"id": "one", "video": "a.mp4", "prompt": "<video>\nWhat happens?"},
        {"id": "two", "videos": ["a.mp4", "big.mp4"], "prompt": "Which is <video> and which <video>?"},
        {"id": "old", "video": "a.mp4", "conversations": [
            {"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "So."}]},
    ]);
    scene.write("prompts.json", list.to_string());
    let from = "from: prompts.json, video: { frames: 4 }";
    scene.write("p.yaml", SCRIPTED.replace("from: prompts.json", from));
    scene.succeeds(&["run", "p.yaml"]);
    let prompts: Vec<Prompt> = rows(&scene, "prompts", None);
    let frames = |prompt: usize, video: usize| {
        let videos = prompts[prompt].videos.as_ref().unwrap();
        videos[video].frame_ids.clone()
    };
    assert_eq!(prompts[0].question, "What happens?");
    assert_eq!(prompts[2].question, "Why?");
    assert_eq!(prompts[0].image.as_deref(), Some("a.mp4"));
    assert_eq!(frames(0, 0), frames(1, 0));
    let all = videos(&scene);
    assert_eq!(all.len(), 2);
    let a = &all[0];
    assert_eq!((a.frames, a.width, a.height), (30, 64, 48));
    assert_eq!((&*a.codec, a.fps), ("h264", Some(10.0)));
    assert_eq!(a.indices, [0, 9, 19, 29]);
    assert_eq!(a.frame_ids, frames(0, 0));
    assert!(a.decoder.starts_with("ffmpeg "));
    let expected = all_frames(&scene.path("a.mp4"), 64, 48);
    for (id, index) in a.frame_ids.iter().zip(&a.indices) {
        assert_eq!(pixels(&scene, id).data, expected[*index as usize]);
    }
    // A large frame is stored as the tower sees it.
    let large = all_frames(&scene.path("big.mp4"), 500, 200);
    let frame = Rgb {
        width: 500,
        height: 200,
        data: large[9].clone(),
    };
    let stored = pixels(&scene, &frames(1, 1)[3]);
    assert_eq!(stored, Bicubic::Pillow.resize(&frame, 384, 384));
    // The later stages have the videos, too.
    let pairs: Vec<Pair> = rows(&scene, "pairs", Some(1));
    assert!(!pairs.is_empty());
    assert!(pairs.iter().all(|pair| pair.videos.is_some()));
    // Without a decoder, what was decoded is used again when the records change.
    let more = json!({"id": "new", "prompt": "How?"});
    let mut list = list;
    list.as_array_mut().unwrap().push(more);
    scene.write("prompts.json", list.to_string());
    let again = said(scene.command(&LOAD).env("PATH", "").output().unwrap());
    assert_eq!(again.code, Some(0), "{}", again.err);
    let prompts: Vec<Prompt> = rows(&scene, "prompts", None);
    assert_eq!((prompts.len(), videos(&scene).len()), (4, 2));
    let told = scene.succeeds(&[
        "sql",
        "scripted",
        "select codec, frames, array_length(frame_ids) as chosen from videos order by path",
        "--format",
        "csv",
    ]);
    assert_eq!(told.out, "codec,frames,chosen\nh264,30,4\nh264,10,4\n");
}

/// Returns a scene with valid files of many kinds.
fn of_all_kinds() -> Scene {
    let scene = Scene::new();
    let plain = pattern("96x64", 10, 2);
    for (name, arguments) in [
        (
            "interlaced.mp4",
            format!("{plain} {H264} -flags +ilme+ildct -x264opts tff=1"),
        ),
        (
            "variable.mkv",
            format!(
                "{plain} -vf select='not(eq(mod(n\\,3)\\,1))' {} {H264}",
                pace("vfr")
            ),
        ),
        ("late.mkv", format!("{plain} {H264} -output_ts_offset 5")),
        ("packed.avi", format!("{plain} -c:v mpeg4 -threads 1")),
        ("small.gif", plain.clone()),
        ("film.mp4", format!("{plain} {H264}")),
    ] {
        make(&scene, name, &arguments);
    }
    let film = scene.path("film.mp4");
    // With sound, a cover and subtitles.
    make(&scene, "cover.png", &format!("{plain} -frames:v 1"));
    scene.write("lines.srt", "1\n00:00:00,000 --> 00:00:01,000\nHello.\n");
    let [cover, lines] = ["cover.png", "lines.srt"].map(|name| scene.path(name));
    let (all, cover, lines) = (film.display(), cover.display(), lines.display());
    make(
        &scene,
        "whole.mp4",
        &format!(
            "-i {all} -f lavfi -i sine=duration=2 -i {cover} -i {lines} -map 0 -map 1 -map 2 -map 3 -c:v copy -c:a \
             aac -c:s mov_text -disposition:v:1 attached_pic"
        ),
    );
    make(
        &scene,
        "turned.mp4",
        &match is_modern() {
            true => format!("-display_rotation 90 -i {} -c copy", film.display()),
            false => format!("-i {} -c copy -metadata:s:v rotate=90", film.display()),
        },
    );
    make(
        &scene,
        "cut.mp4",
        &format!("-ss 0.75 -i {} -c copy", film.display()),
    );
    scene
}

#[test]
fn files_of_all_kinds_are_read() {
    if !has_ffmpeg("files_of_all_kinds_are_read") {
        return;
    }
    let scene = of_all_kinds();
    let names = [
        "cut.mp4",
        "film.mp4",
        "interlaced.mp4",
        "late.mkv",
        "packed.avi",
        "small.gif",
        "turned.mp4",
        "variable.mkv",
        "whole.mp4",
    ];
    let told = load(&scene, &names, "frames: 5");
    assert_eq!(rejects(&scene), [], "{}", told.err);
    let mut found: Vec<(String, [i64; 3])> = videos(&scene)
        .into_iter()
        .map(|video| {
            let name = Path::new(&video.path).file_name().unwrap();
            let size = [video.frames, video.width.into(), video.height.into()];
            (name.to_string_lossy().into_owned(), size)
        })
        .collect();
    found.sort();
    let sizes: Vec<[i64; 3]> = found.iter().map(|(_, size)| *size).collect();
    let expected = [
        // An edit list hides the frames before the cut.
        [
            all_frames(&scene.path("cut.mp4"), 96, 64).len() as i64,
            96,
            64,
        ],
        [20, 96, 64],
        [20, 96, 64],
        [20, 96, 64],
        [20, 96, 64],
        [20, 96, 64],
        [20, 64, 96],
        [
            all_frames(&scene.path("variable.mkv"), 96, 64).len() as i64,
            96,
            64,
        ],
        [20, 96, 64],
    ];
    assert_eq!(sizes, expected, "{found:?}");
}

#[test]
fn frames_far_apart_are_sought_and_equal_those_of_a_full_decode() {
    if !has_ffmpeg("frames_far_apart_are_sought_and_equal_those_of_a_full_decode") {
        return;
    }
    let scene = Scene::new();
    let long = pattern("64x48", 30, 40);
    let with_b = "-c:v libx264 -preset veryfast -bf 3 -g 200 -pix_fmt yuv420p -threads 1";
    make(&scene, "a.mp4", &format!("{long} {with_b}"));
    make(
        &scene,
        "b.mkv",
        &format!("{long} {with_b} -output_ts_offset 7.3"),
    );
    records(&scene, &["a.mp4", "b.mkv"], "frames: 4");
    // Decoding from the start fails.
    let script = format!(
        "{CURRENT}\ncase \"$*\" in *'eq(n,'*) exit 9;; esac\n{}",
        real()
    );
    let told = with_fake(&scene, &script);
    assert_eq!(rejects(&scene), [], "{}", told.err);
    for video in videos(&scene) {
        assert_eq!(video.indices, [0, 399, 799, 1199]);
        let expected = all_frames(Path::new(&video.path), 64, 48);
        for (id, index) in video.frame_ids.iter().zip(&video.indices) {
            let same = pixels(&scene, id).data == expected[*index as usize];
            assert!(same, "frame {index} of {}", video.path);
        }
    }
}

/// Writes files that cannot be used, and returns their names with a part of the reason.
fn unusable(scene: &Scene) -> Vec<(&'static str, &'static str)> {
    let film = format!("{} {H264} -movflags +faststart", pattern("128x96", 10, 4));
    make(scene, "film.mp4", &film);
    let bytes = fs::read(scene.path("film.mp4")).unwrap();
    scene.write("truncated.mp4", &bytes[..bytes.len() / 2]);
    let mut damaged = bytes.clone();
    let middle = bytes.len() / 2;
    for (place, byte) in damaged[middle..middle + 400].iter_mut().enumerate() {
        *byte = (place * 37 % 256) as u8;
    }
    scene.write("damaged.mp4", damaged);
    make(
        scene,
        "whole.webm",
        &format!("{} -c:v libvpx -threads 1", pattern("128x96", 10, 2)),
    );
    let webm = fs::read(scene.path("whole.webm")).unwrap();
    scene.write("cut.webm", &webm[..webm.len() / 2]);
    let [one, other] = ["yuv420p", "yuv444p"].map(|format| {
        let name = format!("{format}.mkv");
        make(
            scene,
            &name,
            &format!(
                "{} -c:v libx264 -threads 1 -pix_fmt {format}",
                pattern("64x48", 10, 1)
            ),
        );
        name
    });
    scene.write("list.txt", format!("file {one}\nfile {other}\n"));
    make(
        scene,
        "changing.mkv",
        &format!("-f concat -i {} -c copy", scene.path("list.txt").display()),
    );
    scene.write("empty.mp4", "");
    scene.write("words.mp4", "these are words");
    let key = "-encryption_scheme cenc-aes-ctr -encryption_key 00112233445566778899aabbccddeeff \
               -encryption_kid 000102030405060708090a0b0c0d0e0f";
    make(
        scene,
        "encrypted.mp4",
        &format!("{} {H264} {key}", pattern("128x96", 10, 1)),
    );
    make(scene, "audio.m4a", "-f lavfi -i sine=duration=1 -c:a aac");
    // The header of a GIF claims 16,000 x 9,000 pixels.
    make(scene, "large.gif", &pattern("32x32", 5, 1));
    let mut large = fs::read(scene.path("large.gif")).unwrap();
    scene.write("cut.gif", &large[..large.len() - 2]);
    large[6..8].copy_from_slice(&16_000u16.to_le_bytes());
    large[8..10].copy_from_slice(&9_000u16.to_le_bytes());
    scene.write("large.gif", large);
    scene.write(
        "playlist.mp4",
        format!(
            "#EXTM3U\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n",
            scene.path("film.mp4").display()
        ),
    );
    let fifo = Command::new("mkfifo").arg(scene.path("pipe.mp4")).status();
    assert!(fifo.unwrap().success());
    fs::create_dir(scene.path("folder.mp4")).unwrap();
    vec![
        ("gone.mp4", "video not found: "),
        ("truncated.mp4", "partial file"),
        ("damaged.mp4", "error while decoding"),
        ("cut.webm", "File ended prematurely"),
        ("cut.gif", "the file is truncated"),
        ("changing.mkv", "the pixel format of the frames changes"),
        ("empty.mp4", "is empty"),
        ("words.mp4", "Invalid data"),
        ("encrypted.mp4", "is encrypted"),
        ("audio.m4a", "no video stream"),
        ("large.gif", "larger than 8K"),
        ("playlist.mp4", "Invalid data"),
        ("pipe.mp4", "it is a FIFO"),
        ("folder.mp4", ""),
    ]
}

#[test]
fn a_file_that_cannot_be_used_costs_its_row_and_the_reason_names_it() {
    if !has_ffmpeg("a_file_that_cannot_be_used_costs_its_row_and_the_reason_names_it") {
        return;
    }
    let scene = Scene::new();
    let bad = unusable(&scene);
    let mut names: Vec<&str> = bad.iter().map(|(name, _)| *name).collect();
    names.push("film.mp4");
    let told = load(&scene, &names, "frames: 3");
    assert_eq!(told.code, Some(0), "{}", told.err);
    let mut reasons = rejects(&scene);
    reasons.sort_by_key(|(id, _)| names.iter().position(|name| id.ends_with(name)));
    assert_eq!(reasons.len(), bad.len(), "{reasons:#?}");
    for ((name, part), (_, reason)) in bad.iter().zip(&reasons) {
        assert!(reason.contains(name) && reason.contains(part), "{reason}");
    }
    assert_eq!(rows::<Prompt>(&scene, "prompts", None).len(), 1);
}

/// Writes a program in place of `ffmpeg`, with the real `ffprobe` beside it. Returns the command that
/// runs the load stage with it.
fn command_with_fake(scene: &Scene, script: &str) -> Command {
    let fake = scene.path("bin/ffmpeg");
    scene.write("bin/ffmpeg", format!("#!/bin/sh\n{script}\n"));
    fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).unwrap();
    let probe = scene.path("bin/ffprobe");
    drop(fs::remove_file(&probe));
    let real = FFMPEG.as_ref().unwrap();
    symlink(real.join("ffprobe"), probe).unwrap();
    let mut command = scene.command(&LOAD);
    command.env("PATH", scene.path("bin"));
    command
}

fn with_fake(scene: &Scene, script: &str) -> CommandOutput {
    said(command_with_fake(scene, script).output().unwrap())
}

/// The end of a script that does the real work.
fn real() -> String {
    format!(
        "exec {} \"$@\"",
        FFMPEG.as_ref().unwrap().join("ffmpeg").display()
    )
}

/// The answer of a current version.
const CURRENT: &str = "case \"$1\" in -version) echo 'ffmpeg version 6.1'; exit 0;; esac";

#[test]
fn a_decoder_that_is_missing_old_or_killed_stops_the_stage_and_nothing_is_lost() {
    if !has_ffmpeg("a_decoder_that_is_missing_old_or_killed_stops_the_stage_and_nothing_is_lost") {
        return;
    }
    let scene = Scene::new();
    film(&scene, "a.mp4", "64x48", 10, 1);
    records(&scene, &["a.mp4"], "frames: 3");
    let missing = said(scene.command(&LOAD).env("PATH", "").output().unwrap());
    assert_eq!(missing.code, Some(1));
    for words in [
        "a.mp4",
        "`ffmpeg` was not found; install ffmpeg 4.4 or later",
    ] {
        assert!(missing.err.contains(words), "{}", missing.err);
    }
    let checked = said(
        scene
            .command(&["check", "p.yaml"])
            .env("PATH", "")
            .output()
            .unwrap(),
    );
    assert_eq!(checked.code, Some(0), "{}", checked.err);
    assert!(
        checked
            .err
            .contains("cannot decode them: `ffmpeg` was not found"),
        "{}",
        checked.err
    );
    let old = with_fake(&scene, "echo 'ffmpeg version 3.4.11-0ubuntu0.1 Copyright'");
    assert_eq!(old.code, Some(1));
    let words = "has version 3.4.11-0ubuntu0.1, which is too old; install ffmpeg 4.4 or later";
    assert!(old.err.contains(words), "{}", old.err);
    let silent = with_fake(&scene, "exit 0");
    assert!(
        silent.err.contains("does not print a version"),
        "{}",
        silent.err
    );
    let killed = with_fake(&scene, &format!("{CURRENT}\nkill -9 $$"));
    assert_eq!(killed.code, Some(1));
    assert!(
        killed.err.contains("ffmpeg was killed (signal 9)"),
        "{}",
        killed.err
    );
    // With a decoder again, the run goes on.
    scene.succeeds(&LOAD);
    assert_eq!(rows::<Prompt>(&scene, "prompts", None).len(), 1);
}

#[test]
fn a_decoder_that_hangs_or_writes_too_little_or_too_much_costs_the_row() {
    if !has_ffmpeg("a_decoder_that_hangs_or_writes_too_little_or_too_much_costs_the_row") {
        return;
    }
    for (script, part) in [
        (
            "sleep 100",
            "ffmpeg did not finish within 2 s; raise `timeout_s`",
        ),
        ("printf abc", "ffmpeg wrote too few bytes"),
        (
            "/bin/cat /dev/zero",
            "the size or the pixel format of the frames changes",
        ),
        ("exit 0", "the video stream ends before its last frame"),
        (
            "echo '[h264 @ 0x55] broken' >&2; exit 1",
            ": ffmpeg: [h264] broken",
        ),
        ("kill -11 $$", "ffmpeg crashed with signal 11"),
    ] {
        let scene = Scene::new();
        film(&scene, "a.mp4", "64x48", 10, 1);
        records(&scene, &["a.mp4"], "frames: 3, timeout_s: 2");
        let told = with_fake(&scene, &format!("{CURRENT}\n{script}"));
        assert_eq!(told.code, Some(0), "{script}: {}", told.err);
        let reasons = rejects(&scene);
        assert!(reasons[0].1.contains(part), "{script}: {reasons:?}");
    }
}

#[test]
fn version_4_4_is_asked_with_its_own_option() {
    if !has_ffmpeg("version_4_4_is_asked_with_its_own_option") {
        return;
    }
    let scene = Scene::new();
    film(&scene, "a.mp4", "64x48", 10, 1);
    records(&scene, &["a.mp4"], "frames: 3");
    let script = format!(
        "case \"$*\" in\n-version) echo 'ffmpeg version 4.4.2-0ubuntu0.22.04.1'; exit 0;;\n*fps_mode*) exit \
         9;;\n*'-vsync 0'*) {};;\nesac\nexit 8",
        real()
    );
    with_fake(&scene, &script);
    assert_eq!(rejects(&scene), []);
    let video = &videos(&scene)[0];
    assert_eq!(video.decoder, "ffmpeg 4.4.2-0ubuntu0.22.04.1");
    let expected = all_frames(&scene.path("a.mp4"), 64, 48);
    assert_eq!(pixels(&scene, &video.frame_ids[2]).data, expected[9]);
}

/// Frames of a run that were lost are decoded again, and must be the same.
#[test]
fn frames_that_are_decoded_again_must_be_the_same() {
    if !has_ffmpeg("frames_that_are_decoded_again_must_be_the_same") {
        return;
    }
    let scene = Scene::new();
    film(&scene, "a.mp4", "64x48", 10, 1);
    records(&scene, &["a.mp4"], "frames: 3");
    scene.succeeds(&LOAD);
    let before = scene.tables("runs/scripted");
    for file in fs::read_dir(scene.path("runs/scripted/images")).unwrap() {
        fs::remove_file(file.unwrap().path()).unwrap();
    }
    let config = "[Parsed_showinfo_1 @ 0x1] [info] config in time_base: 1/10240";
    let other = format!("{CURRENT}\necho '{config}' >&2\n/bin/head -c 27648 /dev/zero");
    let told = with_fake(&scene, &other);
    assert_eq!(told.code, Some(1));
    assert!(
        told.err
            .contains("ffmpeg 6.1 decodes it to other frames than"),
        "{}",
        told.err
    );
    scene.succeeds(&LOAD);
    assert_eq!(scene.tables("runs/scripted"), before);
}

/// Returns a scene with two videos and an image, and a loop of one round over three questions about
/// them, with the networks of the small world.
#[cfg(feature = "torch")]
fn with_networks() -> (Scene, String) {
    use crate::interleaved::pipeline;
    use crate::scene::ROOT;

    let scene = Scene::new();
    film(&scene, "short.mp4", "56x56", 8, 2);
    film(&scene, "long.mp4", "90x60", 8, 7);
    let samples = format!("{ROOT}/data-samples");
    fs::copy(
        format!("{samples}/images/train/0001.png"),
        scene.path("a.png"),
    )
    .unwrap();
    let list = json!([
        {"id": "one", "video": "short.mp4", "prompt": "What moves?"},
        {"id": "two", "video": ["short.mp4", "long.mp4"], "prompt": "Is <video> longer than <video>?"},
        {"id": "beside", "video": "long.mp4", "image": "a.png", "prompt": "<video>\nIs <image> in it?"},
    ]);
    scene.write("prompts.json", list.to_string());
    let pipeline = pipeline("scripted", "video: { frames: 16, rule: llava_next }");
    scene.write("p.yaml", &pipeline);
    (scene, pipeline)
}

#[cfg(feature = "torch")]
#[test]
fn videos_are_sampled_judged_trained_on_and_counted() {
    if !has_ffmpeg("videos_are_sampled_judged_trained_on_and_counted") {
        return;
    }
    let (scene, _) = with_networks();
    scene.succeeds(&["run", "p.yaml"]);
    assert_eq!(rejects(&scene), []);
    let counts = videos(&scene).into_iter().map(|video| video.indices.len());
    assert_eq!(counts.collect::<Vec<_>>(), [2, 7]);
    let told = scene.succeeds(&["plan", "p.yaml", "--format", "json"]);
    let plan: serde_json::Value = serde_json::from_str(&told.out).unwrap();
    let tokens = &plan["tokens"][0];
    assert_eq!(
        (&tokens["table"], &tokens["longest_id"]),
        (&json!("candidates"), &json!("beside")),
        "{plan}"
    );
    let query = "select sum(prompt_tokens) as n from telemetry where stage = 'candidates'";
    let told = scene.succeeds(&["sql", "scripted", query, "--format", "csv"]);
    assert_eq!(told.out, format!("n\n{}\n", tokens["sum"]));
}

#[cfg(feature = "torch")]
#[test]
fn a_video_that_is_longer_than_the_context_costs_its_row() {
    if !has_ffmpeg("a_video_that_is_longer_than_the_context_costs_its_row") {
        return;
    }
    let (scene, pipeline) = with_networks();
    let list = json!([
        {"id": "short", "prompt": "What moves?"},
        {"id": "long", "video": "long.mp4", "prompt": "What moves?"},
    ]);
    scene.write("prompts.json", list.to_string());
    scene.write(
        "p.yaml",
        pipeline.replace("frames: 16, rule: llava_next", "frames: 600"),
    );
    scene.succeeds(&["run", "p.yaml", "--until", "candidates"]);
    let reasons = rejects(&scene);
    assert_eq!(reasons.len(), 1);
    let words = "exceeds the model's context of 2048; use a smaller image, fewer frames";
    assert!(reasons[0].1.contains(words), "{reasons:?}");
}

#[test]
fn annotators_see_the_frames_of_a_video_where_it_stands() {
    if !has_ffmpeg("annotators_see_the_frames_of_a_video_where_it_stands") {
        return;
    }
    let scene = Scene::new();
    film(&scene, "a.mp4", "64x48", 10, 1);
    let turns = json!([{"role": "user", "text": "Hello."}, {"role": "assistant", "text": "Hi."}]);
    let list =
        json!([{"id": "a", "video": "a.mp4", "turns": turns, "prompt": "<video>\nWhat moves?"}]);
    scene.write("prompts.json", list.to_string());
    let people = "ask_people: { candidates: candidates, rewards: [rewards], labels_min: 1 }";
    let pipeline = SCRIPTED
        .replace(
            "from: prompts.json",
            "from: prompts.json, video: { frames: 3 }",
        )
        .replace("select_extremes: { rewards: rewards }", people)
        .replace("rounds: 2", "rounds: 1");
    scene.write("p.yaml", pipeline);
    let told = scene.pipeline(&["run", "p.yaml"]);
    assert_eq!(told.code, Some(3), "{}", told.err);
    let page = Page::open(&scene);
    let question = page.next("ann")["question"].clone();
    let frames = videos(&scene)[0].frame_ids.clone();
    let parts = json!([{"video": frames}, "\nWhat moves?"]);
    assert_eq!(
        (&question["parts"], &question["pictures"]),
        (&parts, &json!([]))
    );
    for frame in &frames {
        let address = format!("{}/picture/{frame}?key={}", page.address, page.key);
        let bytes = ureq::get(&address).call().unwrap().body_mut().read_to_vec();
        assert!(bytes.unwrap().starts_with(b"\x89PNG"));
    }
}

#[test]
fn hundreds_of_frames_are_chosen_at_once() {
    if !has_ffmpeg("hundreds_of_frames_are_chosen_at_once") {
        return;
    }
    let scene = Scene::new();
    film(&scene, "a.mp4", "32x32", 30, 10);
    let told = load(&scene, &["a.mp4"], "frames: 250");
    assert_eq!(rejects(&scene), [], "{}", told.err);
    let video = &videos(&scene)[0];
    let expected = all_frames(&scene.path("a.mp4"), 32, 32);
    for number in [0, 99, 100, 101, 249] {
        let index = video.indices[number] as usize;
        assert_eq!(
            pixels(&scene, &video.frame_ids[number]).data,
            expected[index]
        );
    }
}

#[test]
fn the_time_limit_is_that_of_a_file_and_not_of_a_seek() {
    if !has_ffmpeg("the_time_limit_is_that_of_a_file_and_not_of_a_seek") {
        return;
    }
    let scene = Scene::new();
    film(&scene, "a.mp4", "32x32", 30, 40);
    records(&scene, &["a.mp4"], "frames: 4, timeout_s: 3");
    with_fake(&scene, &format!("{CURRENT}\n/bin/sleep 1\n{}", real()));
    let reasons = rejects(&scene);
    assert!(
        reasons[0].1.contains("did not finish within 3 s"),
        "{reasons:?}"
    );
}

#[test]
fn a_file_that_changes_while_it_is_read_costs_its_row() {
    if !has_ffmpeg("a_file_that_changes_while_it_is_read_costs_its_row") {
        return;
    }
    let scene = Scene::new();
    film(&scene, "a.mp4", "32x32", 10, 1);
    fs::copy(scene.path("a.mp4"), scene.path("other.mp4")).unwrap();
    records(&scene, &["a.mp4"], "frames: 3");
    let [from, to] = ["other.mp4", "a.mp4"].map(|name| scene.path(name));
    let swap = format!("/bin/mv {} {}", from.display(), to.display());
    with_fake(&scene, &format!("{CURRENT}\n{swap}\n{}", real()));
    let reasons = rejects(&scene);
    assert!(
        reasons[0].1.contains("the file changed while it was read"),
        "{reasons:?}"
    );
    assert_eq!(videos(&scene), []);
}

#[test]
fn a_decoder_ends_with_a_program_that_is_killed() {
    if !has_ffmpeg("a_decoder_ends_with_a_program_that_is_killed") {
        return;
    }
    let scene = Scene::new();
    film(&scene, "a.mp4", "32x32", 10, 1);
    records(&scene, &["a.mp4"], "frames: 3");
    let pid = scene.path("pid");
    let fifo = Command::new("mkfifo").arg(&pid).status();
    assert!(fifo.unwrap().success());
    let script = format!("{CURRENT}\necho $$ >{}\nexec /bin/sleep 100", pid.display());
    let mut run = command_with_fake(&scene, &script).spawn().unwrap();
    let decoder = fs::read_to_string(&pid).unwrap();
    let process = Path::new("/proc").join(decoder.trim());
    assert!(process.exists());
    run.kill().unwrap();
    run.wait().unwrap();
    let is_gone = || {
        let state = fs::read_to_string(process.join("stat")).unwrap_or_default();
        // A zombie waits for the init process.
        state.is_empty() || state.contains(") Z")
    };
    let begun = std::time::Instant::now();
    while !is_gone() {
        assert!(begun.elapsed().as_secs() < 20, "the decoder still runs");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}
