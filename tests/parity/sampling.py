"""The tokens that may be drawn, and their probabilities, by transformers' processors in the order of `generate`."""
import torch
from transformers.generation.logits_process import (LogitsProcessorList, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor,
                                                    SuppressTokensLogitsProcessor, TemperatureLogitsWarper,
                                                    TopKLogitsWarper, TopPLogitsWarper)

from common import error, folder, save, seeded, write_json

VOCAB, ROWS = 600, 6
BANNED = [7, 8, 590, 599]
HOW = [dict(temperature=1.0), dict(temperature=0.7, top_p=0.9), dict(temperature=0.2, top_p=0.5), dict(temperature=1.3, top_k=20),
       dict(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05), dict(temperature=2.0, top_p=0.99, repetition_penalty=1.5),
       dict(temperature=0.9, top_p=0.95, repetition_penalty=0.8), dict(temperature=0.7, top_k=1),
       dict(temperature=1.0, min_p=0.05), dict(temperature=1.5, top_p=0.95, top_k=100, min_p=0.1, repetition_penalty=1.1)]


def record():
    seeded("sampling")
    logits = torch.randn(ROWS, VOCAB) * torch.tensor([1.0, 2.0, 4.0, 8.0, 0.5, 3.0])[:, None]
    occurred = torch.randint(0, VOCAB, (1, 40))
    expected = {"logits": logits, "occurred": occurred[0]}
    for index, how in enumerate(HOW):
        steps = [SuppressTokensLogitsProcessor(BANNED, device="cpu")]
        if "repetition_penalty" in how:
            steps.append(RepetitionPenaltyLogitsProcessor(how["repetition_penalty"]))
        warpers = [TemperatureLogitsWarper(how["temperature"])]
        warpers += [TopKLogitsWarper(how["top_k"])] if "top_k" in how else []
        warpers += [TopPLogitsWarper(how["top_p"])] if "top_p" in how else []
        warpers += [MinPLogitsWarper(how["min_p"])] if "min_p" in how else []
        steps += warpers[::-1] if error("top-p before temperature") else warpers
        scores = LogitsProcessorList(steps)(occurred.expand(ROWS, -1), logits.clone())
        expected[f"probabilities.{index}"] = torch.softmax(scores, -1)
        # How near the sums of the sorted probabilities come to top_p, and the probabilities to min_p of the greatest: there
        # float32 decides what is kept.
        before = LogitsProcessorList([step for step in steps if not isinstance(step, (TopPLogitsWarper, MinPLogitsWarper))])
        chances = torch.softmax(before(occurred.expand(ROWS, -1), logits.clone()).double(), -1).sort(descending=True).values
        sums, shares = chances.cumsum(-1), chances / chances[:, :1]
        edges = [(sums - how.get("top_p", 2.0)).abs(), (shares - how.get("min_p", 2.0)).abs()]
        expected[f"edge.{index}"] = torch.cat(edges, -1).min(-1).values
    write_json(folder("sampling") / "how.json", dict(banned=BANNED, how=HOW))
    save(folder("sampling") / "expected.safetensors", expected)
