"""Prompts with videos: ids, logits, sampled answers and DPO, also beside images and with unequal numbers of frames."""
import numpy as np
import torch
from PIL import Image

import onevision
from common import error, folder, picture, save, seeded, write_json
from interleaved import IMAGE, WORDS, arranged, dpo
from networks import LOGITS_EVERY

VIDEO = "<video>"
# Name, frames, width and height: one frame, many, larger and smaller than a tile, all of one length but one.
CLIPS = {"one": (1, 20, 12), "eight": (8, 24, 16), "more": (8, 9, 31), "long": (32, 12, 12)}
SIZES = {"a": (61, 40), "b": (13, 9)}
# Title, videos, images, earlier turns, question.
CASES = [
    ("one frame", ["one"], "", [], "What happens?"),
    ("eight frames", ["eight"], "", [], "<video>\nWhat happens?"),
    ("32 frames", ["long"], "", [], "What happens? <video>"),
    ("two of eight frames", ["eight", "more"], "", [], "<video> or <video>?"),
    ("unequal numbers of frames", ["one", "eight", "long"], "", [], "<video>\n<video>\nThen <video>?"),
    ("beside an image, which keeps its tiles", ["eight"], "a", [], "<image>\n<video>\nIs it in the clip?"),
    ("before two images", ["more"], "ab", [], "<video> <image><image> Which?"),
    ("in the second turn", ["eight"], "a", [["user", "<image>\nThis?"], ["assistant", "Yes."]], "And <video> this?"),
    ("none", [], "a", [], "What is this?"),
]
PAIRED = [0, 5, 4, 8, 3, 6, 7, 2]


class Prompt:
    """The embeddings of a prompt: transformers can stack only videos of equal length, so each is encoded alone."""
    def __init__(self, network, processor, frames, shown, case):
        self.network, self.processor = network, processor
        turns, question = case["turns"], case["question"]
        said = [list(turn) for turn in turns] + [["user", question]]
        if not any(mark in text for _, text in said for mark in (IMAGE, VIDEO)):
            said[0][1] = f"{IMAGE}\n" * len(case["images"]) + f"{VIDEO}\n" * len(case["videos"]) + said[0][1]
        text = onevision.chat(said[-1][1], 0, turns=said[:-1])
        side, patches = onevision.SIDE, onevision.SIDE // onevision.PATCH
        pooled = -(-patches // 2)
        for name in case["videos"]:
            text = text.replace(VIDEO, "<|video|>" * (len(frames[name]) * pooled ** 2 + 1), 1)
        images = [shown[name] for name in case["images"]]
        text = text.replace("<|video|>", VIDEO)
        if images:
            given = processor(images=[images] if len(images) > 1 else images, text=[text.replace(VIDEO, "<|endoftext|>")],
                              return_tensors="pt")
        else:
            given = processor.tokenizer(text.replace(VIDEO, "<|endoftext|>"), return_tensors="pt")
        ids = given["input_ids"]
        video, end = processor.tokenizer.convert_tokens_to_ids([VIDEO, "<|endoftext|>"])
        self.ids = torch.where(ids == end, video, ids)
        self.given = given
        self.videos = [self.pixels(frames[name], side) for name in case["videos"]]

    def pixels(self, frames, side):
        """Squashed with Pillow, as LLaVA-NeXT does; the processor's torchvision is up to two gray levels off."""
        resized = [np.asarray(frame.resize((side, side), Image.Resampling.BICUBIC)) for frame in frames]
        return (torch.tensor(np.stack(resized)).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5

    def __call__(self, answer=()):
        """The logits of the prompt with an answer behind it."""
        network, model = self.network, self.network.model
        ids = torch.cat([self.ids, torch.tensor([list(answer)], dtype=torch.long)], 1)
        image, video = self.processor.tokenizer.convert_tokens_to_ids([IMAGE, VIDEO])
        embeds = model.get_input_embeddings()(ids)
        if "pixel_values" in self.given:
            features = model.get_image_features(self.given["pixel_values"], self.given["image_sizes"],
                                                batch_num_images=self.given.get("batch_num_images")).pooler_output
            embeds = embeds.masked_scatter((ids == image)[..., None], torch.cat(list(features), 0).to(embeds))
        if self.videos:
            features = []
            for pixels in self.videos:
                own = model.get_video_features(pixels[None]).pooler_output[0]  # the newline included
                features.append(own.roll(1, 0) if error("a video's newline before its frames") else own)
            embeds = embeds.masked_scatter((ids == video)[..., None], torch.cat(features, 0).to(embeds))
        return network(inputs_embeds=embeds, attention_mask=torch.ones_like(ids)).logits[0]


def record():
    random = seeded("videos")
    place = folder("videos")
    frames = {name: [picture(random, *size) for _ in range(count)] for name, (count, *size) in CLIPS.items()}
    shown = {name: picture(random, *size) for name, size in SIZES.items()}
    for name, images in frames.items():
        for number, image in enumerate(images):
            image.save(place / f"{name}-{number}.png")
    for name, image in shown.items():
        image.save(place / f"{name}.png")
    cases = []
    for title, videos, images, turns, question in CASES:
        # A video is placed by the rule of an image.
        marked = [[role, text.replace(VIDEO, IMAGE)] for role, text in turns], question.replace(VIDEO, IMAGE)
        written = [mark for _, text in [*turns, ("user", question)] for mark in marks(text)]
        turns, question = arranged([*videos, *images], *marked)
        turns, question = restored(turns, question, written)
        cases.append(dict(title=title, videos=videos, images=list(images), turns=turns, question=question))
    write_json(place / "cases.json", dict(logits_every=LOGITS_EVERY, clips={name: clip[0] for name, clip in CLIPS.items()}, cases=cases))
    path, network, processor = onevision.make(random, "videos", layout="C", dtype=torch.float32)
    prompts = [Prompt(network, processor, frames, shown, case) for case in cases]
    expected = {}
    for index, prompt in enumerate(prompts):
        with torch.no_grad():
            logits = prompt()
        expected |= {f"ids.{index}": prompt.ids[0], f"logits.{index}": logits.flip(0)[::LOGITS_EVERY]}
    direct(network, prompts[1])
    save(place / "expected.safetensors", expected)
    train(place, network, processor, prompts, random)


def marks(text):
    """The placeholders of a text, in order."""
    found = [(text.find(mark, at), mark) for mark in (IMAGE, VIDEO) for at in range(len(text)) if text.startswith(mark, at)]
    return [mark for _, mark in sorted(found)]


def restored(turns, question, written):
    """The texts with the placeholders that were written."""
    texts = [text for _, text in turns] + [question]
    written = iter(written)
    texts = ["".join(piece + (next(written) if number < text.count(IMAGE) else "") for number, piece in enumerate(text.split(IMAGE)))
             for text in texts]
    return [[role, text] for (role, _), text in zip(turns, texts)], texts[-1]


def direct(network, prompt):
    """transformers' own way, with all pixels at once, gives the same."""
    with torch.no_grad():
        logits = network(input_ids=prompt.ids, attention_mask=torch.ones_like(prompt.ids),
                         pixel_values_videos=torch.stack(prompt.videos)).logits[0]
        if not error("a video's newline before its frames"):
            assert torch.allclose(logits, prompt(), atol=1e-5)


def train(place, network, processor, prompts, random):
    """Updates of DPO on batches of prompts with videos, images and both."""
    say = lambda: " ".join(random.choice(WORDS, random.randint(1, 8)))
    pairs = [dict(case=case, chosen=say() + ".", rejected=say()) for case in PAIRED]
    write_json(place / "pairs.json", pairs)

    def logp(pair, side):
        answer, prompt = onevision.answer(processor, pair[side]), prompts[pair["case"]]
        logits = prompt(answer)[prompt.ids.shape[1] - 1:-1].float()
        return torch.log_softmax(logits, -1).gather(-1, torch.tensor(answer)[:, None]).sum()

    dpo(place, network, pairs, logp)
