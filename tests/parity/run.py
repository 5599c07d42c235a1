"""Compares with the reference programs on fresh random cases, and writes benches/PARITY.md.

usage: run.py [SEEDS]      (default: 3; `make parity` calls it in an environment of requirements.txt)

For every seed the reference records (record.py) and the networks' tests compare (src/torch/tests/parity). What they
wrote is then read by transformers. At last every deliberate error of errors.py must make its block fail.
"""
import importlib.metadata
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from errors import ERRORS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PAGE = ROOT / "benches" / "PARITY.md"
BLOCKS = ["pixels", "packing", "prompt token ids", "networks", "sampling", "rewards", "training", "images in place", "videos"]
TESTS = {"text": "prompt token ids", "interleaved": "images in place"}


def record(folder, *arguments):
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    environment.pop("LD_LIBRARY_PATH", None)
    made = subprocess.run([sys.executable, HERE / "record.py", folder, *arguments], env=environment, capture_output=True)
    if made.returncode:
        sys.exit(made.stderr.decode())


def built():
    """The tests of the networks, built once."""
    run = subprocess.run(["cargo", "test", "--release", "-p", "ovchat", "-p", "ovchat-torch", "--test", "torch", "--no-run",
                          "--message-format=json"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    messages = [json.loads(line) for line in run.stdout.splitlines()]
    return next(message["executable"] for message in messages
                if message.get("executable") and message["target"]["name"] == "torch")


def compare(tests, folder, block=""):
    """Runs the tests on a recording; gives their lines by block."""
    with tempfile.TemporaryDirectory() as reports:
        environment = {**os.environ, "OVCHAT_PARITY": str(folder), "OVCHAT_PARITY_REPORT": reports, "RUST_BACKTRACE": "0"}
        run = subprocess.run([tests, f"parity::{block}"], cwd=ROOT, env=environment, capture_output=True, text=True)
        lines = {path.stem: json.loads(path.read_text()) for path in Path(reports).glob("*.json")}
    if not lines:
        sys.exit(run.stdout + run.stderr)
    return lines


def read_back(folder):
    """What transformers says of the checkpoints that the engine wrote: equal tensors, no key too few or too many."""
    import torch
    from transformers import AutoModelForImageTextToText, logging
    logging.set_verbosity_error()
    cases = [(name, case) for name in ("onevision", "llava")
             for case in json.loads((folder / name / "cases.json").read_text())["cases"] if "layout D" not in case["title"]]
    lines = []
    for name, case in cases:
        load = lambda place: AutoModelForImageTextToText.from_pretrained(
            place, dtype=torch.float32, output_loading_info=True)
        (ours, info), (original, _) = load(folder / "written" / case["folder"]), load(folder / name / case["folder"])
        problems = sum(len(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        theirs = original.state_dict()
        different = sum(not torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())
        lines.append(dict(block="checkpoints", case=f"{case['title']}: as transformers reads it", absolute=problems + different,
                          relative=0.0, bound=f"equal, {len(theirs)} compared", holds=problems + different == 0))
    return lines


def page(seeds, lines, noticed):
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in
                         ("torch", "torchvision", "transformers", "trl", "peft", "sentencepiece", "pillow"))
    number = lambda value: "0" if value == 0 else f"{value:.1e}"
    rows = "\n".join(f"| {block} | {case} | {number(line['absolute'])} | {number(line['relative'])} | {line['bound']} |"
                     for (block, case), line in lines.items())
    errors = "\n".join(f"| {name} | {block} | {first} | {count} |" for name, (block, first, count) in noticed.items())
    return TEMPLATE.format(versions=versions, seeds=", ".join(map(str, seeds)), rows=rows, errors=errors)


TEMPLATE = """# Parity

Written by `make parity`; do not edit. Every number that leaves the networks, compared with what the reference programs
compute from the same files: {versions}. Small random checkpoints, float32 on CPU unless said; seeds {seeds}, drawn for
this page. `cargo test --release` makes the same comparisons with a committed recording (`tests/parity/recorded`).

The largest difference over all seeds; relative: to the largest number expected. Where things are counted, the first
number says how many differ.

| block | configuration | absolute | relative | bound |
|---|---|---|---|---|
{rows}

Layouts: A is what transformers 4.45 to 4.57 write, B what they have in memory, C what 5.x writes, D LLaVA-NeXT's
(lmms-lab). transformers can't read D; its numbers come from the same weights in layout C. "Files of transformers 4" of LLaVA-1.5 are
what llava-hf published, with that tokenizer; its other checkpoints are written by 5.x. Gradients and updates leave out
the bias of keys, whose true gradient is zero: what programs compute there is rounding.

## What a small error does

Each of these was made in the reference, one at a time, and its block failed: the comparison that noticed it first, and
how many of the block did.

| error | block | first noticed by | comparisons that failed |
|---|---|---|---|
{errors}

## Where the reference itself is at fault

* transformers 4.57.0 and 4.57.1 apply the tower's post-layernorm, which LLaVA-OneVision was not trained with; 4.57.2 to
  4.57.6 and 5.x do not. Do not compare with these two.
* transformers below 4.52 pads a picture that leaves an odd rest by a pixel too little and stretches the last tiles.
* transformers below 4.49 and LLaVA-NeXT cut off lengths without rounding them to seven decimals first; 154 of 5.76 million
  sizes get another number of rows or columns. We round, as transformers does now.
* The default image processor of transformers 5 (torchvision) differs from Pillow's, which the models were trained with, by
  up to 2 gray levels. The policy's pixels are Pillow's; the judge's are those of the default processor.
* Pillow's `convert("RGB")` clips 16-bit gray at 255. So do we.
* TRL adds no `<s>` to a prompt of LLaVA-1.5, tokenizes the answer apart from it, and with the published chat template ends
  it with a space for `</s>`. So it trains on other tokens than the model was trained on and generates. For the numbers
  above it has a template that leads to the tokens of prompt and answer.
* LLaVA-NeXT's DPO script counts tokens of the prompt and has two newlines behind the picture, unlike its inference;
  `mask: llava_next` and `newlines: two` of `train_dpo` do the same.
"""


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    seeds = [random.SystemRandom().randrange(1, 2**31) for _ in range(count)]
    worst, tests = {}, built()
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            folder = Path(scratch) / str(seed)
            record(folder, "--seed", str(seed), "--logits-every", "1")
            found = compare(tests, folder)
            lines = [line for block in BLOCKS for line in found[block]] + read_back(folder)
            failed = [line for line in lines if not line["holds"]]
            print(f"seed {seed}: {len(lines)} comparisons, {len(failed)} failed", flush=True)
            if failed:
                sys.exit(json.dumps(failed, indent=1))
            for line in lines:
                # A count, such as that of a worst tensor's name, may differ from seed to seed.
                case = line["case"].split(" (worst")[0]
                key = line["block"], case
                if key not in worst or line["absolute"] > worst[key]["absolute"]:
                    worst[key] = line
        noticed = {}
        for name, block in ERRORS.items():
            folder = Path(scratch) / "error"
            subprocess.run(["rm", "-rf", folder], check=True)
            record(folder, "--seed", str(seeds[0]), "--only", block, "--error", name)
            lines = compare(tests, folder, block)[TESTS.get(block, block)]
            failed = [line["case"] for line in lines if not line["holds"]]
            print(f"error: {name}: {len(failed)} of {len(lines)} failed", flush=True)
            if not failed:
                sys.exit(f"`{name}` was not noticed")
            noticed[name] = block, failed[0].split(" (worst")[0], f"{len(failed)} of {len(lines)}"
    PAGE.write_text(page(seeds, worst, noticed))
    print(f"wrote {PAGE.relative_to(ROOT)}")


main()
