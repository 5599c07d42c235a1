"""Records what LLaVA-RLHF's reward model says, computed with transformers' modules, on a tiny random model.

Writes reward/ beside this file: the three folders in their published layout (base, adapter and head as torch pickles),
two pictures, rows.json with the scores that the reference gives, and tensors.{bin,safetensors}, the same tensors
twice. Needs torch 2.11, torchvision 0.26 (for the default image processor), transformers 5.23, tokenizers and Pillow; the sizes keep the folder below 150 kB.
usage: record_reward.py"""

import json
import string
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUT = Path(__file__).parent / "reward"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
FACTS = "Specifically, the AI's response should be fully supported by the combination of the following captions:\n"
PROMPT = "USER: Judge your last answer. {factual_prompt}\nBe brief. ASSISTANT: Its score is"
LLAMA = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=112,
    rms_norm_eps=1e-5,
    max_position_embeddings=1024,
)
CLIP = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=14,
    patch_size=7,
    projection_dim=16,
)
ROWS = [
    ("wide.png", "What is this?", "A picture.", None),
    ("wide.png", "What is this?", "A picture of several things in a row.", None),
    ("wide.png", "What is this?", "A", None),
    ("tall.png", "Describe the image.", "in in in", ["something tall", "a test"]),
    ("tall.png", "Describe the image.", "Nothing is there.\n\nNothing.", ["something tall", "a test"]),
]

def tokenizer() -> PreTrainedTokenizerFast:
    """Llama's kind of tokenizer over ASCII, with some merges, so that neighbors change how a text is cut."""
    letters = ["▁", "\n"] + [c for c in string.printable if c not in string.whitespace]
    merges = [("▁", "a"), ("i", "n"), ("e", "r"), ("▁", "i"), ("i", "s"), ("s", "."), ("▁", "A"), ("t", "h")]
    words = ["<unk>", "<s>", "</s>"] + letters + [a + b for a, b in merges]
    bpe = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )

def make() -> None:
    """Writes the model and the pictures."""
    for name in ("base", "vision", "adapter", "images"):
        (OUT / name).mkdir(parents=True, exist_ok=True)
    tokenizer().save_pretrained(OUT / "base")
    (OUT / "base/tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**LLAMA, initializer_range=0.2))
    clip = CLIPVisionModel(CLIPVisionConfig(**CLIP, initializer_factor=4.0))
    for parameter in [*llama.parameters(), *clip.parameters()]:
        if parameter.dim() == 1:
            parameter.data += torch.randn(parameter.shape) * 0.05
    clip.save_pretrained(OUT / "vision")
    side = CLIP["image_size"]
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        OUT / "vision"
    )
    base = {name: weight.clone() for name, weight in llama.state_dict().items()}
    base["model.mm_projector.weight"] = torch.randn(16, 16) * 0.2
    base["model.mm_projector.bias"] = torch.randn(16) * 0.2
    torch.save(base, OUT / "base/pytorch_model.bin")
    (OUT / "base/config.json").write_text(
        json.dumps({"model_type": "llava", **LLAMA, "hidden_act": "silu", "mm_vision_select_layer": -2}, indent=1)
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = {}
    for name, weight in base.items():
        if name.split(".")[-2] in targets:
            module = "base_model.model." + name.removesuffix(".weight")
            adapter[module + ".lora_A.weight"] = torch.randn(2, weight.shape[1]) * 0.3
            adapter[module + ".lora_B.weight"] = torch.randn(weight.shape[0], 2) * 0.3
    torch.save(adapter, OUT / "adapter/adapter_model.bin")
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "bias": "none", "target_modules": targets}
    (OUT / "adapter/adapter_config.json").write_text(json.dumps(lora, indent=1))
    torch.save({"weight": torch.randn(1, 16), "bias": torch.randn(1)}, OUT / "adapter/reward_head")
    (OUT / "prompt.txt").write_text(PROMPT + "\n")
    noise = torch.randint(0, 256, (9, 30, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).save(OUT / "images/wide.png")
    Image.fromarray(noise).transpose(Image.Transpose.ROTATE_90).resize((20, 41)).save(OUT / "images/tall.png")
    grid = torch.arange(12.0).reshape(3, 4) / 7
    tensors = {
        "f32": grid,
        "f16": grid.half(),
        "bf16": grid.bfloat16(),
        "i64": grid.long(),
        "turned": grid.t(),
        "part": grid[1:, ::2],
        "scalar": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(grid.clone()),
        "empty": torch.zeros(0, 3),
    }
    torch.save(tensors, OUT / "tensors.bin")
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, OUT / "tensors.safetensors")

def square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """Pads to a square with the picture in the middle."""
    side = max(image.size)
    out = Image.new("RGB", (side, side), color)
    out.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return out

@torch.no_grad()
def score() -> list[float]:
    """The rewards of ROWS by the modules of transformers, one sequence at a time."""
    words = PreTrainedTokenizerFast.from_pretrained(OUT / "base")
    base = torch.load(OUT / "base/pytorch_model.bin")
    adapter = torch.load(OUT / "adapter/adapter_model.bin")
    head = torch.load(OUT / "adapter/reward_head")
    for name in [name for name in adapter if ".lora_A." in name]:
        weight = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
        base[weight] += 1 / 2 * adapter[name.replace(".lora_A.", ".lora_B.")] @ adapter[name]
    projector = base.pop("model.mm_projector.weight"), base.pop("model.mm_projector.bias")
    llama = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    llama.load_state_dict(base)
    clip = CLIPVisionModel.from_pretrained(OUT / "vision").eval()
    processor = CLIPImageProcessor.from_pretrained(OUT / "vision")
    color = tuple(int(255 * mean) for mean in processor.image_mean)
    rewards = []
    for picture, question, answer, captions in ROWS:
        facts = FACTS + "".join(f"  - {caption}\n" for caption in captions) if captions else ""
        judge = PROMPT.replace("{factual_prompt}", facts)
        before = words(f"{SYSTEM} USER: ").input_ids
        after = words(f"\n{question} ASSISTANT: {answer}</s> {judge}").input_ids[1:]
        image = square(Image.open(OUT / "images" / picture).convert("RGB"), color)
        pixels = processor(image, return_tensors="pt").pixel_values
        features = clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:] @ projector[0].T + projector[1]
        embed = llama.get_input_embeddings()
        embeds = torch.cat([embed(torch.tensor([before])), features, embed(torch.tensor([after]))], 1)
        hidden = llama.model(inputs_embeds=embeds).last_hidden_state[0, -1]
        rewards.append(float((head["weight"] @ hidden + head["bias"])[0]))
    return rewards

if __name__ == "__main__":
    make()
    keys = ("image", "question", "answer", "captions", "reward")
    rows = [dict(zip(keys, (*row, reward))) for row, reward in zip(ROWS, score())]
    (OUT / "rows.json").write_text(json.dumps(rows, indent=1))
