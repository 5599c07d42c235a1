"""transformers on the model, the images and the answers of make.py and of an ovchat run.

usage: peers.py check FOLDER RUN ENGINE      log-probabilities of ovchat's greedy answers, loss and gradient of one pair
       peers.py sample FOLDER                5 drawn answers a prompt, then one greedy answer, one prompt at a time
       peers.py train FOLDER                 forward and backward passes of DPO, one pair at a time, with checkpointing
"""
import json
import os
import subprocess
import sys
import time

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

WHAT, TO = sys.argv[1:3]
TINY = bool(os.environ.get("TINY"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
processor = AutoProcessor.from_pretrained(f"{TO}/policy")
# That of the model's authors, which ovchat equals. The default one, of torchvision, rounds some pixels otherwise.
try:
    processor.image_processor = AutoImageProcessor.from_pretrained(f"{TO}/policy", backend="pil")
except (TypeError, ValueError):
    processor.image_processor = AutoImageProcessor.from_pretrained(f"{TO}/policy", use_fast=False)
model = AutoModelForImageTextToText.from_pretrained(f"{TO}/policy", dtype=DTYPE, attn_implementation="sdpa").to(DEVICE)
prompts = json.load(open(f"{TO}/prompts.json"))


# The model's default, which its chat template leaves out.
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def inputs(row):
    content = [{"type": "image"}, {"type": "text", "text": row["prompt"]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    made = processor(text=SYSTEM + text, images=Image.open(f"{TO}/images/{row['image']}"), return_tensors="pt")
    return {name: value.to(DEVICE, DTYPE) if value.is_floating_point() else value.to(DEVICE) for name, value in made.items()}


def logps(made, ids):
    """The log-probabilities of the last tokens, which are `ids`."""
    logits = model(**made, logits_to_keep=len(ids) + 1).logits[0, :-1].float()
    return logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]


def with_answer(row, ids):
    made = inputs(row)
    ids = torch.tensor([ids], device=DEVICE)
    made["input_ids"] = torch.cat([made["input_ids"], ids], 1)
    made["attention_mask"] = torch.ones_like(made["input_ids"])
    return made


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def check(run, engine):
    query = "select p.id, a.token_ids, a.token_logps from greedy a join prompts p on p.prompt_id = a.prompt_id order by p.id limit 16"
    rows = subprocess.run([engine, "sql", run, query, "--format", "jsonl"], capture_output=True, check=True, text=True).stdout
    worst, mean, count = 0.0, 0.0, 0
    by_id = {row["id"]: row for row in prompts}
    with torch.no_grad():
        for line in rows.splitlines():
            row = json.loads(line)
            ids = row["token_ids"]
            off = (logps(with_answer(by_id[row["id"]], ids), ids).cpu() - torch.tensor(row["token_logps"])).abs()
            worst, mean, count = max(worst, off.max().item()), mean + off.sum().item(), count + len(ids)
    print(f"log-probabilities of {count} greedy tokens in {len(rows.splitlines())} answers: off by {mean / max(count, 1):.2e} on average, {worst:.2e} at most ({DTYPE})")


def sample():
    rows = prompts[:4 if TINY else 8]
    new = 8 if TINY else 64
    for name, how, count in (("sampled", dict(do_sample=True, temperature=0.7, top_p=0.9, top_k=0, num_return_sequences=5), 5), ("greedy", dict(do_sample=False), 1)):
        wait()
        begun = time.perf_counter()
        with torch.no_grad():
            for row in rows:
                model.generate(**inputs(row), **how, min_new_tokens=new, max_new_tokens=new)
        wait()
        seconds = time.perf_counter() - begun
        print(f"transformers, {name}: {len(rows)} prompts x {count} x {new} tokens in {seconds:.1f} s, {len(rows) * count * new / seconds:.0f} new tokens/s")


def train():
    pairs = json.load(open(f"{TO}/pairs.json"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    wait()
    begun, tokens, whole = time.perf_counter(), 0, 0.0
    for pair in pairs:
        margin = 0
        for side, sign in (("chosen", 1), ("rejected", -1)):
            ids = processor.tokenizer(pair[side] + "<|im_end|>")["input_ids"]
            made = with_answer(pair, ids)
            with torch.no_grad():
                reference = logps(made, ids).sum()
            margin = margin + sign * (logps(made, ids).sum() - reference)
            tokens += made["input_ids"].shape[1]
        loss = -torch.nn.functional.logsigmoid(0.1 * margin) / len(pairs)
        loss.backward()
        whole += loss.item()
    wait()
    seconds = time.perf_counter() - begun
    norm = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm().item()
    print(f"transformers, DPO with a reference pass, without optimizer: {len(pairs)} pairs, {tokens} tokens in {seconds:.2f} s, loss {whole:.6f}, gradient norm {norm:.5g}")
    if DEVICE == "cuda":
        print(f"transformers, DPO: peak of {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


{"check": lambda: check(*sys.argv[3:5]), "sample": sample, "train": train}[WHAT]()
