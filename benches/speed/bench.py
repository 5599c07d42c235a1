"""Our sampling and scoring beside those of transformers, on the same files, in turn, and the ratios.

usage: bench.py [--repeat N] [WORKLOAD ...]      (`make bench` calls it; workloads: see WORKLOADS)

Prints a table for benches/README.md. Times are of the work alone: models are loaded, nothing is compiled any more.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
_metadata = subprocess.run(["cargo", "metadata", "--no-deps", "--format-version", "1"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
PROGRAM = Path(json.loads(_metadata.stdout)["target_directory"]) / "debug" / "pipeline"
# Side of the square photographs, how many, new tokens.
SAMPLING = {
    "sample 3,700 tokens, 64 new": (768, 3, 64),
    "sample 7,400 tokens, 64 new": (1200, 2, 64),
    "sample 3,700 tokens, 256 new": (768, 6, 256),
}


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
    """Runs a pipeline; gives the seconds of its last stage, what a query says of it, and peak memory."""
    yaml = scratch / "bench.yaml"
    yaml.write_text(f"pipeline: bench\nseed: 1\nmodels:\n{models}stages:\n{stages}")
    folder = scratch / "run"
    subprocess.run(["rm", "-rf", folder], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    text, peak = run([PROGRAM, "run", yaml, "--run", folder], environment)
    minutes, seconds = re.search(rf"^{table} .*rows in (?:(\d+) min )?([\d.]+) s", text, re.M).groups()
    answer, _ = run([PROGRAM, "sql", folder, query, "--format", "json"], environment)
    return 60 * int(minutes or 0) + float(seconds), json.loads(answer)[0], peak


def sampling(scratch, name, side, count, new_tokens):
    model, data = scratch / "model", scratch / f"data-{side}-{count}"
    if not model.exists():
        peer("model", model)
    if not data.exists():
        peer("data", data, side, count)
    theirs = peer("sample", model, data, new_tokens)
    models = f"  policy: {{ llava_onevision: {{ weights: {model}, dtype: float32, device: cpu }} }}\n"
    stages = (f"  prompts: {{ load_prompts: {{ from: {data}/prompts.json, images: {data}/images }} }}\n"
              f"  candidates: {{ sample: {{ prompts: prompts, model: policy, max_new_tokens: {new_tokens} }} }}\n")
    seconds, row, peak = ours(scratch, stages, models, "candidates", "select sum(array_length(token_ids)) as tokens from candidates")
    return dict(unit="new tokens/s", theirs=theirs["tokens"] / theirs["seconds"], ours=row["tokens"] / seconds,
                their_peak=theirs["peak_gb"], our_peak=peak, note=f"{theirs['prompt_tokens']} tokens a prompt, {count} prompts, k = 5")


def scoring(scratch):
    policy, judge, data = scratch / "model", scratch / "reward", scratch / "data-768-6"
    for folder, what in [(policy, ["model"]), (judge, ["reward"])]:
        if not folder.exists():
            peer(*what, folder)
    if not data.exists():
        peer("data", data, 768, 6)
    models = (f"  policy: {{ llava_onevision: {{ weights: {policy}, dtype: float32, device: cpu }} }}\n"
              f"  judge: {{ llava_rlhf: {{ base: {judge}/base, vision: {judge}/vision, adapter: {judge}/adapter, "
              f"prompt: {judge}/prompt.txt, dtype: float32, device: cpu }} }}\n")
    stages = (f"  prompts: {{ load_prompts: {{ from: {data}/prompts.json, images: {data}/images }} }}\n"
              f"  candidates: {{ sample: {{ prompts: prompts, model: policy, max_new_tokens: 8 }} }}\n"
              f"  rewards: {{ score: {{ candidates: candidates, judge: judge }} }}\n")
    seconds, row, peak = ours(scratch, stages, models, "rewards", "select count(*) as answers, avg(reward) as mean from rewards")
    texts, _ = run([PROGRAM, "sql", scratch / "run", "select p.id, c.text from candidates c join prompts p on p.prompt_id = c.prompt_id",
                    "--format", "json"])
    (scratch / "answers.json").write_text(texts)
    theirs = peer("score", judge, data, scratch / "answers.json")
    assert row["answers"] == theirs["answers"] and abs(row["mean"] - theirs["mean"]) < 1e-3, (row, theirs)
    return dict(unit="answers/s", theirs=theirs["answers"] / theirs["seconds"], ours=row["answers"] / seconds,
                their_peak=theirs["peak_gb"], our_peak=peak, note="5 answers of some 70 tokens a prompt, 576 patches; equal mean rewards")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("workloads", nargs="*", default=[*SAMPLING, "score"])
    arguments = parser.parse_args()
    print("| work | unit | transformers | ovchat | ratio | peak memory, GB | |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        for name in arguments.workloads:
            for _ in range(arguments.repeat):
                found = scoring(scratch) if name == "score" else sampling(scratch, name, *SAMPLING[name])
                print(f"| {name} | {found['unit']} | {found['theirs']:.2f} | {found['ours']:.2f} | {found['ours'] / found['theirs']:.1f} "
                      f"| {found['their_peak']:.1f}, ours {found['our_peak']:.1f} | {found['note']} |", flush=True)


main()
