"""Records what the reference programs compute, for src/torch/tests/parity to compare with.

usage: record.py OUT [--seed N] [--error NAME] [--only BLOCK]

Each block writes a folder of OUT. With the same seed and the versions of requirements.txt the same numbers come
out, up to the last bits, which depend on the machine.
"""
import importlib
import time

import torch
import transformers

from common import ARGUMENTS, OUT, write_json

BLOCKS = ["pixels", "packing", "text", "networks", "sampling", "rewards", "training", "interleaved", "videos"]

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
OUT.mkdir(parents=True, exist_ok=True)
for block in BLOCKS if not ARGUMENTS.only else [ARGUMENTS.only]:
    begun = time.time()
    importlib.import_module(block).record()
    print(f"{block}: {time.time() - begun:.1f} s", flush=True)
versions = {"torch": torch.__version__, "transformers": transformers.__version__}
write_json(OUT / "recorded.json", {"seed": ARGUMENTS.seed, "error": ARGUMENTS.error, **versions})
