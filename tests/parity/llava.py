"""Tiny LLaVA-1.5 checkpoints in the `llava-hf` layout, as transformers 5 and 4 write them.

Their tokenizers are of the two kinds that such folders have. "prepend" is the file of llava-hf/llava-1.5-7b-hf, which
transformers 4.36 converted: its normalizer puts a space before every piece of text between special tokens. "first" is
what LlamaTokenizer of transformers 5 writes: a space before the whole text only. transformers 5 takes either file as it
is (`llava` is one of its MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS), where LlamaTokenizer would make a "first" of both.
"""
import copy
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import (AutoProcessor, CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlamaTokenizer, LlavaConfig,
                          LlavaForConditionalGeneration, LlavaProcessor)

from common import CORPUS, error, folder, llama_model, name_of

NAME, TITLE, TRAINING = "llava", "LLaVA-1.5, ", "llava/training"
NETWORK = LlavaForConditionalGeneration
VOCAB, CONTEXT = 448, 1024
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
IMAGE, PAD = "<image>", "<pad>"
SPACE = "\u2581"
SPECIAL = [UNKNOWN, BEGIN, END, IMAGE, PAD]
STOP, STOPS, PLACEHOLDERS = END, [END], [IMAGE]

CONFIGURATIONS = {
    "as many kv heads, shards": dict(heads=(4, 4), shards=3),
    "grouped kv heads, files of transformers 4": dict(heads=(4, 2), old=True, size=17),
    "other angles, a crop larger than the picture": dict(heads=(6, 1), theta=5e5, epsilon=1e-6, size=11,
                                                         crop=16, patch=4, hidden=24, dtype=torch.bfloat16),
}
DETAILED = "grouped kv heads, files of transformers 4"
TRAININGS = {"files of transformers 4": dict(heads=(4, 2), old=True)}
TRAINED = dict(heads=(4, 2))

# The template of llava-hf/llava-1.5-7b-hf, word for word.
HUB_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ 'ASSISTANT:' }}{% endif %}")
# The same for training. TRL adds no `<s>` and tokenizes an answer apart from its prompt, so that `<s>` and `</s>` have to be
# in the text; a "first" tokenizer then puts no space behind `<s>` by itself.
TEMPLATE = (
    "{{ '<s> ' }}{% for m in messages %}{{ m['role'].upper() + ': ' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endif %}"
    "{{ '</s>' if m['role'] == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
ASKED = []


def llama_tokenizer():
    """Llama's kind of tokenizer, with `<image>` and `<pad>` behind the vocabulary; newlines are bytes, as in Llama's."""
    lines = [line for text in CORPUS for line in text.split("\n")]
    lines += ["a  b", "a    b", "USER: Is it? ASSISTANT: Yes. USER: What? ASSISTANT: No."] * 9
    with tempfile.TemporaryDirectory() as place:
        llama_model(Path(place) / "tokenizer.model", [line for line in lines if line])
        return LlamaTokenizer.from_pretrained(place, pad_token=PAD, add_bos_token=True,
                                              extra_special_tokens={"image_token": IMAGE})


def old_name(name):
    """The name in the files of transformers 4 of a tensor that transformers 5 has in memory as `name`."""
    for new, old in [("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
                     ("model.vision_tower.", "vision_tower.vision_model."), ("model.", "")]:
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise ValueError(name)


def make(random, title, heads=(4, 4), shards=1, old=False, size=14, crop=14, patch=7, hidden=16,
         theta=1e4, epsilon=1e-5, dtype=torch.float16):
    """Writes a checkpoint; gives its folder, the network as transformers has it (float32) and its processor."""
    path = folder(NAME, name_of(title))
    vision = dict(hidden_size=16, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2, image_size=crop,
                  patch_size=patch, projection_dim=16)
    text = dict(hidden_size=hidden, intermediate_size=28, num_hidden_layers=2, num_attention_heads=heads[0],
                num_key_value_heads=heads[1], vocab_size=VOCAB, max_position_embeddings=CONTEXT, rms_norm_eps=epsilon)
    write_processor(path, "prepend" if old else "first", size, crop, patch)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text, rope_theta=theta),
        image_token_index=ids[IMAGE], pad_token_id=ids[PAD], image_seq_length=(crop // patch) ** 2)
    network = NETWORK(config).eval()
    for name, parameter in network.named_parameters():  # large enough that every part shows in the logits
        parameter.data += 0.15 * torch.randn_like(parameter)
        parameter.data = parameter.data.to(dtype).float()
    if old:
        write_old(path, network, vision, text, theta, dtype)
    else:
        size = sum(parameter.numel() for parameter in network.parameters()) * dtype.itemsize
        # A copy: converting the network would round its rotary frequencies, too.
        copy.deepcopy(network).to(dtype).save_pretrained(path, max_shard_size=size // shards + 2000)
    processor = AutoProcessor.from_pretrained(path)  # which reads config.json to choose the class of the tokenizer
    assert type(processor.tokenizer).__name__ == "TokenizersBackend"
    if error("bilinear for bicubic"):
        processor.image_processor.resample = 2
    return path, network, processor


def write_processor(path, kind, size, crop, patch):
    """The files of processor and tokenizer: by save_pretrained, or with the names and keys of transformers 4."""
    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": crop, "width": crop})
    llama = llama_tokenizer()
    settings = dict(patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    if kind == "first":
        LlavaProcessor(images, llama, chat_template=HUB_TEMPLATE, **settings).save_pretrained(path)
        return
    write = lambda name, value: (path / name).write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
    write("processor_config.json", dict(image_token=IMAGE, processor_class="LlavaProcessor", **settings))
    write("chat_template.json", {"chat_template": HUB_TEMPLATE})
    keys = ["crop_size", "do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "image_mean",
            "image_std", "resample", "rescale_factor", "size"]
    write("preprocessor_config.json", {key: value for key, value in images.to_dict().items() if key in keys}
          | dict(image_processor_type="CLIPImageProcessor", processor_class="LlavaProcessor"))

    state = json.loads(llama.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    made = Tokenizer(models.BPE(state["vocab"], merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    special = {llama.convert_tokens_to_ids(token): token for token in SPECIAL}
    made.add_special_tokens([AddedToken(special[id], special=True, normalized=False) for id in sorted(special)])
    made.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN}:1 $B:1", special_tokens=[(BEGIN, 1)])
    made.save(str(path / "tokenizer.json"))
    flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    write("tokenizer_config.json", dict(
        add_bos_token=True, add_eos_token=False, bos_token=BEGIN, clean_up_tokenization_spaces=False, eos_token=END,
        added_tokens_decoder={str(id): {"content": special[id], **flags} for id in sorted(special)},
        extra_special_tokens={"image_token": IMAGE}, image_token=IMAGE, legacy=False, model_max_length=10**30,
        pad_token=PAD, padding_side="left", processor_class="LlavaProcessor", sp_model_kwargs={},
        tokenizer_class="LlamaTokenizer", unk_token=UNKNOWN, use_default_system_prompt=False))


def write_old(path, network, vision, text, theta, dtype):
    """config.json as that of llava-hf/llava-1.5-7b-hf, which leaves out what is Llama's or CLIP's default, and weights."""
    config = network.config
    tensors = {old_name(name): tensor.to(dtype).contiguous().clone() for name, tensor in network.state_dict().items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100,
        "image_token_index": config.image_token_index, "model_type": "llava", "pad_token_id": config.pad_token_id,
        "projector_hidden_act": "gelu",
        "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], **text,
                        "model_type": "llama", "torch_dtype": "float16"}
        | ({} if theta == 1e4 else {"rope_theta": theta}),
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.36.0.dev0",
        "vision_config": {**vision, "model_type": "clip_vision_model", "vocab_size": 32000}, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "vocab_size": VOCAB}, indent=2))
    (path / "generation_config.json").write_text(json.dumps({
        "_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": config.pad_token_id,
        "transformers_version": "4.36.0.dev0"}, indent=2))


def messages(question, pictures=0, system=None, turns=()):
    """A conversation as the template takes it; the first user's message has the pictures."""
    said = [("system", system)] * (system is not None) + [*turns, ("user", question)]
    listed, pending = [], pictures
    for role, text in said:
        shown = [dict(type="image")] * (pending if role == "user" else 0)
        pending = 0 if role == "user" else pending
        listed.append(dict(role=role, content=[*shown, dict(type="text", text=text)]))
    return listed


def parts(question, pictures=0, system=None, turns=()):
    """The text of the template up to an answer, cut where the pictures are."""
    newline = "" if error("no newline behind the picture") else "\n"
    found, pending = ["" if system is None else system + " "], pictures
    for role, text in [*turns, ("user", question)]:
        found[-1] += f"{role.upper()}: "
        if role == "user":
            found += [newline] * pending
            pending = 0
        found[-1] += text + " "
    found[-1] += "ASSISTANT:"
    return found


def chat(*said, **more):
    """The text of the template up to an answer."""
    return IMAGE.join(parts(*said, **more))


def plain(tokenizer, text, first):
    """The ids of text without special tokens, at the beginning or behind a special token."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if not first and state["pre_tokenizer"]:
        state["pre_tokenizer"]["prepend_scheme"] = "never"
    made = Tokenizer.from_str(json.dumps(state))
    made.encode_special_tokens = True
    return made.encode(text, add_special_tokens=False).ids


def inputs(processor, question, pictures=()):
    """The processor's tensors for one prompt."""
    text = chat(question, len(pictures))
    assert error("no newline behind the picture") or text == processor.apply_chat_template(
        messages(question, len(pictures)), chat_template=HUB_TEMPLATE, add_generation_prompt=True), text
    if not pictures:
        return processor.tokenizer(text, return_tensors="pt")
    return processor(images=list(pictures), text=[text], return_tensors="pt")


def answer(processor, text):
    """The tokens of an answer with its stop token, as they stand behind "ASSISTANT:"."""
    asked, whole = (plain(processor.tokenizer, said, True) for said in ("ASSISTANT:", "ASSISTANT: " + text))
    return whole[len(asked):] + [processor.tokenizer.convert_tokens_to_ids(STOP)]


def lesson(processor, lesson, pictures):
    """The processor's tensors for a conversation with its last answer, and the places of the answers' tokens.

    Behind an earlier answer the template has a space and no `</s>`, so that its end is not learned."""
    tokenizer = processor.tokenizer
    text = chat(lesson["question"], 1, turns=lesson["turns"]) + " " + lesson["answer"]
    given = processor(images=pictures, text=[text + STOP], return_tensors="pt")
    shown = int((given["input_ids"] == tokenizer.convert_tokens_to_ids(IMAGE)).sum())
    text = text.replace(IMAGE, IMAGE * shown)
    found = tokenizer(text + STOP, return_offsets_mapping=True)
    assert found["input_ids"] == given["input_ids"][0].tolist()
    answers, end = [], 0
    for said in [*(said for role, said in lesson["turns"] if role == "assistant"), lesson["answer"]]:
        begin = text.index("ASSISTANT:", end) + len("ASSISTANT:")
        end = begin + len(" " + said)
        assert text[begin:end] == " " + said
        answers.append((begin, end))
    stop = [] if error("stop tokens not learned") else [len(found["input_ids"]) - 1]
    learned = [place for place, (first, last) in enumerate(found["offset_mapping"])
               if any(begin <= first < last <= end for begin, end in answers)]
    return given, torch.tensor(learned + stop)
