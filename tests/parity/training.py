"""One batch and twenty updates of DPO (by TRL) and of supervised fine-tuning (by a plain loop); LLaVA-NeXT's mask."""
import copy
import json
import math

import torch

import llava
import onevision
from common import SYSTEM, error, folder, picture, qwen_tokenizer, save, seeded, write_json

STEPS, BATCH, RATE, BETA = 20, 4, 1e-4, 0.1
WARMUP = 0.12  # of 20 steps 2.4, so that rounding shows
WORDS = "the cat red blue left picture two stars is not a dog there nothing one shape".split()
SIZES = {"large": (61, 40), "small": (13, 9), "square": (24, 24)}


def optimize(parameters, loss, batches):
    """AdamW, warmup, half a cosine and clipping, as the Trainer of transformers puts them together.

    Gives the gradients of the first loss, all losses, and the weights in the end."""
    decay = 0.01 if error("a weight decay of 0.01 for 0") else 0.0
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
    warmup = (math.floor if error("warmup steps rounded down") else math.ceil)(len(batches) * WARMUP)
    def rate(step):
        if step < warmup:
            return step / max(1, warmup)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, len(batches) - warmup)))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    recorded, losses = {}, []
    for batch in batches:
        optimizer.zero_grad()
        value = loss(batch)
        value.backward()
        if not losses:
            recorded |= {f"gradient.{name}": parameter.grad.clone() for name, parameter in parameters.items()
                         if parameter.grad is not None}
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(value.detach())
    recorded["losses"] = torch.stack(losses)
    recorded |= {f"after.{name}": parameter.detach() for name, parameter in parameters.items()}
    return recorded


def names_of(network):
    """The parameters that have a gradient, by the names of files without prefixes."""
    layers = network.config.vision_feature_layer
    tower = network.model.vision_tower
    used = len(tower.encoder.layers) + 1 + max(layers if isinstance(layers, list) else [layers])
    unused = [f"vision_tower.encoder.layers.{number}." for number in range(used, len(tower.encoder.layers))]
    return {name.removeprefix("model."): parameter for name, parameter in network.named_parameters()
            if not any(part in name for part in [*unused, "tower.post_layernorm"])}


def record():
    for architecture in (onevision, llava):
        record_of(architecture)


def record_of(architecture):
    random = seeded("training")
    place = folder(architecture.TRAINING)
    shown = {name: picture(random, *size) for name, size in SIZES.items()}
    for name, image in shown.items():
        image.save(place / f"{name}.png")
    say = lambda: " ".join(random.choice(WORDS, random.randint(1, 8)))
    pairs = [dict(pictures=[list(SIZES)[number % 3]], question=say(), chosen=say() + ".", rejected=say())
             for number in range(STEPS * BATCH)]
    write_json(place / "pairs.json", pairs)
    make = lambda title, how: architecture.make(random, f"training {title}", **how, dtype=torch.float32)
    for title, how in architecture.TRAININGS.items():
        path, network, processor = make(title, how)
        dpo(architecture, place / f"dpo-{path.name.removeprefix('training-')}.safetensors", network, processor, shown, pairs)
    path, network, processor = make("trl", architecture.TRAINED)
    trl(architecture, place, path, processor, shown, pairs)
    beside = (path, network, processor)
    path, network, processor = make("sft", architecture.TRAINED)
    sft(architecture, place, network, processor, shown, say)
    if architecture is onevision:  # the scripts of LLaVA-NeXT, and what is the same for every architecture
        masks(place, random)
        losses(architecture, place, *beside, shown, pairs)
    adapter(architecture, place, beside[0], processor, shown, pairs)


def whole(architecture, processor, shown, pair, answer):
    """The inputs of a prompt with an answer behind it, and where the answer begins."""
    given = architecture.inputs(processor, pair["question"], [shown[name] for name in pair["pictures"]])
    start = given["input_ids"].shape[1]
    ids = torch.cat([given["input_ids"], torch.tensor([answer], dtype=torch.long)], 1)
    return {**given, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, start


def logp(architecture, network, processor, shown, pair, side):
    answer = architecture.answer(processor, pair[side])
    if error("an answer without its stop token"):
        answer = answer[:-1]
    given, start = whole(architecture, processor, shown, pair, answer)
    logits = network(**given).logits[0, start - 1:-1].float()
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(answer)[:, None]).sum()


def dpo(architecture, path, network, processor, shown, pairs):
    """The loss of a batch, what is logged, and the gradient of every parameter."""
    batch = pairs[:BATCH]
    reference = [[-30.0 - number, -35.0 + number] for number in range(BATCH)]
    logps = [[logp(architecture, network, processor, shown, pair, side) for side in ("chosen", "rejected")] for pair in batch]
    logps = torch.stack([torch.stack(pair) for pair in logps])
    rewards = (0.11 if error("a beta of 0.11 for 0.1") else BETA) * (logps - torch.tensor(reference))
    loss = -torch.nn.functional.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()
    loss.backward()
    recorded = {"loss": loss, "logps": logps, "rewards": rewards, "reference": torch.tensor(reference)}
    recorded |= {f"gradient.{name}": parameter.grad for name, parameter in names_of(network).items()
                 if parameter.grad is not None}
    save(path, recorded)


def trainer(architecture, path, processor, shown, pairs, reference=None, **settings):
    """TRL's DPOTrainer of a checkpoint, which takes the pairs in their order."""
    import tempfile

    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    processor.chat_template = processor.tokenizer.chat_template = architecture.TEMPLATE
    rows = [dict(images=[shown[pair["pictures"][0]]],
                 prompt=[*architecture.ASKED, dict(role="user", content=pair["question"])],
                 chosen=[dict(role="assistant", content=pair["chosen"])],
                 rejected=[dict(role="assistant", content=pair["rejected"])]) for pair in pairs]
    load = lambda: architecture.NETWORK.from_pretrained(path, dtype=torch.float32)
    given = dict(per_device_train_batch_size=1, gradient_accumulation_steps=BATCH, warmup_steps=WARMUP) | settings
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), num_train_epochs=1, learning_rate=RATE, beta=BETA, lr_scheduler_type="cosine",
        weight_decay=0.0, max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[], max_length=None, bf16=False,
        use_cpu=True, dataloader_num_workers=0, remove_unused_columns=False, optim="adamw_torch", gradient_checkpointing=False, **given)
    return InOrder(model=load(), ref_model=reference or load(), args=config, train_dataset=Dataset.from_list(rows),
                   processing_class=processor)


def logged(made, keys):
    """What a trainer logs at each update."""
    made.train()
    log = [entry for entry in made.state.log_history if "loss" in entry]
    return {key.replace("/", "_"): torch.tensor([entry[key] for entry in log], dtype=torch.float64) for key in keys}


def trl(architecture, place, path, processor, shown, pairs):
    """Twenty updates by TRL's DPOTrainer, in the order of the pairs."""
    made = trainer(architecture, path, processor, shown, pairs)
    keys = ["loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "grad_norm", "learning_rate"]
    recorded = {f"log.{key}": numbers for key, numbers in logged(made, keys).items()}
    recorded |= {f"after.{name}": parameter.detach() for name, parameter in names_of(made.model).items()}
    save(place / "trl.safetensors", recorded)


# TRL's names with the label smoothing that they are recorded with. It takes none in `sigmoid`, and has no `simpo`.
LOSSES = {"sigmoid": 0.0, "hinge": 0.0, "ipo": 0.0, "exo_pair": 0.1, "nca_pair": 0.0, "robust": 0.1, "bco_pair": 0.0,
          "sppo_hard": 0.0, "aot": 0.1, "apo_zero": 0.0, "apo_down": 0.0, "sft": 0.0, "sigmoid_norm": 0.0}


def losses(architecture, place, path, network, processor, shown, pairs):
    """The loss of a batch and the norm of its gradient, by each loss of TRL and by two of them together, beside a
    reference that is another model."""
    batch = pairs[:BATCH]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += parameter.abs().mean() * torch.randn_like(parameter)
        newline = processor.tokenizer("\n")["input_ids"]

        def counted(pair, side):
            answer = architecture.answer(processor, pair[side]) + newline
            given, start = whole(architecture, processor, shown, pair, answer)
            logits = network(**given).logits[0, start - 1:-1].float()
            return torch.log_softmax(logits, -1).gather(-1, torch.tensor(answer)[:, None]).sum()
        reference = torch.stack([torch.stack([counted(pair, side) for side in ("chosen", "rejected")]) for pair in batch])
    recorded = {"reference": reference.double()}
    more = 1.1 if error("a label smoothing of 0.11 for 0.1") else 1.0
    cases = {name: dict(loss_type=[name], label_smoothing=smoothing * more) for name, smoothing in LOSSES.items()}
    cases["sigmoid and sft"] = dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3])
    for name, settings in cases.items():
        # Margins are sorted within what TRL computes at once.
        at_once = BATCH if name == "aot" else 1
        made = trainer(architecture, path, processor, shown, batch, reference=copy.deepcopy(network), per_device_train_batch_size=at_once,
                       gradient_accumulation_steps=BATCH // at_once, warmup_steps=0, **settings)
        log = logged(made, ["loss", "grad_norm"])
        recorded[name] = torch.stack([log["loss"][0], log["grad_norm"][0]])
    save(place / "losses.safetensors", recorded)


def adapter(architecture, place, path, processor, shown, pairs):
    """Twenty updates of an adapter of peft's to the decoder, by a plain loop."""
    from peft import LoraConfig, get_peft_model
    network = architecture.NETWORK.from_pretrained(path, dtype=torch.float32)
    alpha = 16 if error("a policy's adapter of twice the strength") else 8
    targets = r"model\.language_model\.(.*\.)?(q_proj|down_proj)"
    network = get_peft_model(network, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets))
    parameters = {name.replace(".default", ""): parameter for name, parameter in network.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    network.save_pretrained(place / "adapter")
    (place / "adapter/README.md").unlink(missing_ok=True)
    config = json.loads((place / "adapter/adapter_config.json").read_text())
    write_json(place / "adapter/adapter_config.json", config | {"base_model_name_or_path": ""})
    for module in network.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] = alpha / 4
    reference = torch.tensor([[-30.0 - 0.1 * number, -35.0 + 0.1 * number] for number in range(STEPS * BATCH)])

    def loss(batch):
        values = []
        for number in batch:
            logps = torch.stack([logp(architecture, network, processor, shown, pairs[number], side) for side in ("chosen", "rejected")])
            rewards = BETA * (logps - reference[number])
            values.append(-torch.nn.functional.logsigmoid(rewards[0] - rewards[1]))
        return torch.stack(values).mean()

    batches = [range(step * BATCH, (step + 1) * BATCH) for step in range(STEPS)]
    save(place / "adapter.safetensors", {"reference": reference, **optimize(parameters, loss, batches)})


def sft(architecture, place, network, processor, shown, say):
    """Twenty updates of the next-token loss on all answers of conversations, by transformers' own labels and loss."""
    lessons = []
    for number in range(STEPS * BATCH):
        turns = [["user", say()], ["assistant", say()]] if number % 2 else []
        lessons.append(dict(pictures=[list(SIZES)[number % 3]], turns=turns, question=say(), answer=say()))

    def loss(batch):
        total, count = 0.0, 0
        for lesson in batch:
            given, learned = architecture.lesson(processor, lesson, [shown[lesson["pictures"][0]]])
            ids = given["input_ids"][0]
            logits = network(**given).logits[0].float()
            at = learned if error("a token learned from itself") else learned - 1
            total = total + torch.nn.functional.cross_entropy(logits[at], ids[learned], reduction="sum")
            count += len(learned)
        return total / count

    batches = [lessons[step * BATCH:(step + 1) * BATCH] for step in range(STEPS)]
    save(place / "sft.safetensors", optimize(names_of(network), loss, batches))
    write_json(place / "lessons.json", lessons)


def masks(place, random):
    """Ids and labels of LLaVA-NeXT's `preprocess_qwen` in its DPO script, as the specification states them."""
    path, _, _ = onevision.make(random, "training mask", layout="C")
    (path / "model.safetensors").unlink()
    tokenizer = qwen_tokenizer()
    plain = lambda text: tokenizer(text, split_special_tokens=True)["input_ids"]
    start, end, image = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<image>"])
    newline, features = plain("\n"), 5
    cases = []
    for question, answer, has_picture in [("What is this?", "A cat.", True), ("Why?", "Because.", False), ("\nYes?", "No", True),
                                          ("你好", "猫", True)]:
        ids = [start] + plain("system\n" + SYSTEM) + [end] + newline
        labels = [1] + [0] * (len(ids) - 3) + [1, 1]
        # The text behind the placeholder begins with a newline, and one of its own is put before it.
        between = [] if error("one newline behind the picture") else newline
        behind = newline + [image] * features + between + plain("\n" + question)
        text = behind if has_picture else plain("\n" + question)
        block = [start] + plain("user") + text + [end] + newline
        ids, labels = ids + block, labels + [1] + [0] * (len(block) - 3) + [1, 1]
        block = [start] + plain("assistant\n") + plain(answer) + [end] + newline
        labels += [1] + [0] * len(plain("assistant\n")) + [1] * (len(plain(answer)) + 2)
        ids = ids + block
        cases.append(dict(question=question, answer=answer, pictures=[features] if has_picture else [], ids=ids, labels=labels))
    write_json(place / "masks.json", cases)
