#!/usr/bin/env bash
# The cost of `pipeline view` for a run: three rounds of the demo with the page of its rounds open in Chromium.
# Prints the processor seconds of the run and of the server. usage: benches/view/cost.sh
set -eu
here=$(cd "$(dirname "$0")/../.." && pwd)
program=$(realpath "${CARGO_TARGET_DIR:-$here/target}/release/pipeline")
folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; sleep 1; rm -rf "$folder"' EXIT
cd "$folder"

/usr/bin/time -f 'run: %e s, %U + %S processor seconds' "$program" run "$here/pipelines/dpo.yaml" --run run > run.log 2>&1 &
run=$!
until [ -e run/manifest.json ]; do sleep 0.1; done
"$program" view run > view.log 2>&1 &
view=$!
until grep -q ^http view.log; do sleep 0.1; done
chromium --headless --no-sandbox --disable-gpu --remote-debugging-port=0 --user-data-dir="$folder/profile" \
  "$(grep ^http view.log)#/rounds?runs=0" > /dev/null 2>&1 &
wait $run
grep '^run:' run.log
awk -v ticks="$(getconf CLK_TCK)" '{ print "server and its queries: " ($14 + $15 + $16 + $17) / ticks " processor seconds" }' "/proc/$view/stat"
