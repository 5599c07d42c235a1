"""Our sampling, scoring and training beside those of transformers and TRL, on the same files, in turn, and the ratios.

usage: bench.py [--repeat N] [WORKLOAD ...]      (`make bench` calls it; workloads: the names in the table that it prints)

Prints a table for benches/README.md. Times are of the work alone: of transformers, the processor and the network with
the model loaded; of ovchat, what its telemetry says of waiting for pictures, tower, prefill and decoding. Of trainings,
TRL's `train()` with everything loaded; of ovchat, the steps where sampling left the reference, and otherwise a whole
process, loading, reference pass and saving included.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
_metadata = subprocess.run(["cargo", "metadata", "--no-deps", "--format-version", "1"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
PROGRAM = Path(json.loads(_metadata.stdout)["target_directory"]) / "release" / "pipeline"
# Side of the square photographs, how many, new tokens.
SAMPLING = {
    "sample 3,700 tokens, 64 new": (768, 8, 64),
    "sample 7,400 tokens, 64 new": (1200, 4, 64),
    "sample 3,700 tokens, 256 new": (768, 6, 256),
}


# Side, pairs, whose answers: the sampler's or people's, and activation checkpointing of ovchat and of TRL.
TRAINING = {
    "train 3,700 tokens": (768, 6, "sampler", "never", "never"),
    "train 3,700 tokens, people's pairs": (768, 6, "people", "never", "never"),
    "train 3,700 tokens, people's pairs, checkpointing": (768, 6, "people", "always", "never"),
    "train 7,400 tokens": (1200, 2, "sampler", "never", "always"),
}

TRAINED = {}


def run(command, environment=None):
    """A finished process's output, and its peak memory in GB."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), errors.seek(0)
        text = out.read() + errors.read()
        if process.returncode:
            sys.exit(f"{command}\n{text}")
    return text, usage.ru_maxrss / 2**20


def peer(*arguments):
    text, _ = run([sys.executable, HERE / "peers.py", *map(str, arguments)])
    lines = [line for line in text.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {}


def ours(scratch, stages, models, table, query):
    """Runs a pipeline; gives the telemetry of its last stage, what a query says of it, and peak memory."""
    yaml = scratch / "bench.yaml"
    yaml.write_text(f"pipeline: bench\nseed: 1\nmodels:\n{models}stages:\n{stages}")
    folder = scratch / "run"
    subprocess.run(["rm", "-rf", folder], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    _, peak = run([PROGRAM, "run", yaml, "--run", folder], environment)
    ask = lambda query: json.loads(run([PROGRAM, "sql", folder, query, "--format", "json"], environment)[0])[0]
    telemetry = ask(f"""
        select sum(seconds_waiting) as waiting, sum(seconds_tower) as tower, sum(seconds_prefill) as prefill,
               sum(seconds_decode) as decode, sum(seconds_pictures) as pictures, sum(tower_passes) as passes,
               sum(steps * occupancy) / sum(steps) as occupancy
        from telemetry where stage = '{table}'""")
    telemetry["work"] = sum(telemetry[phase] for phase in ("waiting", "tower", "prefill", "decode"))
    return telemetry, ask(query), peak


def phases(telemetry):
    return "waiting, tower, prefill, decoding: " + ", ".join(f"{telemetry[phase]:.1f}" for phase in ("waiting", "tower", "prefill", "decode")) + " s"


def made_model(scratch):
    folder = scratch / "model"
    if not folder.exists():
        peer("model", folder)
    return folder


def made_data(scratch, side, count):
    folder = scratch / f"data-{side}-{count}"
    if not folder.exists():
        peer("data", folder, side, count)
    return folder


def sampling(scratch, name, side, count, new_tokens):
    model, data = made_model(scratch), made_data(scratch, side, count)
    theirs = peer("sample", model, data, new_tokens)
    models = f"  policy: {{ llava_onevision: {{ weights: {model}, dtype: float32, device: cpu }} }}\n"
    stages = (f"  prompts: {{ load_prompts: {{ from: {data}/prompts.json, images: {data}/images }} }}\n"
              f"  candidates: {{ sample: {{ prompts: prompts, model: policy, max_new_tokens: {new_tokens} }} }}\n")
    took, row, peak = ours(scratch, stages, models, "candidates", "select sum(array_length(token_ids)) as tokens from candidates")
    return dict(unit="new tokens/s", theirs=theirs["tokens"] / theirs["seconds"], ours=row["tokens"] / took["work"],
                their_peak=theirs["peak_gb"], our_peak=peak,
                note=f"{theirs['prompt_tokens']} tokens a prompt, {count} prompts, k = 5; {phases(took)}")


def unequal(scratch):
    """Answers that end anywhere: 250 of 32,000 tokens end one, so that they are 130 tokens long on average. Beside it the same
    in parts of as many prompts as grow side by side, each of which waits for its longest answer."""
    model, data = made_model(scratch), made_data(scratch, 200, 64)
    stops = list(range(300, 300 + 250 * 100, 100))
    models = f"  policy: {{ llava_onevision: {{ weights: {model}, dtype: float32, device: cpu }} }}\n"

    def one(part):
        stages = (f"  prompts: {{ load_prompts: {{ from: {data}/prompts.json, images: {data}/images }} }}\n"
                  f"  candidates: {{ sample: {{ prompts: prompts, model: policy, temperature: 1.0, top_p: 1.0, max_new_tokens: 256, "
                  f"part: {part}, stop_token_ids: {stops} }} }}\n")
        return ours(scratch, stages, models, "candidates", "select sum(array_length(token_ids)) as tokens, "
                    "min(array_length(token_ids)) as least, max(array_length(token_ids)) as most from candidates")
    (waiting, theirs, their_peak), (took, row, peak) = one(12), one(64)
    # Other neighbors change last bits, and with a choice among 32,000 tokens now and then one of these.
    assert abs(row["tokens"] / theirs["tokens"] - 1) < 0.05, (row, theirs)
    return dict(unit="new tokens/s", theirs=theirs["tokens"] / waiting["decode"], ours=row["tokens"] / took["decode"], their_peak=their_peak,
                our_peak=peak, note=f"ovchat without continuous batching, decoding alone; 320 answers of {row['least']} to {row['most']} tokens, "
                f"occupancy {took['occupancy']:.2f} and {waiting['occupancy']:.2f} without")


def pictures(scratch):
    """Decoding, resizing, cutting and normalizing alone."""
    model, data = made_model(scratch), made_data(scratch, 1200, 16)
    theirs = peer("pictures", model, data)
    environment = dict(os.environ, RAYON_NUM_THREADS="2")
    environment.pop("LD_LIBRARY_PATH", None)
    text, peak = run([PROGRAM.parent / "examples" / "pictures", model, data / "images"], environment)
    found = json.loads(text)
    return dict(unit="pictures/s", theirs=theirs["pictures"] / theirs["seconds"], ours=found["pictures"] / found["seconds"],
                their_peak=theirs["peak_gb"], our_peak=peak, note="PNG of 1200 x 1200 to 17 tiles, two threads")


def scoring(scratch):
    policy, judge, data = made_model(scratch), scratch / "reward", made_data(scratch, 768, 6)
    if not judge.exists():
        peer("reward", judge)
    models = (f"  policy: {{ llava_onevision: {{ weights: {policy}, dtype: float32, device: cpu }} }}\n"
              f"  judge: {{ llava_rlhf: {{ base: {judge}/base, vision: {judge}/vision, adapter: {judge}/adapter, "
              f"prompt: {judge}/prompt.txt, dtype: float32, device: cpu }} }}\n")
    stages = (f"  prompts: {{ load_prompts: {{ from: {data}/prompts.json, images: {data}/images }} }}\n"
              f"  candidates: {{ sample: {{ prompts: prompts, model: policy, max_new_tokens: 8 }} }}\n"
              f"  rewards: {{ score: {{ candidates: candidates, judge: judge }} }}\n")
    took, row, peak = ours(scratch, stages, models, "rewards", "select count(*) as answers, avg(reward) as mean from rewards")
    texts, _ = run([PROGRAM, "sql", scratch / "run", "select p.id, c.text from candidates c join prompts p on p.prompt_id = c.prompt_id",
                    "--format", "json"])
    (scratch / "answers.json").write_text(texts)
    theirs = peer("score", judge, data, scratch / "answers.json")
    assert row["answers"] == theirs["answers"] and abs(row["mean"] - theirs["mean"]) < 1e-3, (row, theirs)
    return dict(unit="answers/s", theirs=theirs["answers"] / theirs["seconds"], ours=row["answers"] / took["work"],
                their_peak=theirs["peak_gb"], our_peak=peak,
                note=f"5 answers of some 70 tokens a prompt, 576 patches; equal mean rewards; {phases(took)}")


def training(scratch, side, count, answers, checkpointing, their_checkpointing):
    """An epoch of DPO, all weights, two pairs an update."""
    model, data = made_model(scratch), made_data(scratch, side, count)
    stages = {
        "sampler": f"  prompts: {{ load_prompts: {{ from: {data}/prompts.json, images: {data}/images }} }}\n"
                   "  candidates: { sample: { prompts: prompts, model: policy, count: 2, max_new_tokens: 75 } }\n"
                   "  rewards: { score: { candidates: candidates, judge: judge } }\n"
                   "  pairs: { select_extremes: { rewards: rewards } }\n",
        "people": f"  pairs: {{ load_feedback: {{ from: {data}/pairs.json, images: {data}/images }} }}\n",
    }[answers]
    yaml, folder = scratch / "train.yaml", scratch / "run"
    yaml.write_text(
        f"pipeline: bench\nseed: 1\nmodels:\n  policy: {{ llava_onevision: {{ weights: {model}, dtype: float32, device: cpu }} }}\n"
        f"  judge: {{ scripted: {{}} }}\nstages:\n{stages}"
        f"  steps: {{ train_dpo: {{ pairs: pairs, model: policy, batch_pairs: 2, activation_checkpointing: {checkpointing}, "
        "reference_audit: { share: 0 } } }\n")
    subprocess.run(["rm", "-rf", folder], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    run([PROGRAM, "run", yaml, "--run", folder, "--until", "pairs"], environment)
    ask = lambda query: json.loads(run([PROGRAM, "sql", folder, query, "--format", "json"], environment)[0])
    pairs = ask("select id, image, prompt, chosen, rejected from pairs")
    for pair in pairs:
        pair["image"] = Path(pair["image"]).name
    (scratch / "pairs.json").write_text(json.dumps(pairs))
    begun = time.time()
    _, peak = run([PROGRAM, "run", yaml, "--run", folder], environment)
    seconds = time.time() - begun
    row = ask("select sum(seconds) as seconds, sum(tokens) as tokens from steps")[0]
    if answers == "sampler":
        seconds = row["seconds"]
    # TRL's time does not depend on what ovchat remembers: the same pairs are trained on once.
    asked = (json.dumps(pairs), their_checkpointing)
    if asked not in TRAINED:
        TRAINED[asked] = peer("train", model, scratch / "pairs.json", data / "images", their_checkpointing)
    theirs = TRAINED[asked]
    return dict(unit="pairs/s", theirs=theirs["pairs"] / theirs["seconds"], ours=count / seconds, their_peak=theirs["peak_gb"], our_peak=peak,
                note=f"{count} pairs of {row['tokens'] // count} tokens, prompt and both answers; TRL's checkpointing: {their_checkpointing}; "
                f"{seconds:.1f} s beside {theirs['seconds']:.1f} s")


def a_round(scratch):
    """A round of the demo on 200 of its prompts: ovchat with all of its process, the script without imports and loading."""
    samples = ROOT / "data-samples"
    prompts = scratch / "prompts.json"
    prompts.write_text(json.dumps(json.loads((samples / "prompts.json").read_text())[:200]))
    folder = scratch / "run"
    yaml = scratch / "round.yaml"
    # The script evaluates nothing.
    yaml.write_text((ROOT / "pipelines/dpo.yaml").read_text().split("# Made before round 1")[0].replace("../", f"{ROOT}/"))
    subprocess.run(["rm", "-rf", folder], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    begun = time.time()
    _, peak = run([PROGRAM, "run", yaml, "--run", folder, "--until", "steps", "--set", "rounds=1", "--set",
                   f"stages.prompts.load_prompts.from={prompts}"], environment)
    seconds = time.time() - begun
    theirs = peer("a_round", samples / "policy", samples / "reward", prompts, samples / "images")
    return dict(unit="prompts/s", theirs=200 / theirs["seconds"], ours=200 / seconds, their_peak=theirs["peak_gb"], our_peak=peak,
                note=f"200 prompts, {theirs['pairs']} pairs; the script sampled and scored in {theirs['sampled']:.1f} s, trained in "
                f"{theirs['trained']:.1f} s; ovchat took {seconds:.1f} s")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("workloads", nargs="*", default=[*SAMPLING, "unequal", "score", "pictures", *TRAINING, "round"])
    arguments = parser.parse_args()
    print("| work | unit | peer | ovchat | ratio | peak memory, GB | |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        for name in arguments.workloads:
            for _ in range(arguments.repeat):
                others = {"unequal": unequal, "score": scoring, "pictures": pictures, "round": a_round}
                if name in others:
                    found = others[name](scratch)
                elif name in TRAINING:
                    found = training(scratch, *TRAINING[name])
                else:
                    found = sampling(scratch, name, *SAMPLING[name])
                print(f"| {name} | {found['unit']} | {found['theirs']:.3g} | {found['ours']:.3g} | {found['ours'] / found['theirs']:.1f} "
                      f"| {found['their_peak']:.1f}, ours {found['our_peak']:.1f} | {found['note']} |", flush=True)


main()
