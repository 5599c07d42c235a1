"""The peers of bench.py: what people run today, on the same files. Each call prints one JSON line.

usage: peers.py model OUT | reward OUT | data OUT SIDE COUNT | sample MODEL DATA NEW_TOKENS | score REWARD DATA ANSWERS
       | pictures MODEL DATA | train MODEL PAIRS IMAGES CHECKPOINTING | a_round POLICY JUDGE PROMPTS IMAGES
"""
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

SIDE, PATCH, VOCAB, COUNT = 384, 14, 32000, 5
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
PINPOINTS = [[SIDE * i, SIDE * j] for i in range(1, 7) for j in range(1, 7)]
IMAGES = dict(image_grid_pinpoints=PINPOINTS, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3,
              rescale_factor=1 / 255, size={"height": SIDE, "width": SIDE})
QUESTION = "Describe the picture in detail."


def model(out):
    """A LLaVA-OneVision of 70 million random weights, with the real tower's 729 patches a tile."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast,
                              Qwen2Config, SiglipVisionConfig)
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Tokens up to the vocabulary, so that nearly all of it can be drawn.
    tokenizer.add_tokens([f"word{n}" for n in range(VOCAB - 64 - 256 - len(SPECIAL))])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(out)
    ids = {token: fast.convert_tokens_to_ids(token) for token in SPECIAL}
    torch.manual_seed(0)
    tower = dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=6)
    decoder = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**tower, image_size=SIDE, patch_size=PATCH, vision_use_head=False),
        text_config=Qwen2Config(**decoder, vocab_size=VOCAB, rope_theta=1e6, max_position_embeddings=32768,
                                bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"], tie_word_embeddings=False),
        image_token_index=ids["<image>"], video_token_index=ids["<video>"], vision_feature_layer=-1,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9", image_grid_pinpoints=PINPOINTS)
    LlavaOnevisionForConditionalGeneration(config).save_pretrained(out)
    settings = {"image_processor_type": "LlavaOnevisionImageProcessor", **IMAGES}
    (Path(out) / "preprocessor_config.json").write_text(json.dumps(settings))


def data(out, side, count):
    """Photographs of scikit-image as squares, each with a question; where more questions are wanted than there are
    photographs, each has several."""
    import skimage
    (Path(out) / "images").mkdir(parents=True, exist_ok=True)
    names = sorted(path for path in (Path(skimage.__file__).parent / "data").glob("*") if path.suffix in (".png", ".jpg"))
    kept = []
    for path in names:
        photograph = Image.open(path).convert("RGB")
        if min(photograph.size) < 200 or len(kept) == int(count):
            continue
        photograph.resize((int(side), int(side)), Image.Resampling.BICUBIC).save(Path(out) / "images" / f"{path.stem}.png")
        kept.append(path.stem)
    asked = [(number, kept[number % len(kept)]) for number in range(int(count))]
    rows = [dict(id=f"{name}-{number}", image=f"{name}.png", prompt=QUESTION if number < len(kept) else f"{QUESTION} Part {number}.")
            for number, name in asked]
    (Path(out) / "prompts.json").write_text(json.dumps(rows))
    random.seed(0)
    words = lambda: "".join(f"word{random.randrange(10000, 30000)}" for _ in range(random.randint(60, 90)))
    (Path(out) / "pairs.json").write_text(json.dumps([dict(row, chosen=words(), rejected=words()) for row in rows]))


def processor_of(folder):
    from transformers import AutoTokenizer, LlavaOnevisionProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
    from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
    images = json.loads((Path(folder) / "preprocessor_config.json").read_text())
    tower = json.loads((Path(folder) / "config.json").read_text())["vision_config"]
    side = tower["image_size"]
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(**{name: images[name] for name in IMAGES}),
        tokenizer=AutoTokenizer.from_pretrained(folder), num_image_tokens=(side // tower["patch_size"]) ** 2, vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9",
        video_processor=LlavaOnevisionVideoProcessor(size={"height": side, "width": side}))


def rows_of(folder):
    rows = json.loads((Path(folder) / "prompts.json").read_text())
    return [(row, Image.open(Path(folder) / "images" / row["image"]).convert("RGB")) for row in rows]


def text_of(question):
    return (f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\n{question}<|im_end|>\n"
            "<|im_start|>assistant\n")


@torch.no_grad()
def sample(folder, place, new_tokens):
    """`generate` with num_return_sequences, a prompt at a time, as people sample today."""
    from transformers import LlavaOnevisionForConditionalGeneration
    network = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor, rows = processor_of(folder), rows_of(place)
    begun, tokens = time.time(), 0
    for row, picture in rows:
        given = processor(images=[picture], text=[text_of(row["prompt"])], return_tensors="pt")
        out = network.generate(**given, do_sample=True, temperature=0.7, top_p=0.9, top_k=0, num_return_sequences=COUNT,
                               max_new_tokens=int(new_tokens), min_new_tokens=int(new_tokens))
        tokens += COUNT * (out.shape[1] - given["input_ids"].shape[1])
    say(tokens=tokens, prompt_tokens=given["input_ids"].shape[1], seconds=time.time() - begun)


CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
        "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def dpo(policy, reference, processor, rows, images, batch, rate, checkpointing):
    """An epoch of TRL's DPOTrainer, with a second model for the reference, a pair at a time, as its scripts for vision do."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    processor.chat_template = processor.tokenizer.chat_template = CHAT
    said = lambda role, text: [{"role": role, "content": text}]
    dataset = Dataset.from_list([dict(
        images=[Image.open(Path(images) / row["image"]).convert("RGB")],
        prompt=said("system", "You are a helpful assistant.") + said("user", row["prompt"]),
        chosen=said("assistant", row["chosen"]), rejected=said("assistant", row["rejected"])) for row in rows])
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=1, gradient_accumulation_steps=batch, num_train_epochs=1,
        learning_rate=rate, beta=0.1, lr_scheduler_type="cosine", warmup_steps=0.1, weight_decay=0.0, max_grad_norm=1.0,
        logging_steps=1, save_strategy="no", report_to=[], max_length=None, bf16=False, fp16=False, use_cpu=True,
        gradient_checkpointing=checkpointing == "always", remove_unused_columns=False, optim="adamw_torch", dataloader_num_workers=0)
    trainer = DPOTrainer(model=policy, ref_model=reference, args=config, train_dataset=dataset, processing_class=processor)
    begun = time.time()
    trainer.train()
    return time.time() - begun, trainer.state.log_history[0]


def train(folder, pairs, images, checkpointing):
    from transformers import LlavaOnevisionForConditionalGeneration
    policy, reference = (LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    rows = json.loads(Path(pairs).read_text())
    seconds, first = dpo(policy, reference, processor_of(folder), rows, images, 2, 5e-7, checkpointing)
    say(pairs=len(rows), seconds=seconds, loss=first["loss"], logps_chosen=first["logps/chosen"])


def reward(out):
    """LLaVA-RLHF's reward model with random weights: 8 layers of 512, CLIP of 576 patches."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
    from tokenizers import Tokenizer, decoders, models, normalizers
    out = Path(out)
    for name in ("base", "vision", "adapter"):
        (out / name).mkdir(parents=True, exist_ok=True)
    words = {token: n for n, token in enumerate(["<unk>", "<s>", "</s>", "▁", "\n"] + [chr(n) for n in range(33, 127)])}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(out / "base/tokenizer.json"))
    torch.manual_seed(0)
    llama = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
                 vocab_size=1000, rms_norm_eps=1e-5, max_position_embeddings=4096)
    weights = LlamaForCausalLM(LlamaConfig(**llama)).state_dict()
    weights |= {"model.mm_projector.weight": torch.randn(512, 384) * 0.05, "model.mm_projector.bias": torch.zeros(512)}
    torch.save(weights, out / "base/pytorch_model.bin")
    (out / "base/config.json").write_text(json.dumps({"model_type": "llava", **llama, "hidden_act": "silu", "mm_vision_select_layer": -2}))
    CLIPVisionModel(CLIPVisionConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=6,
                                     image_size=336, patch_size=14)).save_pretrained(out / "vision")
    CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}).save_pretrained(out / "vision")
    targets = ["q_proj", "v_proj"]
    adapter = {}
    for name, weight in weights.items():
        if name.split(".")[-2] in targets:
            module = "base_model.model." + name.removesuffix(".weight")
            adapter[f"{module}.lora_A.weight"] = torch.randn(8, weight.shape[1]) * 0.05
            adapter[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], 8) * 0.05
    torch.save(adapter, out / "adapter/adapter_model.bin")
    (out / "adapter/adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "bias": "none", "target_modules": targets}))
    torch.save({"weight": torch.randn(1, 512), "bias": torch.zeros(1)}, out / "adapter/reward_head")
    (out / "prompt.txt").write_text("USER: Judge your last answer. ASSISTANT: Its score is")


def weights_of(folder, name):
    from safetensors.torch import load_file
    path = Path(folder) / f"{name}.safetensors"
    return load_file(path) if path.exists() else torch.load(path.with_name(f"{'pytorch_model' if name == 'model' else name}.bin"))


def judge_of(folder):
    """LLaVA-RLHF's reward model by the modules of transformers: a function of a picture, a question and an answer."""
    from tokenizers import Tokenizer
    from transformers import CLIPImageProcessor, CLIPVisionModel, LlamaConfig, LlamaModel
    folder = Path(folder)
    config = json.loads((folder / "base/config.json").read_text())
    config.pop("model_type")
    lora = json.loads((folder / "adapter/adapter_config.json").read_text())
    weights = {name: weight.float() for name, weight in weights_of(folder / "base", "model").items()}
    adapter, head = weights_of(folder / "adapter", "adapter_model"), torch.load(folder / "adapter/reward_head")
    for name in [name for name in adapter if ".lora_A." in name]:
        weight = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
        update = adapter[name.replace(".lora_A.", ".lora_B.")].float() @ adapter[name].float()
        weights[weight] = weights[weight] + update * lora["lora_alpha"] / lora["r"]
    llama = LlamaModel(LlamaConfig(**config)).eval()
    llama.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()
                           if name.startswith("model.") and "mm_projector" not in name})
    clip = CLIPVisionModel.from_pretrained(folder / "vision", dtype=torch.float32).eval()
    processor, words = CLIPImageProcessor.from_pretrained(folder / "vision"), Tokenizer.from_file(str(folder / "base/tokenizer.json"))
    system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions."
    prompt = " " + (folder / "prompt.txt").read_text().replace("{factual_prompt}", "")

    def reward(picture, question, answer):
        pixels = processor(picture, return_tensors="pt").pixel_values
        features = clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        features = features @ weights["model.mm_projector.weight"].T + weights["model.mm_projector.bias"]
        before = [1] + words.encode(f"{system} USER: ").ids
        after = words.encode(f"\n{question} ASSISTANT: {answer}").ids + [2] + words.encode(prompt).ids
        embeds = torch.cat([llama.embed_tokens(torch.tensor([before])), features, llama.embed_tokens(torch.tensor([after]))], 1)
        return float(head["weight"].float() @ llama(inputs_embeds=embeds).last_hidden_state[0, -1] + head["bias"].float())
    return reward


@torch.no_grad()
def score(folder, place, said):
    """One forward pass for each answer."""
    reward, texts = judge_of(folder), {}
    for answer in json.loads(Path(said).read_text()):
        texts.setdefault(answer["id"], []).append(answer["text"])
    begun, rewards = time.time(), []
    for row, picture in rows_of(place):
        rewards += [reward(picture, row["prompt"], answer) for answer in texts[row["id"]]]
    say(answers=len(rewards), mean=sum(rewards) / len(rewards), seconds=time.time() - begun)


def a_round(policy, judge, prompts, images):
    """Sampling, scoring, pairing and an epoch of DPO, as a script of these libraries does it; models loaded."""
    from transformers import LlavaOnevisionForConditionalGeneration
    network = LlavaOnevisionForConditionalGeneration.from_pretrained(policy, dtype=torch.float32).eval()
    processor, reward = processor_of(policy), judge_of(judge)
    rows = json.loads(Path(prompts).read_text())
    begun, pairs = time.time(), []
    with torch.no_grad():
        for row in rows:
            picture = Image.open(Path(images) / row["image"]).convert("RGB")
            given = processor(images=[picture], text=[text_of(row["prompt"])], return_tensors="pt")
            out = network.generate(**given, do_sample=True, temperature=0.7, top_p=0.9, top_k=0, num_return_sequences=COUNT,
                                   max_new_tokens=32)
            answers = processor.tokenizer.batch_decode(out[:, given["input_ids"].shape[1]:], skip_special_tokens=True)
            rewards = [reward(picture, row["prompt"], answer) for answer in answers]
            best, worst = max(rewards), min(rewards)
            if best > worst:
                pairs.append(dict(row, chosen=answers[rewards.index(best)], rejected=answers[rewards.index(worst)]))
    sampled = time.time() - begun
    seconds = dpo(network.train(), LlavaOnevisionForConditionalGeneration.from_pretrained(policy, dtype=torch.float32), processor,
                  pairs, images, 8, 4e-5, "never")[0]
    say(prompts=len(rows), pairs=len(pairs), sampled=sampled, trained=seconds, seconds=sampled + seconds)


def pictures(folder, place):
    """Decoding, resizing and normalizing alone."""
    processor = processor_of(folder).image_processor
    paths = sorted((Path(place) / "images").iterdir())
    begun = time.time()
    for path in paths:
        processor(images=[Image.open(path).convert("RGB")], return_tensors="pt")
    say(pictures=len(paths), seconds=time.time() - begun)


def say(**figures):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({**figures, "peak_gb": peak}))


if __name__ == "__main__":
    torch.set_num_threads(2)
    globals()[sys.argv[1]](*sys.argv[2:])
