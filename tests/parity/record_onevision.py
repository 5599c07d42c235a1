"""Records what transformers computes with a tiny LLaVA-OneVision, for the tests of src/torch.

usage: record_onevision.py [OUT]      (default: the folder `onevision` beside this script)

Writes a random checkpoint of some 25,000 parameters as `save_pretrained` writes it, three small
pictures, and `expected.safetensors`: token ids, hidden states, greedy answers, log-probabilities,
and the DPO loss of one pair with its gradients. Recorded with torch 2.11.0, transformers 5.23.0.
"""
import json
import os
import sys

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor,
                          PreTrainedTokenizerFast, Qwen2Config, SiglipVisionConfig)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor

transformers.logging.set_verbosity_error()
SIDE, PATCH, VOCAB = 12, 4, 264
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
PINPOINTS = [[SIDE * i, SIDE * j] for i in range(1, 4) for j in range(1, 4)]
# Each prompt's pictures: a large one that is scaled down, a small one with padding, two, none.
PROMPTS = [(["large.png"], "What is this?"), (["small.png"], "Why?"),
           (["large.png", "wide.png"], "Which is wider?"), ([], "Say something.")]
PICTURES = {"large.png": (61, 40), "small.png": (13, 9), "wide.png": (30, 7)}  # width, height
CHOSEN, REJECTED = "a cat", "two red dogs"
BETA, REFERENCE = 0.1, (-30.0, -70.0)
GREEDY_TOKENS = 12


def tokenizer(out):
    """Bytes, no merges, and the five special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(out)
    return fast


def model(ids):
    torch.manual_seed(1)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                         num_attention_heads=2, image_size=SIDE, patch_size=PATCH,
                                         vision_use_head=False),
        text_config=Qwen2Config(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6,
                                num_key_value_heads=2, vocab_size=VOCAB, rope_theta=1e6,
                                max_position_embeddings=256, bos_token_id=ids["<|endoftext|>"],
                                eos_token_id=ids["<|im_end|>"], tie_word_embeddings=False),
        image_token_index=ids["<image>"], video_token_index=ids["<video>"], vision_feature_layer=[-2, -1],
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_4", image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False)
    network = LlavaOnevisionForConditionalGeneration(config).eval()
    for parameter in network.parameters():  # large enough that every part shows in the logits
        parameter.data += 0.15 * torch.randn_like(parameter)
    network.generation_config.eos_token_id = ids["<|im_end|>"]
    return network


def main():
    out = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(os.path.abspath(__file__)), "onevision")
    os.makedirs(out, exist_ok=True)
    torch.set_num_threads(1)
    tok = tokenizer(out)
    ids = {s: tok.convert_tokens_to_ids(s) for s in SPECIAL}
    network = model(ids)
    network.save_pretrained(out)
    images = dict(image_grid_pinpoints=PINPOINTS, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3,
                  rescale_factor=1 / 255, size={"height": SIDE, "width": SIDE})
    with open(os.path.join(out, "preprocessor_config.json"), "w") as file:
        json.dump({"image_processor_type": "LlavaOnevisionImageProcessor", **images}, file, indent=1)
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(**images), tokenizer=tok, vision_aspect_ratio="anyres_max_4",
        num_image_tokens=(SIDE // PATCH) ** 2, vision_feature_select_strategy="full",
        video_processor=LlavaOnevisionVideoProcessor(size={"height": SIDE, "width": SIDE}))
    random = np.random.RandomState(2)
    pictures = {}
    for name, (width, height) in PICTURES.items():
        pictures[name] = Image.fromarray(random.randint(0, 256, (height, width, 3), dtype=np.uint8))
        pictures[name].save(os.path.join(out, name))

    def inputs(names, question):
        text = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
                + "<image>\n" * len(names) + question + "<|im_end|>\n<|im_start|>assistant\n")
        if not names:
            return tok(text, return_tensors="pt")
        shown = [pictures[name] for name in names]
        return processor(images=[shown] if len(shown) > 1 else shown, text=[text], return_tensors="pt")

    def answer_logps(prompt, answer):
        """Natural-log probabilities of the answer's tokens behind the prompt."""
        whole = torch.cat([prompt["input_ids"], torch.tensor([answer])], 1)
        given = {**prompt, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
        logits = network(**given).logits[0, prompt["input_ids"].shape[1] - 1:-1]
        return torch.log_softmax(logits.float(), -1).gather(-1, torch.tensor(answer)[:, None])[:, 0]

    expected = {}
    banned = [ids["<image>"], ids["<video>"], *range(len(tok), VOCAB)]
    for index, (names, question) in enumerate(PROMPTS):
        prompt = inputs(names, question)
        with torch.no_grad():
            given = network(**prompt, output_hidden_states=True)
            greedy = network.generate(**prompt, do_sample=False, max_new_tokens=GREEDY_TOKENS, suppress_tokens=banned,
                                      eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]])
            greedy = greedy[0, prompt["input_ids"].shape[1]:]
            logps = answer_logps(prompt, greedy.tolist())
        expected |= {f"ids.{index}": prompt["input_ids"][0], f"hidden.{index}": given.hidden_states[-1][0],
                     f"logits.{index}": given.logits[0, -1], f"greedy.{index}": greedy, f"logps.{index}": logps}

    prompt = inputs(*PROMPTS[0])
    chosen, rejected = (tok(text)["input_ids"] + [ids["<|im_end|>"]] for text in (CHOSEN, REJECTED))
    logps = torch.stack([answer_logps(prompt, chosen).sum(), answer_logps(prompt, rejected).sum()])
    rewards = BETA * (logps - torch.tensor(REFERENCE))
    loss = -torch.nn.functional.logsigmoid(rewards[0] - rewards[1])
    loss.backward()
    expected |= {"dpo.logps": logps.detach(), "dpo.loss": loss.detach()}
    # The norm of every gradient, and the gradients of a few parameters in full.
    whole = ["image_newline", "vision_tower.embeddings.patch_embedding.weight", "multi_modal_projector.linear_1.bias",
             "language_model.layers.0.self_attn.k_proj.weight", "language_model.layers.1.mlp.down_proj.weight"]
    for name, parameter in network.named_parameters():
        if parameter.grad is None:
            continue
        name = name.removeprefix("model.")
        expected[f"norm.{name}"] = parameter.grad.norm()
        if name in whole:
            expected[f"gradient.{name}"] = parameter.grad
    save_file({name: tensor.contiguous() for name, tensor in expected.items()},
              os.path.join(out, "expected.safetensors"))


main()
