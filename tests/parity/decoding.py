"""Compares the frames that `load_prompts` stores of videos with those of decord, torchcodec and PyAV, pixel by pixel.

usage: decoding.py [--pipeline PATH] [--keep DIR]      (in an environment of requirements.txt and requirements-video.txt)

Makes a file of every kind with the system's ffmpeg (5.1 or later), runs the pipeline over all of them and prints a table.
Exits 1 if a file of 8 bits differs in any value, or if a reference counts other frames or fails and WRONG says nothing of it.
"""
import argparse
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

SHOWN = 8
SIDE = 384
PIPELINE = f"""pipeline: decoding
reject_share_max: 1.0
stages:
  prompts:
    load_prompts: {{ from: clips.json, video: {{ frames: {SHOWN} }} }}
"""
# In this order one of them is the reference: the first that WRONG does not name.
LIBRARIES = ["decord", "torchcodec", "PyAV"]


@dataclass
class Kind:
    name: str
    file: str
    # What ffmpeg writes it with, from new frames or from the file `of`, with the options `before` it.
    arguments: list
    count: int = 100
    size: tuple = (160, 96)
    rate: int = 25
    of: str = ""
    before: list = field(default_factory=list)
    passes: int = 1
    # Quarter turns clockwise that the file asks for.
    turns: int = 0
    # What ffprobe must say of it; otherwise this ffmpeg did not make what was meant.
    shows: str = ""
    # Whether every pixel must be equal.
    exact: bool = True
    # Whether decord reads a lossless copy in VP9.
    lossless: bool = False


def x264(*more, parameters=""):
    return ["-c:v", "libx264", "-preset", "veryfast", "-bf", "3", "-pix_fmt", "yuv420p", "-x264-params",
            f"b-adapt=0:{parameters}".strip(":"), *more]


def x265(*more, parameters=""):
    return ["-c:v", "libx265", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-x265-params",
            f"log-level=none:bframes=3:{parameters}".strip(":"), *more]


def tagged(matrix, primaries="", transfer=""):
    return ["-vf", f"scale=out_color_matrix={matrix}", "-colorspace", matrix, "-color_primaries", primaries or matrix,
            "-color_trc", transfer or matrix]


COPY = ["-map", "0", "-c", "copy"]
NO_EDITS = [*COPY, "-use_editlist", "0"]
FRAGMENTS = [*COPY, "-movflags", "frag_keyframe+empty_moov"]
# A packet that begins a group of an open GOP is followed by frames that are shown before it.
OPEN = "open-gop=1:keyint=24:min-keyint=24:scenecut=0"
REFRESH = "intra-refresh=1:keyint=30"
UNEVEN = ["-vf", "select='not(mod(n,7))+not(mod(n,3))'", "-vsync", "vfr"]
SOUND = ["-f", "lavfi", "-i", "sine=duration=6", "-map", "0:v", "-map", "1:a"]
ALT_REF = ["-auto-alt-ref", "1", "-lag-in-frames", "25", "-arnr-maxframes", "7", "-arnr-strength", "5"]
VP8 = ["-c:v", "libvpx", "-b:v", "200k", "-cpu-used", "4", "-pix_fmt", "yuv420p"]
VP9 = ["-c:v", "libvpx-vp9", "-b:v", "300k", "-deadline", "realtime", "-cpu-used", "8", "-pix_fmt", "yuv420p"]
AV1 = ["-c:v", "libaom-av1", "-b:v", "200k", "-cpu-used", "8", "-pix_fmt", "yuv420p"]
SVT = ["-c:v", "libsvtav1", "-b:v", "200k", "-preset", "10", "-pix_fmt", "yuv420p"]
MPEG4 = ["-c:v", "mpeg4", "-q:v", "4", "-pix_fmt", "yuv420p"]
XVID = ["-c:v", "libxvid", "-q:v", "4", "-bf", "2", "-pix_fmt", "yuv420p"]
# Of the chosen frames, 335 and 670 are the last and the last but one before a group of 24.
LONG = dict(count=7 * 335 + 1, size=(64, 48))
KINDS = [
    Kind("H.264", "h264.mp4", x264(), shows="has_b_frames=2"),
    Kind("H.264, tagged bt.601", "bt601.mp4", x264(*tagged("smpte170m")), shows="color_space=smpte170m"),
    Kind("H.264, tagged bt.709", "bt709.mp4", x264(*tagged("bt709")), shows="color_space=bt709"),
    Kind("H.264, full range", "full.mp4", x264("-vf", "scale=out_range=full", "-color_range", "pc"), shows="color_range=pc"),
    Kind("H.264, 4:4:4, odd size", "odd.mp4", x264("-pix_fmt", "yuv444p"), size=(161, 91), shows="height=91"),
    Kind("H.264, 4:2:2", "422.mp4", x264("-pix_fmt", "yuv422p"), shows="pix_fmt=yuv422p"),
    Kind("H.264, gray", "gray.mp4", x264("-pix_fmt", "gray")),
    Kind("H.264, 10 bits", "h264-10.mp4", x264("-pix_fmt", "yuv420p10le"), shows="pix_fmt=yuv420p10le", exact=False),
    Kind("H.264, 720p", "720p.mp4", x264(*tagged("bt709")), count=40, size=(1280, 720)),
    Kind("H.264, one frame", "one.mp4", x264(), count=1),
    Kind("H.264, 5 frames", "five.mp4", x264(), count=5),
    Kind("H.264, interlaced", "interlaced.mp4", shows="field_order=t",
         arguments=x264("-flags", "+ilme+ildct", "-vf", "tinterlace=interleave_top,fieldorder=tff")),
    Kind("H.264, rotated", "rotated.mp4", COPY, of="h264.mp4", turns=1, shows="rotation="),
    Kind("H.264, upside down", "upside-down.mp4", COPY, of="h264.mp4", turns=2, shows="rotation="),
    Kind("H.264, 720p, rotated", "720p-rotated.mp4", COPY, of="720p.mp4", turns=3, shows="rotation="),
    Kind("H.264, pixels that are not square", "sar.mp4", x264("-vf", "setsar=4/3"), shows="sample_aspect_ratio=4:3"),
    Kind("H.264, variable frame rate", "vfr.mp4", x264(*UNEVEN)),
    Kind("H.264, edit list", "edit.mp4", COPY, of="h264.mp4", before=["-ss", "1.3"]),
    Kind("H.264, open GOP", "open.mp4", x264(parameters=OPEN)),
    Kind("H.264, open GOP, edit list", "open-edit.mp4", COPY, of="open.mp4", before=["-ss", "1.3"]),
    Kind("H.264, open GOP, cut, mp4 without edit list", "open-cut.mp4", NO_EDITS, of="open.mp4", before=["-ss", "1.3"]),
    Kind("H.264, open GOP, cut, mkv", "open-cut.mkv", COPY, of="open.mp4", before=["-ss", "1.3"]),
    Kind("H.264, intra refresh", "refresh.mp4", x264(parameters=REFRESH)),
    Kind("H.264, fragmented", "fragmented.mp4", FRAGMENTS, of="h264.mp4"),
    Kind("H.264, starts late", "late.mp4", COPY, of="h264.mp4", before=["-itsoffset", "5"], shows="start_time=5"),
    Kind("H.264, sound (AAC), mp4", "sound.mp4", [*SOUND, *x264(), "-c:a", "aac"]),
    Kind("H.264, sound (MP3), mkv", "sound.mkv", [*SOUND, *x264(), "-c:a", "libmp3lame"]),
    Kind("H.264, mkv", "h264.mkv", x264()),
    Kind("H.264, mov", "h264.mov", x264()),
    Kind("H.264, avi", "h264.avi", x264()),
    Kind("HEVC", "hevc.mp4", x265()),
    Kind("HEVC, open GOP, mkv", "hevc-open.mkv", x265(parameters=OPEN)),
    Kind("HEVC, open GOP, edit list", "hevc-open-edit.mp4", COPY, of="hevc-open.mkv", before=["-ss", "1.3"]),
    Kind("HEVC, open GOP, cut, mkv", "hevc-open-cut.mkv", COPY, of="hevc-open.mkv", before=["-ss", "1.3"]),
    Kind("HEVC, 10 bits", "hevc-10.mp4", x265("-pix_fmt", "yuv420p10le"), shows="pix_fmt=yuv420p10le", exact=False),
    Kind("HEVC, 10 bits, bt.2020", "hevc-hdr.mp4", shows="color_space=bt2020nc", exact=False,
         arguments=x265(*tagged("bt2020nc", "bt2020", "smpte2084"), "-pix_fmt", "yuv420p10le")),
    Kind("VP9", "vp9.webm", VP9),
    Kind("VP9, odd size", "vp9-odd.webm", VP9, size=(161, 91), shows="height=91"),
    Kind("VP9, alt-ref frames", "vp9-alt-ref.webm", [*VP9, "-deadline", "good", *ALT_REF], passes=2),
    Kind("VP9, transparent", "vp9-transparent.webm", [*VP9, "-pix_fmt", "yuva420p"], shows="alpha_mode=1"),
    Kind("VP9, 10 bits", "vp9-10.webm", [*VP9, "-pix_fmt", "yuv420p10le"], shows="pix_fmt=yuv420p10le", exact=False),
    Kind("VP9, sound (Opus)", "sound.webm", [*SOUND, *VP9, "-c:a", "libopus"]),
    Kind("VP8", "vp8.webm", [*VP8, "-auto-alt-ref", "0"]),
    Kind("VP8, odd size", "vp8-odd.webm", [*VP8, "-auto-alt-ref", "0"], size=(161, 91), shows="height=91"),
    # Each alt-ref frame is a packet that shows nothing; with them there must be more than 99.
    Kind("VP8, alt-ref frames", "vp8-alt-ref.webm", [*VP8, *ALT_REF], passes=2, count=97, shows="nb_read_packets=10"),
    Kind("AV1, libaom", "av1.mp4", AV1, count=40),
    Kind("AV1, SVT", "av1.mkv", SVT, count=40),
    Kind("AV1, odd size", "av1-odd.webm", AV1, count=40, size=(161, 91), shows="height=91", lossless=True),
    Kind("AV1, 10 bits", "av1-10.mp4", [*SVT, "-pix_fmt", "yuv420p10le"], count=40, shows="pix_fmt=yuv420p10le", exact=False,
         lossless=True),
    Kind("MPEG-4, avi", "mpeg4.avi", MPEG4),
    Kind("MPEG-4, odd size, avi", "mpeg4-odd.avi", MPEG4, size=(161, 91), shows="height=91"),
    Kind("MPEG-4, variable frame rate, avi", "mpeg4-vfr.avi", [*MPEG4, *UNEVEN]),
    Kind("MPEG-4, B-frames, avi", "mpeg4-b.avi", [*MPEG4, "-bf", "2"]),
    Kind("MPEG-4, B-frames, mp4", "mpeg4-b.mp4", [*MPEG4, "-bf", "2"]),
    Kind("MPEG-4, Xvid, avi", "xvid.avi", XVID),
    Kind("GIF", "gif.gif", [], count=40),
    Kind("GIF, transparent, odd size", "gif-transparent.gif", count=40, size=(161, 91), shows="height=91",
         arguments=["-vf", "colorkey=red:0.4,split[a][b];[a]palettegen[p];[b][p]paletteuse"]),
    # The frames of these lie so far apart that the program may seek. At 5 frames a second, ffmpeg seeks less far back than
    # the frames of an open GOP need.
    Kind("long: H.264", "long.mp4", x264(), count=9000, size=(64, 48)),
    Kind("long: H.264, edit list", "long-edit.mp4", COPY, of="long.mp4", before=["-ss", "61.3"]),
    Kind("long: H.264, starts late", "long-late.mp4", COPY, of="long.mp4", before=["-itsoffset", "5"], shows="start_time=5"),
    Kind("long: H.264, starts late, mkv", "long-late.mkv", COPY, of="long.mp4", before=["-itsoffset", "5"], shows="start_time=5"),
    Kind("long: H.264, starts after the sound", "long-sound.mp4", of="long.mp4", before=["-itsoffset", "3"],
         arguments=["-f", "lavfi", "-i", "sine=duration=60", "-map", "0:v", "-map", "1:a", "-c:v", "copy", "-c:a", "aac"]),
    Kind("long: H.264, variable frame rate", "long-vfr.mp4", x264(*UNEVEN), count=6000, size=(64, 48)),
    Kind("long: H.264, intra refresh", "long-refresh.mp4", x264(parameters=REFRESH), **LONG),
    Kind("long: H.264, intra refresh, mkv", "long-refresh.mkv", COPY, of="long-refresh.mp4"),
    Kind("long: H.264, open GOP", "long-open.mp4", x264(parameters=OPEN), rate=5, **LONG),
    Kind("long: H.264, open GOP, mkv", "long-open.mkv", COPY, of="long-open.mp4"),
    Kind("long: H.264, open GOP, fragmented", "long-fragmented.mp4", FRAGMENTS, of="long-open.mp4"),
    Kind("long: H.264, open GOP, cut, mp4 without edit list", "long-open-cut.mp4", NO_EDITS, of="long-open.mp4",
         before=["-ss", "61.3"]),
    Kind("long: H.264, open GOP, cut, mkv", "long-open-cut.mkv", COPY, of="long-open.mp4", before=["-ss", "61.3"]),
    Kind("long: HEVC, open GOP, mkv", "long-hevc.mkv", x265(parameters=OPEN), rate=5, **LONG),
    Kind("long: HEVC, open GOP", "long-hevc.mp4", COPY, of="long-hevc.mkv"),
    Kind("long: HEVC, open GOP, edit list", "long-hevc-edit.mp4", COPY, of="long-hevc.mkv", before=["-ss", "61.3"]),
    Kind("long: HEVC, open GOP, cut, mkv", "long-hevc-cut.mkv", COPY, of="long-hevc.mkv", before=["-ss", "61.3"]),
    Kind("long: VP9", "long-vp9.webm", VP9, **LONG),
    Kind("long: VP8, alt-ref frames", "long-vp8.webm", [*VP8, *ALT_REF], passes=2, **LONG),
    Kind("long: AV1", "long-av1.mp4", [*SVT, "-g", "48"], count=2400, size=(128, 96)),
    Kind("long: MPEG-4, avi", "long-mpeg4.avi", MPEG4, **LONG),
    Kind("long: MPEG-4, B-frames, avi", "long-mpeg4-b.avi", [*MPEG4, "-bf", "2"], **LONG),
    Kind("long: MPEG-4, B-frames, mp4", "long-mpeg4-b.mp4", [*MPEG4, "-bf", "2", "-g", "24"], rate=5, **LONG),
    Kind("long: GIF", "long.gif", [], **LONG),
]

# Where a reference is known to be wrong: there it may fail, count other frames or give others.
CUTS = ["open-cut.mp4", "open-cut.mkv", "long-open-cut.mp4", "long-open-cut.mkv", "hevc-open-cut.mkv", "long-hevc-cut.mkv"]
B_IN_AVI = ["h264.avi", "mpeg4-b.avi", "xvid.avi", "long-mpeg4-b.avi"]
REFRESHED = ["refresh.mp4", "long-refresh.mp4", "long-refresh.mkv"]
DEEP = ["h264-10.mp4", "hevc-10.mp4", "hevc-hdr.mp4", "vp9-10.webm", "av1-10.mp4"]
ODD = ["vp9-odd.webm", "vp8-odd.webm", "av1-odd.webm", "mpeg4-odd.avi"]
WRONG = [
    ("decord", "has no decoder of AV1", ["av1.mp4", "av1.mkv", "long-av1.mp4"]),
    ("decord", "does not read GIF", ["gif.gif", "gif-transparent.gif", "long.gif"]),
    ("decord", "ignores edit lists", ["edit.mp4", "open-edit.mp4", "hevc-open-edit.mp4", "long-edit.mp4", "long-hevc-edit.mp4"]),
    ("decord", "finds other or damaged frames where it seeks",
     [*REFRESHED, *B_IN_AVI, "mpeg4-b.mp4", "long-mpeg4-b.mp4", "open.mp4", "long-open.mp4", "long-open.mkv",
      "long-fragmented.mp4", "hevc-open.mkv", "long-hevc.mp4", "long-hevc.mkv"]),
    ("torchcodec", "finds other or damaged frames where it seeks, or none", [*REFRESHED, *B_IN_AVI, "open.mp4", "open-edit.mp4"]),
    ("decord", "counts frames at the start that cannot be decoded", CUTS),
    ("torchcodec", "counts frames at the start that cannot be decoded", CUTS),
    ("decord", "counts frames that are not to be shown", ["vp8-alt-ref.webm", "long-vp8.webm"]),
    ("torchcodec", "counts frames that are not to be shown", ["vp8-alt-ref.webm", "long-vp8.webm"]),
    ("torchcodec", "scales colors with another filter (bicubic)", [*DEEP, *ODD]),
    ("PyAV", "scales colors with another filter (bicubic)", [*DEEP, *ODD]),
    ("PyAV", "takes the colors of interlaced frames for those of progressive ones", ["interlaced.mp4"]),
    ("PyAV", "does not rotate", ["rotated.mp4", "upside-down.mp4", "720p-rotated.mp4"]),
]


def pictures(kind):
    """The frames of a new file: a photograph in motion, with noise and a rectangle of strong color. No two are alike."""
    from skimage import data
    random = np.random.RandomState(int.from_bytes(hashlib.sha256(kind.file.encode()).digest()[:4], "big"))
    width, height = kind.size
    photograph = Image.fromarray([data.astronaut, data.coffee, data.chelsea, data.rocket][random.randint(4)]())
    larger = np.asarray(photograph.resize((width * 5 // 4 + 8, height * 5 // 4 + 8), Image.Resampling.BICUBIC)).astype(np.int16)
    room_y, room_x = larger.shape[0] - height, larger.shape[1] - width
    noise = random.randint(-6, 7, (height * 2, width * 2, 1))
    colors = random.randint(0, 2, (8, 3)) * 255
    colors[0] = 255, 0, 0
    for number in range(kind.count):
        y, x = round(room_y / 2 * (1 + np.sin(number / 9))), round(room_x / 2 * (1 + np.cos(number / 13)))
        frame = larger[y:y + height, x:x + width] + noise[number % height:][:height, number * 7 % width:][:, :width]
        left, top = number * 3 % (width * 3 // 4), number * 2 % (height * 3 // 4)
        frame[top:top + height // 4, left:left + width // 4] = colors[number // 5 % 8]
        yield frame.clip(0, 255).astype(np.uint8)


def turned(data, turns):
    """An mp4 file of one track that asks to be shown rotated: its track's matrix, the last one, is replaced."""
    matrix = lambda a, b: struct.pack(">9i", a << 16, b << 16, 0, -b << 16, a << 16, 0, 0, 0, 1 << 30)
    before, upright, after = data.rpartition(matrix(1, 0))
    return before + (matrix(*[(1, 0), (0, 1), (-1, 0), (0, -1)][turns]) if upright else b"") + after


def make(kind, folder):
    """Makes a file; gives the reason if this ffmpeg cannot."""
    path = folder / kind.file
    if kind.of and not (folder / kind.of).exists():
        return f"there is no {kind.of}"
    if kind.of:
        given, frames = ["-i", folder / kind.of], b""
    else:
        given = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "{}x{}".format(*kind.size), "-r", str(kind.rate), "-i", "pipe:0"]
        frames = b"".join(frame.tobytes() for frame in pictures(kind))
    for number in range(kind.passes):
        two = ["-pass", str(number + 1), "-passlogfile", folder / f"{kind.file}.pass"] if kind.passes > 1 else []
        made = subprocess.run(["ffmpeg", "-v", "error", "-y", *kind.before, *given, *kind.arguments, *two, path],
                              input=frames, capture_output=True)
        if made.returncode:
            path.unlink(missing_ok=True)
            lines = [line for line in made.stderr.decode(errors="replace").splitlines() if not line.startswith("Svt[info]")]
            return lines[0] if lines else "ffmpeg failed"
    if kind.turns:
        path.write_bytes(turned(path.read_bytes(), kind.turns))
    said = subprocess.run(["ffprobe", "-v", "error", "-select_streams", "v:0", "-count_packets", "-show_streams", path],
                          capture_output=True, text=True).stdout
    if kind.shows not in said:
        path.unlink()
        return f"ffprobe does not say {kind.shows} of what this ffmpeg makes"
    return ""


def uniform(count):
    return np.linspace(0, count - 1, SHOWN, dtype=int).tolist()


def squashed(frame):
    """A frame as it is stored."""
    if max(frame.shape[:2]) <= SIDE:
        return frame
    return np.asarray(Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


@dataclass
class Seen:
    """What a reference or the program makes of a file."""
    fault: str = ""
    count: int = 0
    indices: list = field(default_factory=list)
    frames: list = field(default_factory=list)


def read(library, path):
    """The number of frames of a file and the chosen ones."""
    if library == "decord":
        import decord
        reader = decord.VideoReader(str(path), num_threads=1)
        count = len(reader)
        return count, reader.get_batch(uniform(count)).asnumpy()
    if library == "torchcodec":
        from torchcodec.decoders import VideoDecoder
        decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        count = len(decoder)
        return count, decoder.get_frames_at(uniform(count)).data.numpy()
    import av
    with av.open(str(path)) as container:
        count = sum(1 for _ in container.decode(video=0))
    wanted = uniform(count)
    with av.open(str(path)) as container:
        frames = {number: frame.to_ndarray(format="rgb24") for number, frame in enumerate(container.decode(video=0))
                  if number in wanted}
    return count, np.stack([frames[number] for number in wanted])


def read_all(library, out, paths):
    """In a process of its own: the libraries crash, and bring an ffmpeg each."""
    for path in map(Path, paths):
        try:
            count, frames = read(library, path)
            np.savez(Path(out) / f"{path.name}.npz", fault="", count=count, frames=frames)
        except Exception as fault:
            lines = str(fault).strip().splitlines() or [type(fault).__name__]
            np.savez(Path(out) / f"{path.name}.npz", fault=lines[0], count=0, frames=np.zeros(0))


def reference(library, paths):
    """What a library makes of files. After a crash it goes on behind the file that it crashed at."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    environment.pop("LD_LIBRARY_PATH", None)
    seen = {}
    with tempfile.TemporaryDirectory() as scratch:
        while left := [path for path in paths if path not in seen]:
            run = subprocess.run([sys.executable, __file__, "--read", library, scratch, *left], env=environment,
                                 capture_output=True)
            for path in left:
                result = Path(scratch) / f"{path.name}.npz"
                if not result.exists():
                    lines = run.stderr.decode(errors="replace").strip().splitlines() or [""]
                    seen[path] = Seen(f"crashed with {run.returncode}: {lines[-1]}")
                    break
                with np.load(result) as found:
                    count = int(found["count"])
                    frames = [squashed(frame) for frame in found["frames"]]
                    seen[path] = Seen(str(found["fault"]), count, uniform(count) if count else [], frames)
                result.unlink()
    return seen


def program(pipeline, folder, paths):
    """Runs the pipeline over files; gives what it stored of each."""
    import pyarrow.parquet as parquet
    found = shutil.which(pipeline) or sys.exit(f"there is no program {pipeline}")
    records = [{"id": path.name, "video": path.name, "prompt": "What happens?"} for path in paths]
    (folder / "clips.json").write_text(json.dumps(records))
    (folder / "decoding.yaml").write_text(PIPELINE)
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    done = subprocess.run([Path(found).resolve(), "run", "decoding.yaml", "--run", run], cwd=folder)
    if done.returncode:
        sys.exit(f"{pipeline} failed with {done.returncode}")
    table = lambda name: [row for part in sorted((run / name).rglob("*.parquet")) for row in parquet.read_table(part).to_pylist()]
    images = {row["image_id"]: row["image"]["bytes"] for row in table("images")}
    videos = {row["video_id"]: row for row in table("videos")}
    prompts = {row["id"]: row["videos"] for row in table("prompts")}
    rejects = table("rejects")

    def stored(path):
        if path.name not in prompts:
            reasons = [row["reason"].replace(f"{folder}/", "") for row in rejects if row["id"].endswith(f"id {path.name}")]
            return Seen("; ".join(reasons) or "neither a prompt nor a reject")
        [shown] = prompts[path.name]
        row = videos[shown["video_id"]]
        data = [images[name] for name in shown["frame_ids"]]
        if shown["video_id"] != hashlib.sha256(path.read_bytes()).hexdigest():
            return Seen("video_id is not the SHA-256 of the file")
        if row["frame_ids"] != shown["frame_ids"]:
            return Seen("the tables prompts and videos name other frames")
        if [hashlib.sha256(encoded).hexdigest() for encoded in data] != shown["frame_ids"]:
            return Seen("a frame's id is not the SHA-256 of its file")
        return Seen("", row["frames"], row["indices"], [np.asarray(Image.open(io.BytesIO(encoded))) for encoded in data])

    return {path: stored(path) for path in paths}


def stand_in(path):
    """What the program should store of a file, by simple means: every frame is decoded, no one is sought."""
    safe = ["-protocol_whitelist", "file", "-format_whitelist", "mov,matroska,avi,gif",
            "-codec_whitelist", "h264,hevc,vp8,vp9,av1,libdav1d,mpeg4,gif", "-max_pixels", "33177600"]
    # ffprobe opens a decoder for the sound too, and would fail with the whitelist of codecs.
    probe = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-of", "json", f"file:{path}", "-show_entries"]
    asked = lambda what: json.loads(subprocess.run([*probe, what], capture_output=True, check=True).stdout)
    packets = [packet for packet in asked("packet=pts,flags")["packets"] if "D" not in packet["flags"]]
    times = [packet.get("pts") for packet in packets]
    count = len(packets)
    codec = asked("stream=codec_name")["streams"][0]["codec_name"]
    if codec == "vp8" or None in times or len(set(times)) < count or min(times) < times[0]:
        # Packets may hold frames that are not shown, or that nothing can be decoded from.
        count = len(asked("frame=media_type")["frames"])
    indices = uniform(count)
    choice = "+".join(f"eq(n,{number})" for number in sorted(set(indices)))
    run = subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-xerror", "-threads", "1", *safe, "-i", f"file:{path}",
                          "-map", "0:v:0", "-an", "-sn", "-dn", "-vf", f"select='{choice}'", "-fps_mode", "passthrough",
                          "-sws_flags", "bilinear", "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "pipe:1"],
                         capture_output=True)
    if run.returncode:
        return Seen(run.stderr.decode(errors="replace").strip())
    frames, rest = [], io.BytesIO(run.stdout)
    while rest.readline():
        width, height = map(int, rest.readline().split())
        rest.readline()
        frames.append(np.frombuffer(rest.read(width * height * 3), np.uint8).reshape(height, width, 3))
    if len(frames) != len(set(indices)):
        return Seen(f"ffmpeg gave {len(frames)} frames for {len(set(indices))} numbers")
    frames = dict(zip(sorted(set(indices)), map(squashed, frames)))
    return Seen("", count, indices, [frames[number] for number in indices])


def difference(ours, theirs):
    """The largest and the mean difference in gray levels; or in words, why there is none."""
    if ours.fault or theirs.fault:
        return ours.fault or theirs.fault
    if ours.count != theirs.count:
        return f"{ours.count} frames, not {theirs.count}"
    if ours.indices != theirs.indices:
        return f"frames {ours.indices}, not {theirs.indices}"
    sizes = [sorted({frame.shape for frame in seen.frames}) for seen in (ours, theirs)]
    if sizes[0] != sizes[1]:
        return f"frames of {sizes[0]}, not {sizes[1]}"
    apart = np.abs(np.stack(ours.frames).astype(int) - np.stack(theirs.frames))
    return int(apart.max()), float(apart.mean())


def in_words(found):
    return found if isinstance(found, str) else f"up to {found[0]} gray levels, mean {found[1]:.3f}"


def make_all(folder):
    """Makes every file that is not there; gives the reasons of those that cannot be made."""
    skipped = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for copies in (False, True):
            kinds = [kind for kind in KINDS if bool(kind.of) == copies and not (folder / kind.file).exists()]
            reasons = pool.map(lambda kind: make(kind, folder), kinds)
            skipped.update({kind.file: reason for kind, reason in zip(kinds, reasons) if reason})
    return skipped


def lossless(path):
    """A copy with the same pixels, for a library that does not read the original."""
    copy = path.parent / f"{path.name}.lossless.webm"
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-y", "-i", path, "-c:v", "libvpx-vp9", "-lossless", "1",
                    "-fps_mode", "passthrough", copy], check=True)
    return copy


def see_all(given, folder, kinds):
    """What the program and each library make of the files."""
    paths = [folder / kind.file for kind in kinds]
    copies = {folder / kind.file: lossless(folder / kind.file) for kind in kinds if kind.lossless}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ours = dict(zip(paths, pool.map(stand_in, paths))) if given.stand_in else program(given.pipeline, folder, paths)
        read_by = lambda library: reference(library, [copies.get(path, path) if library == "decord" else path for path in paths])
        theirs = {library: dict(zip(paths, seen.values())) for library, seen in zip(LIBRARIES, pool.map(read_by, LIBRARIES))}
    return ours, theirs


def compare(given, folder):
    """Prints the table, what is remarkable of the references, and what failed; gives whether nothing did."""
    skipped = make_all(folder)
    ours, theirs = see_all(given, folder, [kind for kind in KINDS if kind.file not in skipped])
    failed, remarks = [], {}
    print("| kind of file | frames | reference | largest difference | mean difference |\n|---|---|---|---|---|")
    for kind in KINDS:
        if kind.file in skipped:
            print(f"| {kind.name} | skipped: {skipped[kind.file]} | | | |")
            continue
        path = folder / kind.file
        wrong = {library: reason for library, reason, files in WRONG if kind.file in files}
        chosen = next(library for library in LIBRARIES if library not in wrong)
        name = f"{chosen}, of a lossless copy in VP9" if kind.lossless and chosen == "decord" else chosen
        right = theirs[chosen][path]
        found = difference(ours[path], right)
        numbers = f"{found} |" if isinstance(found, str) else f"{found[0]} | {found[1]:.3f}"
        print(f"| {kind.name} | {ours[path].count} | {name} | {numbers} |", flush=True)
        if isinstance(found, str) or (kind.exact and found[0]):
            failed.append(f"{kind.file}: {in_words(found)}")
        for library in LIBRARIES:
            seen = theirs[library][path]
            found = difference(seen, right)
            if library == chosen or right.fault:
                continue
            if found != (0, 0):
                remarks.setdefault(f"{library} {wrong.get(library, 'differs')}", []).append(f"{kind.name}: {in_words(found)}")
            if library not in wrong and (seen.fault or seen.count != right.count):
                failed.append(f"{kind.file}, {library}: {in_words(found)}")
    print("\nWhere another reference differs from the one that was chosen:\n")
    for reason, files in sorted(remarks.items()):
        print(f"* {reason}", *(f"  * {file}" for file in files), sep="\n")
    print("", *(f"failed: {line}" for line in failed), sep="\n")
    return not failed


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--pipeline", default="pipeline", help="the program; default: `pipeline` on the PATH")
    arguments.add_argument("--keep", type=Path, metavar="DIR", help="keep the files here, and take those that are here already")
    arguments.add_argument("--stand-in", action="store_true", help="call ffmpeg as the program should, in its place")
    arguments.add_argument("--read", nargs="+", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.read:
        return read_all(given.read[0], given.read[1], given.read[2:])
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.keep or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return 0 if compare(given, folder) else 1


if __name__ == "__main__":
    sys.exit(main())
