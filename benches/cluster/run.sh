#!/usr/bin/env bash
# Runs the pipeline under a real Slurm of three nodes on this machine, and under torchrun with three ranks:
# `make cluster-test`. Not part of the tests: it fetches 5 MB of Debian's packages and starts daemons, as
# root. Prints what benches/cluster/README.md shows.
#
#   WORK: the folder for Slurm and the runs; TORCHRUN: the program torchrun of a Python with torch 2.11
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
work=${WORK:-$(mktemp -d)}
program=${CARGO_TARGET_DIR:-$root/target}/release/pipeline
mkdir -p "$work"
cd "$work"
say() { echo "$(date +%T) $*"; }

# ---- A pipeline with scripted models, and its tables from one process
python3 -c "
import json
json.dump([{'id': f'q{i}', 'prompt': f'Question {i}?'} for i in range(10000)], open('prompts.json', 'w'))"
cat > p.yaml <<'YAML'
pipeline: cluster
seed: 3
rounds: 2
models:
  policy: { scripted: { words: 100 } }
  judge: { scripted: {} }
stages:
  prompts: { load_prompts: { from: prompts.json } }
  candidates: { sample: { prompts: prompts, model: policy, part: 50 } }
  rewards: { score: { candidates: candidates, judge: judge, part: 50 } }
  pairs: { select_extremes: { rewards: rewards } }
  steps: { train_dpo: { pairs: pairs, model: policy, save_every: 2 } }
YAML
# A checksum over the rows of all tables, in order.
content() {
  for table in candidates rewards pairs steps; do
    "$program" sql "$1" "select * exclude (seconds) from $table" --format csv 2> /dev/null ||
      "$program" sql "$1" "select * from $table" --format csv
  done | sha256sum | cut -c1-16
}
say "one process"
rm -rf alone && "$program" run p.yaml --run alone > /dev/null 2> alone.log
expected=$(content alone)
say "tables of one process: $expected"
same() { [ "$(content "$1")" = "$expected" ] && say "$1: the same tables" || { say "$1: OTHER TABLES"; exit 1; }; }

# ---- torchrun
torchrun=${TORCHRUN:-$(command -v torchrun || true)}
if [ -n "$torchrun" ]; then
  under_torchrun() {
    "$torchrun" --no-python --nnodes=1 --nproc-per-node=3 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:0 \
      --max-restarts=5 --monitor-interval=0.2 -- "$program" run p.yaml --run "$1" > "$1.log" 2>&1
  }
  say "torchrun, three ranks"
  rm -rf torchrun && under_torchrun torchrun
  same torchrun
  say "torchrun, three ranks, one of which is killed in the middle"
  rm -rf killed && under_torchrun killed &
  waiting=$!
  while [ "$(ls killed/candidates/round-1 2> /dev/null | wc -l)" -lt 60 ]; do sleep 0.05; done
  victim=$(pgrep -f "pipeline-engine run p.yaml --run killed" | tail -1)
  kill -9 "$victim" && say "killed process $victim after $(ls killed/candidates/round-1 | wc -l) parts"
  wait "$waiting"
  same killed
else
  say "no torchrun: skipped"
fi

# ---- Slurm
slurm=$work/slurm
if [ ! -x "$slurm/root/usr/sbin/slurmctld" ] && [ ! -x "$slurm/root/usr/sbin/slurmctld-wlm" ]; then
  say "fetching Slurm"
  mkdir -p "$slurm/debs" "$slurm/root"
  apt-get install -y -q --print-uris --no-install-recommends slurmctld slurmd slurm-client |
    grep -o "'http[^']*'" | tr -d "'" > "$slurm/uris"
  (cd "$slurm/debs" && xargs -n 1 curl -sSfO < "$slurm/uris")
  for deb in "$slurm"/debs/*.deb; do dpkg -x "$deb" "$slurm/root"; done
fi
mkdir -p "$slurm"/{state,run,log} "$slurm"/spool.n{1,2,3}
lib=$slurm/root/usr/lib/x86_64-linux-gnu
export LD_LIBRARY_PATH=$lib:$lib/slurm-wlm SLURM_CONF=$slurm/slurm.conf PATH=$slurm/root/usr/bin:$PATH
cat > "$SLURM_CONF" <<CONF
ClusterName=toy
SlurmctldHost=$(hostname)(127.0.0.1)
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
SlurmctldPort=26817
SlurmdSpoolDir=$slurm/spool.%n
StateSaveLocation=$slurm/state
SlurmctldPidFile=$slurm/run/ctld.pid
SlurmdPidFile=$slurm/run/slurmd.%n.pid
SlurmctldLogFile=$slurm/log/ctld.log
SlurmdLogFile=$slurm/log/slurmd.%n.log
PluginDir=$lib/slurm-wlm
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
InactiveLimit=0
KillWait=2
NodeName=n[1-3] NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=[26818-26820] CPUs=2
PartitionName=all Nodes=n[1-3] Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE
CONF
found() { for name in "$1-wlm" "$1"; do [ -x "$slurm/root/usr/sbin/$name" ] && echo "$slurm/root/usr/sbin/$name" && return; done; }
daemons=()
trap 'kill "${daemons[@]}" 2> /dev/null; sleep 1; kill -9 "${daemons[@]}" 2> /dev/null || true' EXIT
"$(found slurmctld)" -D -c -f "$SLURM_CONF" > "$slurm/log/ctld.out" 2>&1 &
daemons+=($!)
sleep 1
node() { "$(found slurmd)" -D -N "$1" -f "$SLURM_CONF" -d "$(found slurmstepd)" > "$slurm/log/$1.out" 2>&1 & daemons+=($!); eval "$1=$!"; }
for name in n1 n2 n3; do node $name; done
sleep 3
sinfo
# All nodes are this machine, whose address the names n1 to n3 are not.
export MASTER_ADDR=127.0.0.1
job() {
  sed "s|^#SBATCH --gpus-per-node.*||; s|^srun|srun --export=ALL,LD_LIBRARY_PATH=|; s| pipeline run| $program run|" \
    "$root/examples/slurm.sbatch" > job.sbatch
  sbatch --parsable "$@" --output="$work/slurm-%j.log" job.sbatch p.yaml "$run"
}
ended() { while squeue -h -j "$1" 2> /dev/null | grep -q .; do sleep 0.5; done; }

say "Slurm, three nodes: examples/slurm.sbatch"
run=slurm-run
rm -rf $run
number=$(job)
ended "$number"
grep -E "ranks|rank 0|done:" "slurm-$number.log" | head -5
same $run

say "Slurm, three nodes, of which n2 is lost in the middle"
run=slurm-lost
rm -rf $run
number=$(job)
while [ "$(ls $run/candidates/round-1 2> /dev/null | wc -l)" -lt 60 ]; do sleep 0.05; done
say "$(ls $run/candidates/round-1 | wc -l) parts are there"
pkill -9 -P "$n2" || true
kill -9 "$n2"
pkill -9 -f "slurmstepd.*n2" || true
for pid in $(pgrep -f "pipeline-engine run p.yaml --run $run"); do
  grep -qz "SLURMD_NODENAME=n2" "/proc/$pid/environ" 2> /dev/null && kill -9 "$pid"
done
say "n2 is lost"
sleep 15
node n2
say "n2 is back"
ended "$number"
say "ended"
sed 's/^/  /' "slurm-$number.log" | tail -5
same $run
