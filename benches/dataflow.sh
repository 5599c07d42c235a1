#!/usr/bin/env bash
# The dataflow alone: 200,000 prompts through load, scripted sample, scripted score and select, k = 5.
# Prints the run's own lines, then wall time and peak memory. usage: benches/dataflow.sh [PROMPTS [PROMPTS A PART [WORDS AN ANSWER]]]
set -eu
count=${1:-200000}
part=${2:-4096}
words=${3:-8}
program=${PIPELINE:-${CARGO_TARGET_DIR:-$(dirname "$0")/../target}/release/pipeline}
program=$(realpath "$program")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 - "$count" <<'PYTHON'
import json, sys
question = "Question number {}: what can be seen in the picture, and why is it there?"
rows = [dict(id=f"q{i}", prompt=question.format(i)) for i in range(int(sys.argv[1]))]
json.dump(rows, open("prompts.json", "w"))
PYTHON

cat > dataflow.yaml <<YAML
pipeline: dataflow
models:
  policy: { scripted: { words: $words } }
  judge: { scripted: {} }
stages:
  prompts: { load_prompts: { from: prompts.json } }
  candidates: { sample: { prompts: prompts, model: policy, part: $part } }
  rewards: { score: { candidates: candidates, judge: judge, part: $part } }
  pairs: { select_extremes: { rewards: rewards } }
YAML

/usr/bin/time -f 'wall %e s, peak memory %M KB' "$program" run dataflow.yaml
/usr/bin/time -f 'again: wall %e s, peak memory %M KB' "$program" run dataflow.yaml
