#!/usr/bin/env bash
# The demo over five seeds: what its rounds reach, as mean and 95 % interval (Student's t, 4 degrees of
# freedom), and the gain of each seed from round 0 to 3. About five demos long.
#
# usage: benches/seeds.sh [FOLDER]      (the runs go to FOLDER, runs/seeds if left out)
set -eu
cd "$(dirname "$0")/.."
folder=${1:-runs/seeds}
pipeline() { cargo run --release --quiet --bin pipeline -- "$@"; }

for seed in 1 2 3 4 5; do
  pipeline run pipelines/dpo.yaml --set "seed=$seed" --run "$folder/$seed" >&2
  pipeline sql "$folder/$seed" "select $seed as seed, round, mean_reward, true_answers from rounds order by round" --format csv | tail -n +2
done | awk -F, '
  { reward[$1, $2] = $3; truth[$1, $2] = $4 }
  function say(name, round, of,    seed, sum, squares, mean) {
    for (seed = 1; seed <= 5; seed++) { sum += of[seed, round]; squares += of[seed, round] ^ 2 }
    mean = sum / 5
    printf "| %s | %d | %.3f | ± %.3f |\n", name, round, mean, 2.776 * sqrt((squares - 5 * mean ^ 2) / 4 / 5)
  }
  END {
    print "| held-out | round | mean | 95 % |\n|---|---|---|---|"
    for (round = 0; round <= 3; round++) say("true answers", round, truth)
    for (round = 0; round <= 3; round++) say("mean reward", round, reward)
    for (seed = 1; seed <= 5; seed++) gain[seed, 3] = truth[seed, 3] - truth[seed, 0]
    say("gain in true answers", 3, gain)
    for (seed = 1; seed <= 5; seed++) printf "seed %d: %.3f to %.3f\n", seed, truth[seed, 0], truth[seed, 3]
  }'
