"""What the blocks of the recording share: the seed, the deliberate errors, tokenizers and pictures."""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

SYSTEM = "You are a helpful assistant."
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
# What the tokenizers are trained on: their merges must meet in the texts of the cases.
CORPUS = """What is in the picture? Describe the image in detail. How many red circles are there? Where is the cat?
The picture shows two red dogs and one blue star. There is nothing on the left. It is a gray bicycle, isn't it?
What color is the shape in the top left? The shape is green. Is that true? Yes. No. I don't know.\n\nRead the text:
    return x + 1  # 12345 67.89\n\n\n你好，世界。图片里有什么？这是一只猫。 Über straße, naïve café. 😀😃 Привет""".splitlines(True) * 3 + ["Two\n\nlines.\n\n\nThree"] * 9

_arguments = argparse.ArgumentParser(description="Records what the reference programs compute.")
_arguments.add_argument("out", type=Path, help="the folder to write")
_arguments.add_argument("--seed", type=int, default=0, help="other weights, pictures and texts")
_arguments.add_argument("--error", default="", help="a deliberate error of the reference; see errors.py")
_arguments.add_argument("--logits-every", type=int, default=20, help="keep logits at every so many positions")
_arguments.add_argument("--only", default="", help="one block")
ARGUMENTS = _arguments.parse_args()
OUT: Path = ARGUMENTS.out


def error(name):
    """Whether this deliberate error is to be made."""
    return ARGUMENTS.error == name


def seeded(block):
    """Random numbers of this block, whatever the other blocks drew."""
    number = int.from_bytes(block.encode()[:4].ljust(4), "little") ^ ARGUMENTS.seed
    torch.manual_seed(number)
    return np.random.RandomState(number % 2**32)


def folder(*parts):
    path = OUT.joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


def name_of(title):
    return "".join(c if c.isalnum() else "-" for c in title).strip("-").replace("--", "-").lower()


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def save(path, tensors):
    save_file({name: torch.as_tensor(tensor).detach().contiguous().clone() for name, tensor in tensors.items()}, path)


def qwen_tokenizer():
    """Qwen2's kind of tokenizer, with few merges."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def llama_model(path, lines=None):
    """Llama's kind of SentencePiece model, trained on `lines` and written to `path`."""
    import io

    import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines or [line.strip() for line in CORPUS]), model_writer=model, vocab_size=420, model_type="bpe",
        byte_fallback=True, character_coverage=0.98, normalization_rule_name="identity", add_dummy_prefix=True,
        remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True, minloglevel=2,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, hard_vocab_limit=False)
    path.write_bytes(model.getvalue())


def picture(random, width, height, mode="RGB"):
    """A picture with edges, slopes and noise."""
    from PIL import Image
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    period = random.uniform(5, 40, 3)
    waves = [127 + 100 * np.sin(x / p + k) * np.cos(y / period[0]) for k, p in enumerate(period)]
    noise = random.randint(-30, 30, (height, width, 3))
    levels = np.stack(waves, -1) + noise
    left = random.randint(0, max(1, width // 2))
    levels[height // 3:, left:left + width // 3] = random.randint(0, 256, 3)
    rgb = Image.fromarray(levels.clip(0, 255).astype(np.uint8), "RGB")
    if mode == "I;16":
        return Image.fromarray(random.randint(0, 600, (height, width)).astype(np.uint16))
    if mode in ("LA", "RGBA", "PA"):
        out = rgb.convert("RGBA" if mode == "PA" else mode)
        out.putalpha(Image.fromarray(random.randint(0, 256, (height, width)).astype(np.uint8)))
        return out.quantize(16) if mode == "PA" else out
    return rgb.quantize(32) if mode == "P" else rgb.convert(mode)
