"""Records what PyTorch's autograd says of one step of `train_sft` and one of `train_reward`.

usage: record_training.py      (after record_onevision.py and record_reward.py, whose tiny models it reads)

Writes `training.safetensors`: the loss of a conversation with two answers, and of a pair, with the norms
of all gradients. Recorded with torch 2.11.0, transformers 5.23.0.
"""
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (CLIPImageProcessor, CLIPVisionModel, LlamaConfig, LlamaForCausalLM,
                          LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor

import record_reward

HERE = Path(__file__).parent
IGNORED = -100
torch.set_num_threads(1)


def sft(expected):
    """Next-token loss on both answers of a conversation, by the labels of transformers."""
    folder = HERE / "onevision"
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    network = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    pictures = LlavaOnevisionImageProcessorPil.from_pretrained(folder)
    side = pictures.size["height"]
    processor = LlavaOnevisionProcessor(
        image_processor=pictures, tokenizer=words, vision_aspect_ratio="anyres_max_4",
        num_image_tokens=(side // network.config.vision_config.patch_size) ** 2, vision_feature_select_strategy="full",
        video_processor=LlavaOnevisionVideoProcessor(size={"height": side, "width": side}))
    turns = [("<image>\nWhat is this?", "a cat"), ("Which color?", "gray")]
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    for question, answer in turns:
        text += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    picture = Image.open(folder / "large.png")
    inputs = processor(images=[picture], text=[text.removesuffix("\n")], return_tensors="pt")
    ids = inputs["input_ids"][0]
    labels = torch.full_like(ids, IGNORED)
    for _, answer in turns:
        wanted = torch.tensor(words(answer + "<|im_end|>")["input_ids"])
        starts = [at for at in range(len(ids)) if ids[at:at + len(wanted)].equal(wanted)]
        assert len(starts) == 1, answer
        labels[starts[0]:starts[0] + len(wanted)] = wanted
    loss = network(**inputs, labels=labels[None]).loss
    loss.backward()
    expected["sft.loss"] = loss.detach()
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            expected["sft.norm." + name.removeprefix("model.")] = parameter.grad.norm()


def reward(expected):
    """LLaVA-RLHF's loss of one pair: rows 0 (chosen) and 1 (rejected) of the recorded judge."""
    out = record_reward.OUT
    words = PreTrainedTokenizerFast.from_pretrained(out / "base")
    base = torch.load(out / "base/pytorch_model.bin")
    trained = torch.load(out / "adapter/adapter_model.bin")
    trained |= {f"reward_head.{name}": tensor for name, tensor in torch.load(out / "adapter/reward_head").items()}
    trained = {name: tensor.clone().requires_grad_() for name, tensor in trained.items()}
    projector = base.pop("model.mm_projector.weight"), base.pop("model.mm_projector.bias")
    for name in [name for name in trained if ".lora_A." in name]:
        weight = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
        base[weight] = base[weight] + 1 / 2 * trained[name.replace(".lora_A.", ".lora_B.")] @ trained[name]
    llama = LlamaForCausalLM(LlamaConfig(**record_reward.LLAMA)).eval()
    clip = CLIPVisionModel.from_pretrained(out / "vision").eval()
    processor = CLIPImageProcessor.from_pretrained(out / "vision")
    color = tuple(int(255 * mean) for mean in processor.image_mean)
    rewards = []
    for picture, question, answer, captions in record_reward.ROWS[:2]:
        facts = record_reward.FACTS + "".join(f"  - {caption}\n" for caption in captions) if captions else ""
        judge = record_reward.PROMPT.replace("{factual_prompt}", facts)
        before = words(f"{record_reward.SYSTEM} USER: ").input_ids
        after = words(f"\n{question} ASSISTANT: {answer}</s> {judge}").input_ids[1:]
        image = record_reward.square(Image.open(out / "images" / picture).convert("RGB"), color)
        pixels = processor(image, return_tensors="pt").pixel_values
        with torch.no_grad():
            features = clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            embed = base["model.embed_tokens.weight"]
            parts = [embed[torch.tensor([before])], features @ projector[0].T + projector[1], embed[torch.tensor([after])]]
            embeds = torch.cat(parts, 1)
        given = {name.removeprefix("model."): weight for name, weight in base.items() if name.startswith("model.")}
        hidden = torch.func.functional_call(llama.model, given, (), {"inputs_embeds": embeds}).last_hidden_state[0, -1]
        rewards.append((trained["reward_head.weight"] @ hidden + trained["reward_head.bias"])[0])
    chosen, rejected = rewards
    loss = -torch.nn.functional.logsigmoid(chosen - rejected) + 1e-3 * (chosen + rejected).abs()
    loss.backward()
    expected |= {"reward.loss": loss.detach()}
    expected |= {f"reward.norm.{name}": tensor.grad.norm() for name, tensor in trained.items()}


recorded = {}
sft(recorded)
reward(recorded)
save_file({name: tensor.contiguous() for name, tensor in recorded.items()}, HERE / "training.safetensors")
print(f"{len(recorded)} numbers; losses {recorded['sft.loss']:.6f} and {recorded['reward.loss']:.6f}")
