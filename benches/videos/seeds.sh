#!/usr/bin/env bash
# The video demo over three seeds, and once with a policy that sees one frame: the share of true answers
# to questions about held-out clips, by round, and the time of each run.
#
# usage: benches/videos/seeds.sh [FOLDER]      (the runs go to FOLDER, runs/video-seeds if left out)
set -eu
cd "$(dirname "$0")/../.."
folder=${1:-runs/video-seeds}
pipeline() { cargo run --release --quiet --bin pipeline -- "$@"; }

one() { # NAME SETTING…
  name=$1; shift
  begun=$(date +%s)
  pipeline run pipelines/video.yaml "$@" --run "$folder/$name" >&2
  seconds=$(($(date +%s) - begun))
  pipeline sql "$folder/$name" "select '$name' as run, $seconds as seconds, * from rounds order by round" --format csv
}

for seed in 1 2 3; do
  one "seed-$seed" --set "seed=$seed"
done
one one-frame --set seed=1 --set vars.frames=1
