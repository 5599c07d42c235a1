"""LLaVA-RLHF's rewards by the modules of transformers and peft, one sequence at a time, and its training."""
import json

import sentencepiece
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from common import error, folder, llama_model, picture, save, seeded, write_json
from pixels import squared
from text import REWARD_PROMPT, vicuna_ids
from training import optimize

SIDE = 14
SIZES = {"wide": (30, 9), "tall": (20, 41), "square": (28, 28), "dot": (1, 1)}
QUESTIONS = ["What is this?", "Describe the image.", "Is that true?", "图片里有什么？"]
ANSWERS = ["A", "A picture.", "Nothing is there.\n\nNothing.", "Two red dogs and one blue star in the picture, " * 3, "", "这是一只猫"]
CAPTIONS = [None, ["something tall", "a test"], None, ["two red dogs"]]
RANK, ALPHA = 2, 1
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS, BATCH = 20, 4

CONFIGURATIONS = {
    "linear projector, torch files, tokenizer.model": dict(layers=1, torch_files=True, kv_heads=2),
    "two-layer projector, shards, adapter in safetensors": dict(layers=2, torch_files=False, kv_heads=1),
}


def make(random, title, layers, torch_files, kv_heads):
    place = folder("rewards", "one" if torch_files else "two")
    base, vision, adapter = (folder("rewards", place.name, name) for name in ("base", "vision", "adapter"))
    llama_model(base / "tokenizer.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    llama = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=kv_heads, vocab_size=pieces.vocab_size(), rms_norm_eps=1e-5,
                 max_position_embeddings=1024, rope_theta=10000.0)
    clip = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE,
                patch_size=7, projection_dim=16)
    network = LlamaForCausalLM(LlamaConfig(**llama, initializer_range=0.2)).eval()
    tower = CLIPVisionModel(CLIPVisionConfig(**clip, initializer_factor=4.0)).eval()
    for parameter in [*network.parameters(), *tower.parameters()]:
        if parameter.dim() == 1:
            parameter.data += torch.randn(parameter.shape) * 0.05
    tower.save_pretrained(vision)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(vision)
    projector = torch.nn.Linear(16, 16) if layers == 1 else torch.nn.Sequential(
        torch.nn.Linear(16, 16), torch.nn.GELU(), torch.nn.Linear(16, 16))
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    tensors |= {f"model.mm_projector.{name}": tensor.clone() for name, tensor in projector.state_dict().items()}
    lora = {}
    for name, weight in network.state_dict().items():
        if name.split(".")[-2] in TARGETS:
            module = "base_model.model." + name.removesuffix(".weight")
            lora[module + ".lora_A.weight"] = torch.randn(RANK, weight.shape[1]) * 0.3
            lora[module + ".lora_B.weight"] = torch.randn(weight.shape[0], RANK) * 0.3
    head = {"weight": torch.randn(1, 16), "bias": torch.randn(1)}
    deeper = adapter
    if torch_files:
        names = sorted(tensors)
        places = {}
        for number in range(2):
            file = f"pytorch_model-{number + 1:05}-of-00002.bin"
            torch.save({name: tensors[name] for name in names[number::2]}, base / file)
            places |= dict.fromkeys(names[number::2], file)
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        torch.save(lora, adapter / "adapter_model.bin")
    else:  # as a training checkpoint has it: the adapter two folders deeper, the head beside
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
        deeper = folder("rewards", place.name, "adapter", "adapter_model", "lora_default")
        save_file(lora, deeper / "adapter_model.safetensors", {"format": "pt"})
    torch.save(head, adapter / "reward_head")
    settings = dict(peft_type="LORA", task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, bias="none", target_modules=TARGETS,
                    inference_mode=True, lora_dropout=0.0)
    (deeper / "adapter_config.json").write_text(json.dumps(settings))
    (base / "config.json").write_text(json.dumps({
        "model_type": "llava", **llama, "hidden_act": "silu", "mm_vision_select_layer": -2,
        **({"mm_projector_type": "mlp2x_gelu"} if layers == 2 else {})}))
    (place / "prompt.txt").write_text(REWARD_PROMPT + "\n")
    if error("the tanh form of gelu in the judge's projector") and layers == 2:
        projector[1] = torch.nn.GELU(approximate="tanh")
    return place, Judge(network, tower, projector, lora, head, pieces, deeper)


class Judge(torch.nn.Module):
    """The reference: Llama with peft's adapter, CLIP, a projector and a head."""

    def __init__(self, network, tower, projector, lora, head, pieces, adapter):
        super().__init__()
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
        config = LoraConfig.from_pretrained(adapter)
        config.inference_mode = False
        config.lora_alpha = 2 * ALPHA if error("an adapter of twice the strength") else ALPHA
        self.llama = get_peft_model(network, config)
        problems = set_peft_model_state_dict(self.llama, lora)
        assert not problems.unexpected_keys, problems.unexpected_keys
        self.head = torch.nn.Linear(16, 1)
        self.head.load_state_dict(head)
        self.frozen = tower, projector, pieces
        self.clip = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})

    @torch.no_grad()
    def features(self, image):
        """What stands for a picture among the embeddings."""
        tower, projector, _ = self.frozen
        color = tuple(int(255 * mean) for mean in self.clip.image_mean)
        pixels = self.clip(squared(image, color), return_tensors="pt").pixel_values
        states = tower(pixels, output_hidden_states=True).hidden_states
        layer = -1 if error("the last layer of CLIP for the one before") else -2
        return projector(states[layer][:, 1:])[0]

    def forward(self, image, question, answer, captions):
        pieces = self.frozen[2]
        patches = (SIDE // 7) ** 2
        ids = vicuna_ids(pieces, question, [], answer, patches if image else None, captions)
        embed = self.llama.get_input_embeddings()
        with torch.no_grad():
            embeds = embed(torch.tensor([max(id, 0) for id in ids]))
            if image:
                first = ids.index(-200)
                embeds[first:first + patches] = self.features(image)
        hidden = self.llama.get_base_model().model(inputs_embeds=embeds[None]).last_hidden_state[0]
        return self.head(hidden[-2 if error("a reward read a token too early") else -1])[0]


def record():
    random = seeded("rewards")
    place = folder("rewards")
    shown = {name: picture(random, *size) for name, size in SIZES.items()}
    for name, image in shown.items():
        image.save(place / f"{name}.png")
    for title, how in CONFIGURATIONS.items():
        where, judge = make(random, title, **how)
        rows = []
        for number, name in enumerate([*shown, None]):
            for answer in ANSWERS:
                row = dict(image=name, question=QUESTIONS[number % 4], answer=answer, captions=CAPTIONS[number % 4])
                with torch.no_grad():
                    row["reward"] = float(judge(shown.get(name), row["question"], answer, row["captions"]))
                rows.append(row)
        save(where / "features.safetensors", {name: judge.features(image) for name, image in shown.items()})
        write_json(where / "rows.json", dict(title=title, rows=rows))
        if how["torch_files"]:
            train(where, judge, shown, rows)


def train(place, judge, shown, rows):
    """LLaVA-RLHF's loss with its centring term, over 20 batches: gradients of the first, weights after the last."""
    pairs = []
    for number in range(STEPS * BATCH):
        one, two = rows[number % 24], rows[(number * 7 + 1) % 24]
        pairs.append(dict(image=one["image"], question=one["question"], captions=one["captions"], chosen=one["answer"],
                          rejected=two["answer"] or "something else"))
    parameters = {f"{name.replace('.default', '')}": parameter for name, parameter in judge.llama.named_parameters()
                  if "lora_" in name} | {"reward_head.weight": judge.head.weight, "reward_head.bias": judge.head.bias}
    for parameter in judge.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)

    def loss(batch):
        rewards = [torch.stack([judge(shown.get(pair["image"]), pair["question"], pair[side], pair["captions"])
                                for pair in batch]) for side in ("chosen", "rejected")]
        centring = 1e-2 if error("a centring term of 0.01") else 1e-3
        return (-torch.nn.functional.logsigmoid(rewards[0] - rewards[1]).mean()
                + centring * (rewards[0] + rewards[1]).mean().abs())

    batches = [pairs[step * BATCH:(step + 1) * BATCH] for step in range(STEPS)]
    save(place / "training.safetensors", optimize(parameters, loss, batches))
    write_json(place / "pairs.json", pairs)
