"""Prompts whose images stand anywhere in the text: ids, logits, sampled answers, and training on several images."""
import torch

import llava
import onevision
from common import error, folder, picture, save, seeded, write_json
from networks import LOGITS_EVERY, draw
from training import BATCH, names_of, optimize

IMAGE = "<image>"
SIZES = {"a": (61, 40), "b": (13, 9), "c": (7, 90)}
HELLO = [["user", "Hello"], ["assistant", "Hi."]]
# As people write them: title, images, earlier turns, question.
CASES = [
    ("none", "", [], "Say something."),
    ("one in front", "a", [], "<image>\nWhat is this?"),
    ("one at the end", "a", [], "What is this? <image>"),
    ("two in front, one line each", "ab", [], "<image>\n<image>\nWhich is older?"),
    ("two in front, nothing between them", "ab", [], "<image><image>\nWhich is older?"),
    ("two in front, a space between them (lmms-eval)", "ab", [], "<image> <image>\nWhich is older?"),
    ("two, the tutorial of LLaVA-OneVision", "ab", [],
     "<image> This is the first image. Can you describe what you see?\n\nNow, let's look at another image: <image>\nWhat's the difference?"),
    ("two in the middle", "ab", [], "Is <image> larger than <image>, or not?"),
    ("two, without placeholders", "ab", [], "Which is older?"),
    ("three in front, one line each", "abc", [], "<image>\n<image>\n<image>\nWhich?"),
    ("three, each behind its number", "abc", [], "Image-1: <image>\nImage-2: <image>\nImage-3: <image>\nWhich?"),
    ("three at the end", "abc", [], "Which?\n<image>\n<image>\n<image>"),
    ("the same beginning, another second image", "ac", [], "Is <image> larger than <image>, or not?"),
    ("two turns, one in the first", "a", [["user", "<image>\nThis?"], ["assistant", "Yes."]], "Why?"),
    ("two turns, two in the first", "ab", [["user", "<image>\n<image>\nThese?"], ["assistant", "Yes."]], "Why?"),
    ("two turns, one in each", "ab", [["user", "<image>\nThis?"], ["assistant", "Yes."]], "And <image> this?"),
    ("two turns, one in the second", "b", HELLO, "What is this? <image>"),
    ("three turns, one in each", "abc",
     [["user", "<image>\nThis?"], ["assistant", "Yes."], ["user", "<image>\nThat?"], ["assistant", "No."]], "<image>\nAnd this?"),
]
# Pairs of answers to some of these, no two of a batch with as many images.
PAIRED = [0, 1, 7, 10, 15, 17, 3, 2, 8, 5, 16, 11, 4, 12, 6, 13]
WORDS = "the cat red blue left picture two stars is not a dog there nothing one shape".split()


def arranged(images, turns, question):
    """The texts of a prompt by the rule of ovchat's records: the only image of a turn moves before its text, as LLaVA-NeXT
    trains it (`preprocess_multimodal`); images before the first text, one line each, leave no placeholder."""
    turns = [list(turn) for turn in turns] + [["user", question]]
    if images:
        for turn in turns:
            if turn[1].count(IMAGE) == 1 and not turn[1].startswith(IMAGE):
                turn[1] = f"{IMAGE}\n{turn[1].replace(IMAGE, '').strip()}"
        front = f"{IMAGE}\n" * len(images)
        if turns[0][1].startswith(front):
            turns[0][1] = turns[0][1].removeprefix(front)
    return turns[:-1], turns[-1][1]


def given_of(architecture, processor, shown, case):
    """The processor's tensors for a prompt, the text of which has every placeholder in place."""
    images, turns, question = case["images"], case["turns"], case["question"]
    said = [list(turn) for turn in turns] + [["user", question]]
    if not any(IMAGE in text for _, text in said):
        said[0][1] = f"{IMAGE}\n" * len(images) + said[0][1]
    if error("an image moved before the text of its turn"):
        said = [[role, IMAGE * text.count(IMAGE) + text.replace(IMAGE, "")] for role, text in said]
    text = architecture.chat(said[-1][1], 0, turns=said[:-1])
    if not images:
        return processor.tokenizer(text, return_tensors="pt")
    files = [shown[name] for name in images]
    nested = [files] if architecture is onevision and len(files) > 1 else files
    return processor(images=nested, text=[text], return_tensors="pt")


def record():
    for architecture in (onevision, llava):
        record_of(architecture)


def record_of(architecture):
    random = seeded("interleaved")
    place = folder("interleaved", architecture.NAME)
    shown = {name: picture(random, *size) for name, size in SIZES.items()}
    for name, image in shown.items():
        image.save(place / f"{name}.png")
    cases = []
    for title, images, turns, question in CASES:
        written = dict(turns=turns, question=question)
        turns, question = arranged(images, turns, question)
        cases.append(dict(title=title, images=list(images), written=written, turns=turns, question=question))
    write_json(place / "cases.json", dict(logits_every=LOGITS_EVERY, cases=cases))

    how = dict(architecture.TRAINED, dtype=torch.float32)
    path, network, processor = architecture.make(random, "interleaved", **how)
    (path / "README.md").unlink(missing_ok=True)
    givens = [given_of(architecture, processor, shown, case) for case in cases]
    expected = {}
    for index, given in enumerate(givens):
        with torch.no_grad():
            logits = network(**given).logits[0]
        expected |= {f"ids.{index}": given["input_ids"][0], f"logits.{index}": logits.flip(0)[::LOGITS_EVERY]}
    save(place / "expected.safetensors", expected)
    settings, answers = draw(architecture, network, processor, givens, tokens=12, count=2)
    write_json(place / "sampled.json", settings)
    save(place / "sampled.safetensors", answers)
    train(architecture, place, network, processor, shown, cases, random)


def train(architecture, place, network, processor, shown, cases, random):
    """Updates of DPO on batches of prompts with no, one and several images."""
    say = lambda: " ".join(random.choice(WORDS, random.randint(1, 8)))
    pairs = [dict(case=case, chosen=say() + ".", rejected=say()) for case in PAIRED]
    write_json(place / "pairs.json", pairs)

    def logp(pair, side):
        answer = architecture.answer(processor, pair[side])
        given = given_of(architecture, processor, shown, cases[pair["case"]])
        start = given["input_ids"].shape[1]
        ids = torch.cat([given["input_ids"], torch.tensor([answer], dtype=torch.long)], 1)
        logits = network(**{**given, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0, start - 1:-1].float()
        return torch.log_softmax(logits, -1).gather(-1, torch.tensor(answer)[:, None]).sum()

    dpo(place, network, pairs, logp)


def dpo(place, network, pairs, logp):
    """Updates of DPO on batches of pairs; `logp` gives the log-probability of one side of a pair."""
    with torch.no_grad():
        reference = torch.stack([torch.stack([logp(pair, side) for side in ("chosen", "rejected")]) for pair in pairs])

    def loss(batch):
        values = []
        for number in batch:
            logps = torch.stack([logp(pairs[number], side) for side in ("chosen", "rejected")])
            rewards = 0.1 * (logps - reference[number])
            values.append(-torch.nn.functional.logsigmoid(rewards[0] - rewards[1]))
        return torch.stack(values).mean()

    batches = [range(first, first + BATCH) for first in range(0, len(pairs), BATCH)]
    save(place / "dpo.safetensors", {"reference": reference, **optimize(names_of(network), loss, batches)})
