"""Loading videos beside decord: 200 clips of 10 s, and one file of an hour, both of 720p.

    python benches/videos/bench.py target/release/pipeline [--clips 200] [--hour]

Needs ffmpeg with libx264, and a Python with decord, numpy and Pillow. Both programs choose 32 uniform
frames, resize them to 384 x 384 and store them as PNG files.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import tempfile
import time
from pathlib import Path

PIPELINE = """
pipeline: bench
models:
  policy: { scripted: {} }
stages:
  prompts:
    load_prompts: { from: clips.json }
  candidates:
    sample: { prompts: prompts, model: policy }
"""


def ffmpeg(*arguments):
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-y", *map(str, arguments)], check=True)


def make(folder, clips, hour):
    """Writes one clip, and copies of its stream with other titles; returns the names."""
    first = folder / "first.mp4"
    source = "testsrc2=size=1280x720:rate=30:duration=10,noise=alls=6:allf=t"
    ffmpeg("-f", "lavfi", "-i", source, "-c:v", "libx264", "-crf", 26, "-pix_fmt", "yuv420p", first)
    names = []
    for number in range(clips):
        names.append(f"clip-{number:03}.mp4")
        ffmpeg("-i", first, "-c", "copy", "-metadata", f"title={number}", folder / names[-1])
    if hour:
        names = ["hour.mp4"]
        ffmpeg("-stream_loop", 359, "-i", first, "-c", "copy", folder / names[0])
    return names


def ours(program, folder, names):
    """Returns seconds and the peak memory of the program in MB."""
    records = [{"id": name, "video": name, "prompt": "What happens?"} for name in names]
    (folder / "clips.json").write_text(json.dumps(records))
    (folder / "p.yaml").write_text(PIPELINE)
    begun = time.monotonic()
    run = subprocess.Popen(
        [program, "run", "p.yaml", "--until", "prompts"], cwd=folder, stderr=subprocess.PIPE
    )
    _, status, used = os.wait4(run.pid, 0)
    seconds = time.monotonic() - begun
    words = run.stderr.read().decode()
    assert os.waitstatus_to_exitcode(status) == 0 and "reject" not in words, words
    # Of the program and of the largest decoder it waited for.
    return seconds, used.ru_maxrss / 1024


def decode(file):
    import decord
    import numpy
    from PIL import Image

    reader = decord.VideoReader(str(file), num_threads=1)
    chosen = numpy.linspace(0, len(reader) - 1, 32, dtype=int)
    for number, frame in enumerate(reader.get_batch(list(chosen)).asnumpy()):
        image = Image.fromarray(frame).resize((384, 384), Image.BICUBIC)
        image.save(file.with_suffix(f".{number}.png"), compress_level=1)


def theirs(folder, names):
    begun = time.monotonic()
    with multiprocessing.Pool(os.cpu_count()) as pool:
        pool.map(decode, [folder / name for name in names], chunksize=1)
    return time.monotonic() - begun


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=Path)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--hour", action="store_true", help="one file of an hour in place of the clips")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        names = make(folder, 0 if arguments.hour else arguments.clips, arguments.hour)
        seconds, memory = ours(arguments.program.resolve(), folder, names)
        peer = theirs(folder, names)
        print(
            f"{len(names)} files: ovchat {seconds:.1f} s, {memory:.0f} MB at most; decord {peer:.1f} s; "
            f"{peer / seconds:.2f} times as fast as decord"
        )


if __name__ == "__main__":
    main()
