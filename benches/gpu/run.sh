#!/usr/bin/env bash
# The measurements of benches/GPU.md, on a machine with a GPU, Python and torch, and without Rust and network.
#
#   make gpu-kit                             where Rust is: packs .gpu
#   OUT=/tmp/out bash .gpu/run.sh            on the GPU machine, in the repository's root; some nine minutes
#   TINY=1 OUT=/tmp/out bash .gpu/run.sh     the rehearsal on a CPU, with a tiny model
#
# Each part has a time limit of its own, so that a failure costs only itself. Everything is in $OUT/log.
set -u
mkdir -p "$OUT"
exec > >(tee "$OUT/log") 2>&1
here=$(cd "$(dirname "$0")" && pwd)
begun=$SECONDS
work=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$work"' EXIT
say() { echo; echo "=== $((SECONDS - begun)) s: $*"; }

# A home of its own: no rates and no caches of this machine count.
export HOME=$work XDG_CACHE_HOME=$work/cache PYTHONUNBUFFERED=1
device=cuda
[ -n "${TINY:-}" ] && device=cpu
python=${PYTHON:-python3}
xz -dc "$here/pipeline-engine.xz" > "$work/pipeline-engine"
chmod +x "$work/pipeline-engine"
engine=$work/pipeline-engine
LD_LIBRARY_PATH=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__) + "/lib")')
export LD_LIBRARY_PATH
export TORCH_CUDNN_SDPA_DEPRIORITIZED=1 PYTORCH_ALLOC_CONF=expandable_segments:True
sql() { timeout 30 "$engine" sql "$1" "$2" --format csv; }

say doctor
timeout 60 "$engine" doctor
nproc
free -g | head -2
if command -v nvidia-smi > /dev/null; then
  nvidia-smi --query-gpu=timestamp,utilization.gpu,memory.used,power.draw --format=csv,noheader,nounits -lms 500 > "$OUT/smi.csv" &
fi

say "a model of the 7B shape with random weights"
timeout 150 "$python" "$here/make.py" data-samples/policy "$work" &
made=$!

say "small world: the GPU in float32 and bfloat16 beside the CPU in float32"
small() {
  NVIDIA_TF32_OVERRIDE=0 timeout 150 "$engine" run pipelines/dpo.yaml --run "$work/small-$1-$2" --until answers \
    --set "models.policy.llava_onevision.device=$1" --set "models.policy.llava_onevision.dtype=$2" > "$OUT/small-$1-$2.log" 2>&1
  echo "small world on $1 in $2: exit status $?"
}
small cpu float32
[ "$device" = cuda ] && small cuda float32
small "$device" bfloat16
wait "$made"
"$python" - "$work" <<'PY'
import glob, json, subprocess, sys
work = sys.argv[1]
def answers(run):
    query = "select prompt_id, token_ids, token_logps from answers"
    out = subprocess.run([f"{work}/pipeline-engine", "sql", run, query, "--format", "jsonl"], capture_output=True, text=True).stdout
    return {row["prompt_id"]: row for row in map(json.loads, out.splitlines())}
expected = answers(f"{work}/small-cpu-float32")
for run in sorted(glob.glob(f"{work}/small-*")):
    found = answers(run)
    same = [key for key in expected if key in found and found[key]["token_ids"] == expected[key]["token_ids"]]
    off = [abs(a - b) for key in same for a, b in zip(found[key]["token_logps"], expected[key]["token_logps"])]
    print(f"{run.rsplit('/', 1)[1]}: {len(same)} of {len(expected)} greedy answers as on the CPU; log-probabilities off by at most {max(off, default=0):.2e}")
PY

telemetry="select stage, sum(prompt_tokens) as prompt_tokens, sum(answer_tokens) as answer_tokens, sum(seconds_tower) as tower, sum(seconds_prefill) as prefill, sum(seconds_decode) as decode, sum(steps) as steps, 1000 * sum(seconds_decode) / sum(steps) as ms_a_step, sum(answer_tokens) / sum(seconds_decode) as tokens_a_second, sum(retries) as retries from telemetry group by stage order by stage"
set_device=(--set "models.policy.llava_onevision.device=$device")
say "sampling, greedy answers, a judge that replies in text"
timeout 30 "$engine" plan "$work/sample.yaml" "${set_device[@]}" 2>&1 | grep -iE "memory|GB" | head -20
timeout 170 "$engine" run "$work/sample.yaml" "${set_device[@]}" --run "$work/sampled"
sql "$work/sampled" "$telemetry"

say "DPO with a reference pass"
timeout 30 "$engine" plan "$work/train.yaml" "${set_device[@]}" 2>&1 | grep -iE "memory|GB" | head -20
from=$(date +%s)
timeout 150 "$engine" run "$work/train.yaml" "${set_device[@]}" --run "$work/trained"
sql "$work/trained" "select step, loss, grad_norm, tokens, seconds from steps order by step"
if [ -s "$OUT/smi.csv" ]; then
  echo "peak of the training by nvidia-smi, MiB: $(tail -n $((2 * ($(date +%s) - from))) "$OUT/smi.csv" | awk -F', ' '{ if ($3 > most) most = $3 } END { print most }')"
fi

say "transformers on the same model"
timeout 60 "$python" "$here/peers.py" check "$work" "$work/sampled" "$engine"
timeout 90 "$python" "$here/peers.py" sample "$work"
timeout 60 "$python" "$here/peers.py" train "$work"

say "attention, call by call"
timeout 60 "$python" "$here/attention.py" > "$OUT/attention.txt" 2>&1
grep -E "WRONG|FAILS|needs a GPU|us$|ms$" "$OUT/attention.txt" | head -30

say end
