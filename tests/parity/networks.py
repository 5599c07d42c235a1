"""Tower, projector with packing, decoder and logits; greedy answers; answers sampled as ours are."""
import copy
import hashlib

import torch
from PIL import Image

import llava
import onevision
from common import ARGUMENTS, error, folder, picture, save, seeded, write_json

# Each prompt's pictures: large, small, several, none.
SIZES = {"large": (61, 40), "small": (13, 9), "wide": (300, 4), "tall": (7, 90), "square": (36, 36), "dot": (1, 1)}
PROMPTS = [(["large"], "What is this?"), (["small"], "Why?"), (["wide"], "Describe the image."), (["tall"], "你好"),
           (["square"], "Is that true?"), (["dot"], ""), (["large", "wide"], "Which is wider?"), ([], "Say something.")]
GREEDY, GREEDY_TOKENS = 50, 64
# Logits are kept over the whole vocabulary, for the last position and every so many before it.
LOGITS_EVERY = ARGUMENTS.logits_every


class QuickGelu(torch.nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def with_errors(network):
    """Makes the deliberate error in the network, if it is one of the network's."""
    text = network.config.text_config
    decoder, tower = network.model.language_model, network.model.vision_tower
    if error("an epsilon of 1e-5 for 1e-6 in RMSNorm"):
        for module in decoder.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 1e-5
    if error("an epsilon of 1e-5 for 1e-6 in the tower"):
        for module in tower.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-5
    if error("quick_gelu for gelu in the tower"):
        for module in tower.modules():
            if hasattr(module, "activation_fn"):
                module.activation_fn = QuickGelu()
    if error("the tanh form of gelu in the projector"):
        network.model.multi_modal_projector.act = torch.nn.GELU(approximate="tanh")
    if error("post_layernorm applied to the tower's features"):
        tower.encoder.layers[-1].register_forward_hook(lambda _m, _i, out: tower.post_layernorm(
            out[0] if isinstance(out, tuple) else out))
    if error("no newline in the picture's features"):
        if hasattr(network.model, "image_newline"):
            network.model.image_newline.data.zero_()
    if error("rotary angles of base 10,000"):
        theta = 1e4 ** (torch.arange(0, text.hidden_size // text.num_attention_heads, 2).float()
                        / (text.hidden_size // text.num_attention_heads))
        decoder.rotary_emb.inv_freq = 1 / theta
    if error("positions that grow a little too fast"):
        forward = decoder.rotary_emb.forward
        decoder.rotary_emb.forward = lambda x, position_ids: forward(x, position_ids ** 1.02)
    if error("a mask that hides each token from itself"):
        for layer in decoder.layers:
            attend = layer.self_attn.forward
            def shifted(*args, attend=attend, **given):
                length = given["hidden_states"].shape[1]
                mask = torch.full((length, length), -1e9).triu(0)
                mask[0, 0] = 0
                return attend(*args, **{**given, "attention_mask": mask[None, None]})
            layer.self_attn.forward = shifted
    if network.config.model_type == "llava":
        with_errors_of_llava(network)
    return network


def with_errors_of_llava(network):
    """Errors that only LLaVA-1.5 can have."""
    tower = network.model.vision_tower
    if error("the last layer of LLaVA-1.5's tower for the one before"):
        network.config.vision_feature_layer = -1
    if error("the class token kept, and the last patch dropped"):
        # Turned by one place, the states behind the class token begin with it.
        tower.encoder.layers[-2].register_forward_hook(lambda _module, _given, out: out.roll(1, 1))
    if error("gelu for quick_gelu in LLaVA-1.5's tower"):
        for layer in tower.encoder.layers:
            layer.mlp.activation_fn = torch.nn.GELU()
    if error("no layer norm before the layers of LLaVA-1.5's tower"):
        tower.pre_layrnorm.register_forward_hook(lambda _module, given, _out: given[0])


def record():
    for architecture in (onevision, llava):
        record_of(architecture)


def tower_features(network, pixels):
    """What the tower gives the projector."""
    states = network.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    layers = network.config.vision_feature_layer
    layers = layers if isinstance(layers, list) else [layers]
    tower = torch.cat([states[layer] for layer in layers], -1)
    if error("the layer before the last as the feature") and layers == [-1]:
        tower = states[-2]
    return tower[:, 1:] if network.config.vision_feature_select_strategy == "default" else tower


def record_of(architecture):
    random = seeded("networks")
    shown = {name: picture(random, *size) for name, size in SIZES.items()}
    place = folder(architecture.NAME)
    for name, image in shown.items():
        image.save(place / f"{name}.png")
    write_json(place / "prompts.json", [dict(pictures=names, question=question) for names, question in PROMPTS])
    cases = []
    for title, how in architecture.CONFIGURATIONS.items():
        path, network, processor = architecture.make(random, title, **how)
        with_errors(network)
        expected = {}
        for index, (names, question) in enumerate(PROMPTS):
            given = architecture.inputs(processor, question, [shown[name] for name in names])
            with torch.no_grad():
                if names:
                    tower = tower_features(network, given["pixel_values"].flatten(0, -4))
                    expected |= {f"tower.{index}": tower,
                                 f"projector.{index}": network.model.multi_modal_projector(tower)}
                out = network(**given, output_hidden_states=True)
            expected |= {f"ids.{index}": given["input_ids"][0], f"hidden.{index}": out.hidden_states[-1][0],
                         f"logits.{index}": out.logits[0].flip(0)[::LOGITS_EVERY]}
        save(path / "expected.safetensors", expected)
        case = dict(title=architecture.TITLE + title, folder=path.name, bfloat16=None)
        if title == architecture.DETAILED:
            # An error may be one that a copy in bfloat16 can't have; then the spread is not looked at.
            spread = [1.0, 1.0] if ARGUMENTS.error else spread_of_bfloat16(architecture, network, processor, shown, expected)
            case["bfloat16"] = spread
            greedy(architecture, random, path, network, processor, shown)
            sampled(architecture, path, network, processor, shown)
        cases.append(case)
    write_json(place / "cases.json", dict(logits_every=LOGITS_EVERY, cases=cases))


def spread_of_bfloat16(architecture, network, processor, shown, expected):
    """How far the reference's own bfloat16 logits are from its float32 ones: root of the mean square, greatest."""
    network = copy.deepcopy(network).to(torch.bfloat16)
    apart = []
    for index, (names, question) in enumerate(PROMPTS):
        given = architecture.inputs(processor, question, [shown[name] for name in names])
        with torch.no_grad():
            apart.append((network(**given).logits[0].float().flip(0)[::LOGITS_EVERY] - expected[f"logits.{index}"]).flatten())
    apart = torch.cat(apart)
    return [float(apart.square().mean().sqrt()), float(apart.abs().max())]


def banned_of(architecture, processor):
    tokenizer = processor.tokenizer
    return [*tokenizer.convert_tokens_to_ids(architecture.PLACEHOLDERS), *range(len(tokenizer), architecture.VOCAB)]


def greedy(architecture, random, path, network, processor, shown):
    """Answers without chance, and how far apart the best two tokens were at each step."""
    words = "What is the cat red blue left picture of in star? How many there two true".split()
    prompts, expected = [], {}
    for index in range(GREEDY):
        names = [[], ["small"], ["square"], ["dot"]][index % 4]
        question = " ".join(random.choice(words, random.randint(1, 9)))
        given = architecture.inputs(processor, question, [shown[name] for name in names])
        with torch.no_grad():
            out = network.generate(**given, do_sample=False, max_new_tokens=GREEDY_TOKENS, output_logits=True,
                                   suppress_tokens=banned_of(architecture, processor), return_dict_in_generate=True,
                                   eos_token_id=processor.tokenizer.convert_tokens_to_ids(architecture.STOPS))
        ids = out.sequences[0, given["input_ids"].shape[1]:]
        if error("an answer that ends a token early"):
            ids = ids[:-1]
        gaps = []
        for logits in out.logits:
            logits = logits[0].clone()
            logits[banned_of(architecture, processor)] = -torch.inf
            best = logits.topk(2).values
            gaps.append(best[0] - best[1])
        prompts.append(dict(pictures=names, question=question))
        expected |= {f"ids.{index}": ids, f"gaps.{index}": torch.stack(gaps)}
    write_json(path / "greedy.json", prompts)
    save(path / "greedy.safetensors", expected)


def uniform(purpose, seed, counter):
    text = purpose + seed.to_bytes(8, "little", signed=seed < 0) + counter.to_bytes(8, "little")
    return hashlib.sha256(text).digest()[:8]


def sampled(architecture, path, network, processor, shown):
    """Sampled answers to the prompts."""
    givens = [architecture.inputs(processor, question, [shown[name] for name in names]) for names, question in PROMPTS]
    settings, expected = draw(architecture, network, processor, givens, tokens=24, count=3)
    write_json(path / "sampled.json", settings)
    save(path / "sampled.safetensors", expected)


def draw(architecture, network, processor, givens, tokens, count):
    """Answers drawn with our numbers (src/torch/sampling.rs) from the reference's logits, with their log-probabilities; and
    the settings of the draw."""
    temperature, top_p = 0.7, 0.9
    stops = processor.tokenizer.convert_tokens_to_ids(architecture.STOPS)
    expected = {}
    for index, given in enumerate(givens):
        for answer in range(count):
            seed = int.from_bytes(uniform(b"answer", 1000 + index, answer), "little", signed=True)
            ids, logps, margins = [], [], []
            for position in range(tokens):
                whole = torch.cat([given["input_ids"], torch.tensor([ids], dtype=torch.long)], 1)
                with torch.no_grad():
                    logits = network(**{**given, "input_ids": whole, "attention_mask": torch.ones_like(whole)}).logits[0, -1]
                scores = logits.clone()
                scores[banned_of(architecture, processor)] = -torch.inf
                chances = torch.softmax(scores / temperature, -1).double()
                order = sorted(range(len(chances)), key=lambda id: (-float(chances[id]), id))
                sums = torch.cumsum(chances[order], 0)
                kept = int((sums >= top_p).nonzero()[0])
                draw = (int.from_bytes(uniform(b"token", seed, position), "little") >> 11) / 2**53
                point = draw * float(sums[kept])
                rank = int((sums > point).nonzero()[0])
                # How near the draw was to another token, or the set to another size.
                margins.append(min(float((sums - point).abs().min()), float((sums - top_p).abs().min())))
                token = order[rank]
                logps.append(float(torch.log_softmax(logits, -1)[token]) + (1e-3 if error("log-probabilities 0.001 too high") else 0))
                ids.append(token)
                if token in stops:
                    break
            key = f"{index}.{answer}"
            expected |= {f"ids.{key}": torch.tensor(ids), f"logps.{key}": torch.tensor(logps),
                         f"margins.{key}": torch.tensor(margins)}
    settings = dict(temperature=temperature, top_p=top_p, max_new_tokens=tokens, count=count,
                    seeds=[1000 + index for index in range(len(givens))])
    return settings, expected
