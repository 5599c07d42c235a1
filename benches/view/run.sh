#!/usr/bin/env bash
# The page of `pipeline view` over a run of 1,000,000 prompts about 2,000 pictures, k = 5, scripted models.
# Prints the times of the page in Chromium, and the peak memory of its server.
# usage: benches/view/run.sh [FOLDER [PROMPTS]]; the run in FOLDER is made once
set -eu
here=$(cd "$(dirname "$0")/../.." && pwd)
folder=$(realpath -m "${1:-/tmp/ovchat-view-bench}")
count=${2:-1000000}
program=$(realpath "${CARGO_TARGET_DIR:-$here/target}/release/pipeline")
mkdir -p "$folder"

if [ ! -e "$folder/runs/million" ]; then
  python3 - "$folder" "$count" <<'PYTHON'
import json, os, struct, sys, zlib
folder, count = sys.argv[1], int(sys.argv[2])
os.makedirs(f"{folder}/pictures", exist_ok=True)

def png(number):
    width, height = 320, 240
    color = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
    lines = []
    for y in range(height):
        line = bytes(b for x in range(width) for b in ((color[0] + x) % 256, (color[1] + y) % 256, (color[2] + x * y // 64) % 256))
        lines.append(b"\0" + line)
    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"".join(lines), 1)) + chunk(b"IEND", b"")

for number in range(2000):
    with open(f"{folder}/pictures/{number}.png", "wb") as file:
        file.write(png(number))
with open(f"{folder}/prompts.jsonl", "w") as file:
    for number in range(count):
        question = f"Question number {number}: what can be seen in the picture, and why is it there?"
        file.write(json.dumps({"id": f"q{number}", "image": f"{number % 2000}.png", "prompt": question, "answer": "a red star"}) + "\n")
PYTHON
  cat > "$folder/million.yaml" <<'YAML'
pipeline: million
models:
  policy: { scripted: { words: 40 } }
  judge: { scripted: {} }
stages:
  prompts: { load_prompts: { from: prompts.jsonl, images: pictures } }
  candidates: { sample: { prompts: prompts, model: policy, part: 4096 } }
  rewards: { score: { candidates: candidates, judge: judge, part: 4096 } }
  pairs: { select_extremes: { rewards: rewards } }
YAML
  (cd "$folder" && /usr/bin/time -f 'the run: wall %e s, peak memory %M KB' "$program" run million.yaml)
fi
cd "$here"
OVCHAT_VIEW_RUN="$folder/runs/million" cargo test --release -q --test main -- --ignored --nocapture a_large_run_is_shown_soon
