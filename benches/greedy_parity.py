"""Compares the greedy answers of a run with those of transformers, from the run's own checkpoint.

usage: greedy_parity.py RUN ROUND   (a run of pipelines/dpo.yaml; needs torch, torchvision, transformers,
                                     pyarrow, pillow)

Reads the tables `heldout`, `images` and `answers` (round ROUND) and the checkpoint of that round, lets
transformers answer every held-out question greedily in float32, and prints how many are equal, token by
token. Ends with 1 if any differs.
"""
import io
import sys
from pathlib import Path

import pyarrow.dataset as ds
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor

run, round_number = Path(sys.argv[1]), int(sys.argv[2])
checkpoint = run / f"checkpoints/round-{round_number}" if round_number else Path("data-samples/policy")


def rows(table):
    return ds.dataset(run / table, format="parquet").to_table().to_pylist()


images = {row["image_id"]: row["image"]["bytes"] for row in rows("images")}
answers = {row["prompt_id"]: row for row in rows(f"answers/round-{round_number}")}
prompts = rows("heldout")

tokenizer = AutoTokenizer.from_pretrained(checkpoint)
pictures = LlavaOnevisionImageProcessorPil.from_pretrained(checkpoint)
model, loading = LlavaOnevisionForConditionalGeneration.from_pretrained(
    checkpoint, dtype=torch.float32, output_loading_info=True)
assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
tower = model.config.vision_config
processor = LlavaOnevisionProcessor(
    image_processor=pictures, tokenizer=tokenizer, num_image_tokens=(tower.image_size // tower.patch_size) ** 2,
    vision_feature_select_strategy="full", video_processor=LlavaOnevisionVideoProcessor(size=pictures.size),
    chat_template=(checkpoint / "chat_template.jinja").read_text())
placeholders = [model.config.image_token_id, model.config.video_token_id]
unused = list(range(len(tokenizer), model.config.text_config.vocab_size))

equal = 0
for prompt in prompts:
    talk = [{"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt["question"]}]}]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    picture = Image.open(io.BytesIO(images[prompt["image_ids"][0]]))
    inputs = processor(images=[picture], text=text, return_tensors="pt")
    with torch.no_grad():
        made = model.generate(**inputs, do_sample=False, max_new_tokens=32, suppress_tokens=placeholders + unused)
    theirs = made[0, inputs["input_ids"].shape[1]:].tolist()
    ours = answers[prompt["prompt_id"]]["token_ids"]
    if ours == theirs[: len(ours)] and len(theirs) == len(ours):
        equal += 1
    else:
        print(prompt["id"], prompt["question"], "ours", ours, "theirs", theirs)
print(f"{equal} of {len(prompts)} greedy answers are equal, token by token")
sys.exit(equal != len(prompts))
