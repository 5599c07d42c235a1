"""How well the stage `overlap` recognizes copies of photographs: recall, and false pairs.

500 distinct crops of scikit-image's photographs are the benchmark; the training images are their copies as
JPEG of quality 70, as PNG of other bytes, and at half size. Needs scikit-image, numpy, pillow, pyarrow.

usage: bench.py PIPELINE       the program `pipeline`
"""
import json
import pathlib
import random
import subprocess
import sys
import tempfile

import numpy
import pyarrow.dataset as dataset
from PIL import Image
from skimage import data

PIPELINE = sys.argv[1]
CROPS = 500

draw = random.Random(5)
names = ["astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "moon", "page", "hubble_deep_field",
         "immunohistochemistry", "retina", "brick", "grass", "gravel", "text", "clock", "cat"]
photographs = {}
for name in names:
    try:
        photograph = numpy.asarray(getattr(data, name)())
    except Exception:  # some are downloads
        continue
    if photograph.ndim == 2:
        photograph = numpy.stack([photograph] * 3, axis=2)
    photographs[name] = photograph[:, :, :3].astype("uint8")
print("photographs:", ", ".join(sorted(photographs)))

folder = pathlib.Path(tempfile.mkdtemp())
benchmark, training, taken = [], [], []
while len(benchmark) < CROPS:
    name = draw.choice(sorted(photographs))
    whole = photographs[name]
    height, width = draw.randint(64, min(240, whole.shape[0])), draw.randint(64, min(240, whole.shape[1]))
    top, left = draw.randint(0, whole.shape[0] - height), draw.randint(0, whole.shape[1] - width)

    def shared(other):
        name_of, t, l, h, w = other
        if name_of != name:
            return 0.0
        rows = max(0, min(t + h, top + height) - max(t, top))
        columns = max(0, min(l + w, left + width) - max(l, left))
        return rows * columns / min(h * w, height * width)

    crop = whole[top:top + height, left:left + width]
    # Distinct: no two crops share half of their area, and none is of one color.
    if crop.std() < 8 or any(shared(other) > 0.5 for other in taken):
        continue
    taken.append((name, top, left, height, width))
    number = len(benchmark)
    image = Image.fromarray(crop)
    image.save(folder / f"b{number}.png")
    benchmark.append({"id": f"b{number}", "image": f"b{number}.png", "prompt": "What is it?"})
    image.save(folder / f"t{number}-jpeg.jpg", quality=70)
    image.save(folder / f"t{number}-png.png", compress_level=1)
    image.resize((width // 2, height // 2), Image.LANCZOS).save(folder / f"t{number}-half.png")
    for kind, ending in (("jpeg", "jpg"), ("png", "png"), ("half", "png")):
        training.append({"id": f"t{number}-{kind}", "image": f"t{number}-{kind}.{ending}", "prompt": "What is it?"})
(folder / "benchmark.json").write_text(json.dumps(benchmark))
(folder / "training.json").write_text(json.dumps(training))
(folder / "p.yaml").write_text("""
pipeline: overlap
stages:
  training: { load_prompts: { from: training.json } }
  benchmark: { load_prompts: { from: benchmark.json } }
  repeated: { overlap: { benchmark: benchmark, training: training, words: 0 } }
""")
subprocess.run([PIPELINE, "run", "p.yaml", "--run", "run"], cwd=folder, check=True, capture_output=True)


def rows(table):
    files = [str(path) for path in (folder / "run" / table).rglob("*.parquet")]
    return dataset.dataset(files, format="parquet").to_table().to_pylist()


images = {row["image_id"]: row for row in rows("images")}
of = lambda table: {row["id"]: images[row["image_ids"][0]] for row in rows(table)}
originals, copies = of("benchmark"), of("training")


def distance(one, other):
    shapes = one["width"] / one["height"] / (other["width"] / other["height"])
    if not 1 / 1.1 <= shapes <= 1.1:
        return 64
    return ((one["look"] ^ other["look"]) & (2**64 - 1)).bit_count()


for kind in ("jpeg", "png", "half"):
    pairs = [(originals[f"b{number}"], copies[f"t{number}-{kind}"]) for number in range(CROPS)]
    found = sum(one["pixels"] == other["pixels"] or distance(one, other) <= 6 for one, other in pairs)
    equal = sum(one["pixels"] == other["pixels"] for one, other in pairs)
    print(f"recall, {kind}: {found} of {CROPS} ({100 * found / CROPS:.1f} %), {equal} with equal pixels")
all_of = list(originals.values())
pairs = false = 0
for index, one in enumerate(all_of):
    for other in all_of[:index]:
        pairs += 1
        if distance(one, other) <= 6:
            false += 1
            ids = [next(id for id, row in originals.items() if row is image) for image in (one, other)]
            print("  false pair:", *(taken[int(id[1:])] for id in ids), "distance", distance(one, other))
print(f"false pairs among distinct crops: {false} of {pairs} ({1e5 * false / pairs:.2f} in 100,000)")
print("benchmark prompts found by the stage:", len({row["prompt_id"] for row in rows("repeated")}), "of", CROPS)
