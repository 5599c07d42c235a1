"""Tiny LLaVA-OneVision checkpoints in every layout that people have."""
import json
import shutil

import torch
from safetensors.torch import save_file
from transformers import (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor,
                          Qwen2Config, SiglipVisionConfig)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor

from common import SPECIAL, SYSTEM, error, folder, name_of, qwen_tokenizer

# What both architectures' modules tell the blocks: where they write, titles, transformers' class, ids and their names.
NAME, TITLE, TRAINING = "onevision", "", "training"
NETWORK = LlavaOnevisionForConditionalGeneration
STOP, STOPS, PLACEHOLDERS = "<|im_end|>", ["<|im_end|>", "<|endoftext|>"], ["<image>", "<video>"]
SIDE, PATCH, VOCAB, CONTEXT = 12, 4, 448, 1024

# Layouts of model-llava-onevision.md, section 2: A and B transformers 4.x (files, memory), C 5.x, D LLaVA-NeXT.
CONFIGURATIONS = {
    "untied, layout A": dict(layout="A", heads=(6, 2), grid=3),
    "tied, one kv head, two feature layers, layout B": dict(layout="B", tied=True, heads=(4, 1), features=[-2, -1]),
    "as many kv heads, shards, layout C": dict(layout="C", heads=(4, 4), grid=6, anyres=9, shards=3),
    "LLaVA-NeXT, layout D": dict(layout="D", heads=(4, 2), grid=6, anyres=9, dtype=torch.bfloat16),
    "LLaVA-NeXT tied, torch shards, layout D": dict(layout="D", tied=True, heads=(2, 1), shards=2, torch_files=True),
    "torch file, layout A": dict(layout="A", heads=(4, 2), torch_files=True, dtype=torch.float32, bias=False),
}

# The configuration whose answers are recorded too, and those that a batch of DPO is recorded with.
DETAILED = "untied, layout A"
TRAININGS = {"untied": dict(layout="C"), "tied": dict(layout="C", tied=True)}
TRAINED = dict(layout="C")  # and with updates
# A chat template for messages of text and pictures, as TRL gives them.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}{% for c in m['content'] if c['type'] == 'text' %}"
    "{{ c['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
ASKED = [dict(role="system", content=SYSTEM)]  # before each question


def stored_name(name, layout):
    """The name in a file of a tensor that transformers 5.x has in memory as `name`."""
    if layout == "B":
        return name.replace("model.vision_tower.", "model.vision_tower.vision_model.")
    if layout == "D":
        for old, new in [("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
                         ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
                         ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
                         ("model.language_model.", "model.")]:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name
    name = "language_model." + name if name.startswith("lm_head") else name.removeprefix("model.")
    if name.startswith("language_model.") and not name.startswith("language_model.lm_head"):
        name = "language_model.model." + name.removeprefix("language_model.")
    return name.replace("vision_tower.", "vision_tower.vision_model.") if layout == "A" else name


def make(random, title, layout, tied=False, heads=(4, 2), grid=3, anyres=4, features=-1, shards=1, torch_files=False,
         dtype=torch.float16, bias=True):
    """Writes a checkpoint; gives its folder, the network as transformers has it (float32) and a processor."""
    path = folder("onevision", name_of(title))
    tokenizer = qwen_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    pinpoints = [[SIDE * i, SIDE * j] for i in range(1, grid + 1) for j in range(1, grid + 1)]
    stored_layers = 3
    vision = dict(hidden_size=16, intermediate_size=20, num_attention_heads=2, image_size=SIDE, patch_size=PATCH)
    text = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=heads[0],
                num_key_value_heads=heads[1], vocab_size=VOCAB, max_position_embeddings=CONTEXT,
                tie_word_embeddings=tied)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision, num_hidden_layers=stored_layers, vision_use_head=False),
        text_config=Qwen2Config(**text, rope_theta=1e6, bos_token_id=ids["<|endoftext|>"],
                                eos_token_id=ids["<|im_end|>"]),
        image_token_index=ids["<image>"], video_token_index=ids["<video>"], vision_feature_layer=features,
        vision_feature_select_strategy="full", vision_aspect_ratio=f"anyres_max_{anyres}",
        multimodal_projector_bias=bias, image_grid_pinpoints=pinpoints, tie_word_embeddings=tied)
    network = NETWORK(config).eval()
    for parameter in network.parameters():  # large enough that every part shows in the logits
        parameter.data += 0.15 * torch.randn_like(parameter)
        parameter.data = parameter.data.to(dtype).float()
    network.generation_config.eos_token_id = ids["<|im_end|>"]

    network.config.save_pretrained(path)
    network.generation_config.save_pretrained(path)
    tokenizer.save_pretrained(path)
    images = dict(image_grid_pinpoints=pinpoints, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3,
                  rescale_factor=1 / 255, size={"height": SIDE, "width": SIDE})
    settings = {"image_processor_type": "LlavaOnevisionImageProcessor", **images}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    if layout == "D":
        write_llava_next_config(path, config, vision, text, ids, stored_layers, pinpoints, anyres)
    write_weights(path, network, layout, tied, shards, torch_files, dtype)

    if error("CLIP's means for SigLIP's"):
        images |= dict(image_mean=[0.48145466, 0.4578275, 0.40821073])
    if error("bilinear for bicubic"):
        images |= dict(resample=2)
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(**images), tokenizer=tokenizer,
        vision_aspect_ratio=f"anyres_max_{anyres}", num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        video_processor=LlavaOnevisionVideoProcessor(size={"height": SIDE, "width": SIDE}))
    return path, network, processor


def write_llava_next_config(path, config, vision, text, ids, layers, pinpoints, anyres):
    """The files of an lmms-lab folder: no tower sizes, no preprocessor settings, no `<image>` in the tokenizer."""
    (path / "config.json").write_text(json.dumps({
        "model_type": "llava", "architectures": ["LlavaQwenForCausalLM"], **text, "rope_theta": 1e6,
        "rope_scaling": None, "hidden_act": "silu", "rms_norm_eps": config.text_config.rms_norm_eps,
        "use_sliding_window": False, "mm_vision_tower": "tower", "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_resampler_type": None, "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
        "use_pos_skipping": False, "image_aspect_ratio": f"anyres_max_{anyres}",
        "image_grid_pinpoints": [pair[::-1] for pair in pinpoints], "torch_dtype": "bfloat16"}))
    tower = path / "tower"
    tower.mkdir(exist_ok=True)
    # The tower's own config counts the last layer, which LLaVA-NeXT takes off.
    sizes = {"model_type": "siglip_vision_model", **vision, "num_hidden_layers": layers + 1}
    (tower / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": sizes}))
    (path / "preprocessor_config.json").unlink()
    whole = json.loads((path / "tokenizer.json").read_text())
    unknown = ("<image>", "<video>")
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["content"] not in unknown]
    (path / "tokenizer.json").write_text(json.dumps(whole))


def write_weights(path, network, layout, tied, shards, torch_files, dtype):
    tensors = {stored_name(name, layout): tensor.to(dtype).contiguous().clone()
               for name, tensor in network.state_dict().items() if not (tied and name.startswith("lm_head"))}
    stem, end = ("pytorch_model", "bin") if torch_files else ("model", "safetensors")
    write = torch.save if torch_files else lambda part, file: save_file(part, file, {"format": "pt"})
    names = sorted(tensors)
    if shards == 1:
        write(tensors, path / f"{stem}.{end}")
        return
    places = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05}-of-{shards:05}.{end}"
        part = {name: tensors[name] for name in names[number::shards]}
        write(part, path / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (path / f"{stem}.{end}.index.json").write_text(json.dumps(index))


def chat(question, pictures=0, system="You are a helpful assistant.", turns=()):
    """The text of LLaVA-NeXT's template `qwen_1_5`."""
    text = f"<|im_start|>system\n{system}<|im_end|>\n"
    placeholders = "<image>\n" * pictures
    for role, said in [*turns, ("user", question)]:
        text += f"<|im_start|>{role}\n{placeholders if role == 'user' else ''}{said}<|im_end|>\n"
        placeholders = "" if role == "user" else placeholders
    if error("no newline after the last role"):
        return text + "<|im_start|>assistant"
    return text + "<|im_start|>assistant\n"


def inputs(processor, question, pictures=()):
    """The processor's tensors for one prompt."""
    text = chat(question, len(pictures))
    if not pictures:
        return processor.tokenizer(text, return_tensors="pt")
    shown = list(pictures)
    return processor(images=[shown] if len(shown) > 1 else shown, text=[text], return_tensors="pt")


def answer(processor, text):
    """The tokens of an answer with its stop token."""
    ids = processor.tokenizer(text, split_special_tokens=True)["input_ids"]
    return ids + [processor.tokenizer.convert_tokens_to_ids(STOP)]


def lesson(processor, lesson, pictures):
    """The processor's tensors for a conversation with its last answer, and the places of the answers' tokens."""
    tokenizer = processor.tokenizer
    text = chat(lesson["question"], 1, turns=lesson["turns"]) + lesson["answer"] + STOP
    given = processor(images=pictures, text=[text], return_tensors="pt")
    ids = given["input_ids"][0]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", STOP])
    said = tokenizer("assistant\n")["input_ids"]
    learned = []
    for place in (ids == start).nonzero().flatten().tolist():
        begin = place + 1 + len(said)
        if ids[place + 1:begin].tolist() == said:
            stop = begin + (ids[begin:] == end).nonzero()[0].item()
            learned += range(begin, stop if error("stop tokens not learned") else stop + 1)
    return given, torch.tensor(learned)
