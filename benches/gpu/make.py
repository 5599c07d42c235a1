"""A checkpoint of the shape of LLaVA-OneVision 7B with random weights, images, questions, pairs and pipeline files.

usage: make.py SMALL_POLICY TO      (TINY=1 makes a small one, to rehearse on a CPU)
"""
import json
import os
import random
import shutil
import sys

import torch
from PIL import Image
from safetensors.torch import save_file

SMALL, TO = sys.argv[1:3]
TINY = bool(os.environ.get("TINY"))
TEXT = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152128)
VISION = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16, image_size=384)
if TINY:
    TEXT = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=640)
    VISION = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, image_size=56)
# The pairs of an update: all of them, so that the first one can be compared with another program.
BATCH = 2 if TINY else 8
SIDE = VISION["image_size"]
PINPOINTS = [[SIDE * a, SIDE * b] for a in range(1, 7) for b in range(1, 7)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(1)


def read(name):
    with open(f"{SMALL}/{name}") as file:
        return json.load(file)


def write(name, value):
    with open(f"{TO}/{name}", "w") as file:
        json.dump(value, file) if not isinstance(value, str) else file.write(value)


def noise(*shape, std=None):
    std = std or 0.5 * shape[-1] ** -0.5
    return (torch.randn(*shape, device=DEVICE) * std).bfloat16().cpu()


def norm(size):
    return {"weight": torch.ones(size, dtype=torch.bfloat16)}


def linear(outputs, inputs, bias=True):
    return {"weight": noise(outputs, inputs)} | ({"bias": torch.zeros(outputs, dtype=torch.bfloat16)} if bias else {})


def layer_norm(size):
    return norm(size) | {"bias": torch.zeros(size, dtype=torch.bfloat16)}


def configs():
    os.makedirs(f"{TO}/policy", exist_ok=True)
    for name in os.listdir(SMALL):
        if name.endswith((".json", ".jinja")):
            shutil.copy(f"{SMALL}/{name}", f"{TO}/policy")
    config = read("config.json")
    config["text_config"].update(TEXT, max_position_embeddings=32768, max_window_layers=TEXT["num_hidden_layers"],
                                 layer_types=["full_attention"] * TEXT["num_hidden_layers"],
                                 rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    config["vision_config"].update(VISION)
    config["image_grid_pinpoints"] = PINPOINTS
    write("policy/config.json", config)
    images = read("preprocessor_config.json")
    images.update(image_grid_pinpoints=PINPOINTS, size={"height": SIDE, "width": SIDE})
    write("policy/preprocessor_config.json", images)
    write("policy/processor_config.json", read("processor_config.json") | {"num_image_tokens": (SIDE // 14) ** 2})


def weights():
    hidden, inner = TEXT["hidden_size"], TEXT["intermediate_size"]
    shared = hidden // TEXT["num_attention_heads"] * TEXT["num_key_value_heads"]
    seen, seen_inner = VISION["hidden_size"], VISION["intermediate_size"]
    tree = {
        "language_model.model.embed_tokens": {"weight": noise(TEXT["vocab_size"], hidden, std=0.5)},
        "language_model.model.norm": norm(hidden),
        "language_model.lm_head": {"weight": noise(TEXT["vocab_size"], hidden, std=4 * hidden ** -0.5)},
        "multi_modal_projector.linear_1": linear(hidden, seen),
        "multi_modal_projector.linear_2": linear(hidden, hidden),
        "vision_tower.embeddings.patch_embedding": {"weight": noise(seen, 3, 14, 14, std=0.02), "bias": torch.zeros(seen, dtype=torch.bfloat16)},
        "vision_tower.embeddings.position_embedding": {"weight": noise((SIDE // 14) ** 2, seen, std=0.1)},
        "vision_tower.post_layernorm": layer_norm(seen),
    }
    for number in range(TEXT["num_hidden_layers"]):
        layer = f"language_model.model.layers.{number}."
        tree |= {layer + "input_layernorm": norm(hidden), layer + "post_attention_layernorm": norm(hidden),
                 layer + "self_attn.q_proj": linear(hidden, hidden), layer + "self_attn.k_proj": linear(shared, hidden),
                 layer + "self_attn.v_proj": linear(shared, hidden), layer + "self_attn.o_proj": linear(hidden, hidden, bias=False),
                 layer + "mlp.gate_proj": linear(inner, hidden, bias=False), layer + "mlp.up_proj": linear(inner, hidden, bias=False),
                 layer + "mlp.down_proj": linear(hidden, inner, bias=False)}
    for number in range(VISION["num_hidden_layers"]):
        layer = f"vision_tower.encoder.layers.{number}."
        tree |= {layer + name: layer_norm(seen) for name in ("layer_norm1", "layer_norm2")}
        tree |= {layer + f"self_attn.{name}": linear(seen, seen) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        tree |= {layer + "mlp.fc1": linear(seen_inner, seen), layer + "mlp.fc2": linear(seen, seen_inner)}
    tensors = {f"{module}.{name}": tensor for module, own in tree.items() for name, tensor in own.items()}
    tensors["image_newline"] = noise(hidden, std=0.5)
    save_file(tensors, f"{TO}/policy/model.safetensors", {"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def data():
    """Images of different sizes, as photographs have: 2,000 to 9,000 tokens at 7B."""
    draw = random.Random(3)
    words = "the a red blue photograph shows with under near several people standing beside old new house tree small large".split()
    say = lambda least, most: " ".join(draw.choice(words) for _ in range(draw.randrange(least, most)))
    os.makedirs(f"{TO}/images", exist_ok=True)
    prompts, pairs = [], []
    for number in range(8 if TINY else 64):
        bounds = (60, 300) if TINY else (500, 2200)
        size = draw.randrange(*bounds), draw.randrange(*bounds)
        Image.effect_noise(size, 60).convert("RGB").save(f"{TO}/images/{number}.jpg", quality=80)
        prompts.append({"id": f"p{number}", "image": f"{number}.jpg", "prompt": "Describe the picture. " + say(3, 40)})
        pairs.append(prompts[-1] | {"chosen": say(60, 120), "rejected": say(60, 120)})
    write("prompts.json", prompts)
    write("pairs.json", pairs[:BATCH])


def pipelines():
    tokens = 8 if TINY else 128
    common = f"seed: 5\nrounds: 1\nmodels:\n  policy: {{ llava_onevision: {{ weights: {TO}/policy }} }}\n"
    write("sample.yaml", f"""pipeline: sample
{common}  critic: {{ self: {{ model: policy, ask: {{ mode: pointwise, verdict: [{{ pattern: '', value: 1 }}], max_new_tokens: 8, retries: 0 }} }} }}
stages:
  prompts: {{ load_prompts: {{ from: {TO}/prompts.json, images: {TO}/images }} }}
  sampled: {{ sample: {{ prompts: prompts, model: policy, count: 5, temperature: 0.7, top_p: 0.9, max_new_tokens: {tokens} }} }}
  greedy: {{ sample: {{ prompts: prompts, model: policy, count: 1, temperature: 0, max_new_tokens: {tokens // 4} }} }}
  judged: {{ score: {{ candidates: greedy, judge: critic }} }}
""")
    write("train.yaml", f"""pipeline: train
{common}stages:
  pairs: {{ load_feedback: {{ from: {TO}/pairs.json, images: {TO}/images }} }}
  steps: {{ train_dpo: {{ pairs: pairs, model: policy, beta: 0.1, learning_rate: 5.0e-7, batch_pairs: {BATCH}, epochs: 3, optimizer: adamw_8bit }} }}
""")


configs()
print(f"made {weights() / 1e9:.2f} billion weights")
data()
pipelines()
