"""How many tokens a picture takes, and the grid of its features, for thousands of sizes."""
import json

import numpy as np
import torch
from transformers.models.llava_onevision import modeling_llava_onevision as modeling
from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape, unpad_image

import onevision
from common import error, folder, seeded, write_json

SIDE, PATCHES = 384, 27
PINPOINTS = [[SIDE * i, SIDE * j] for i in range(1, 7) for j in range(1, 7)]
RANDOM = 5000
# Height and width: the table of the specification, and sizes where rounding to seven decimals matters.
TABLE = [(1, 1), (224, 224), (336, 336), (384, 384), (375, 500), (500, 375), (333, 500), (427, 640), (480, 640),
         (640, 480), (768, 768), (600, 800), (1152, 768), (720, 1280), (899, 1024), (1024, 1024), (1152, 1152),
         (1153, 1153), (1200, 1200), (1300, 1300), (1080, 1920), (1920, 1080), (1200, 1600), (3024, 4032), (1000, 3000),
         (3000, 1000), (100, 2000), (2000, 100), (10, 1000), (2304, 2304), (1401, 1149), (47, 423), (369, 820)]


def record():
    random = seeded("packing")
    path, _, processor = onevision.make(random, "packing", layout="C")
    (path / "model.safetensors").unlink()
    config = json.loads((path / "config.json").read_text())
    config["vision_config"] |= dict(image_size=SIDE, patch_size=14)
    config |= dict(image_grid_pinpoints=PINPOINTS, vision_aspect_ratio="anyres_max_9")
    write_json(path / "config.json", config)
    settings = json.loads((path / "preprocessor_config.json").read_text())
    settings |= dict(image_grid_pinpoints=PINPOINTS, size={"height": SIDE, "width": SIDE})
    write_json(path / "preprocessor_config.json", settings)
    processor.image_processor.image_grid_pinpoints = PINPOINTS
    processor.num_image_tokens = PATCHES**2
    processor.vision_aspect_ratio = "anyres_max_9"
    if error("lengths not rounded to seven decimals"):
        modeling.round = processor.__class__.__init__.__globals__["round"] = lambda value, _digits: value

    places = torch.zeros(1)
    rows = []
    sizes = TABLE + [tuple(int(n) for n in np.exp(random.uniform(0, np.log(3200), 2)) + 0.5) for _ in range(RANDOM)]
    for height, width in sizes:
        grid = get_anyres_image_grid_shape((height, width), PINPOINTS, SIDE)
        kept = unpad_image(places.expand(1, grid[0] * PATCHES, grid[1] * PATCHES), (height, width)).shape[1:]
        tokens = processor._get_number_of_features(height, width, SIDE, SIDE)
        if error("no newline column"):
            tokens -= kept[0]
        rows.append([height, width, *grid, *kept, tokens])
    write_json(folder("packing") / "rows.json", rows)
