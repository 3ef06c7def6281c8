#!/usr/bin/env bash
# What a GPU does with Earwitness, in one call of at most LIMIT seconds, from the root of a checkout:
#   bash tools/bench/gpu.sh                        all parts, each with its own time limit; what is done is kept
#   PARTS="fsdp2 compiled" bash tools/bench/gpu.sh  some of them
#   CPU=1 bash tools/bench/gpu.sh                  the same on a CPU with a tiny model, to try the script
# The results lie in $OUT: summary.txt, a JSON object for each measurement, and the logs.
set -u
cd "$(dirname "$0")/../.." || exit 2
PYTHON=${PYTHON:-python3}
OUT=${OUT:-/tmp/earwitness-gpu}
LIMIT=${LIMIT:-520}
PARTS=${PARTS:-env step full demo fsdp2 compiled}
PRESET=${PRESET:-turbo}
LENGTH="--clips 256 --warm-up 4 --steps 12"
DEMO_STEPS=60
DTYPE=bf16
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
if [ -n "${CPU:-}" ]; then
  export CUDA_VISIBLE_DEVICES=
  PRESET=sandbox LENGTH="--clips 32 --warm-up 1 --steps 2 --global-size 4 --micro-seconds 60" DEMO_STEPS=20 DTYPE=fp32
fi
mkdir -p "$OUT"
WORK=$(mktemp -d)

say() { echo "$@" | tee -a "$OUT/summary.txt"; }

# try SECONDS NAME command...: what it prints goes to NAME.out and NAME.log; its last lines are shown if it fails
try() {
  local seconds=$1 name=$2 began=$SECONDS code
  shift 2
  [ $((LIMIT - SECONDS)) -lt "$seconds" ] && seconds=$((LIMIT - SECONDS))
  [ "$seconds" -lt 10 ] && { say "-- $name: left out, no time is left"; return 1; }
  timeout --signal=INT --kill-after=10 "$seconds" "$@" > "$OUT/$name.out" 2> "$OUT/$name.log"
  code=$?
  say "$name: exit code $code after $((SECONDS - began)) s"
  [ $code = 0 ] || tail -n 15 "$OUT/$name.log" "$OUT/$name.out" | cut -c1-400 | tee -a "$OUT/summary.txt"
  return $code
}

# measure SECONDS NAME option...: `tools.bench step`, and its medians in the summary
measure() {
  local seconds=$1 name=$2
  shift 2
  # shellcheck disable=SC2086
  try "$seconds" "$name" "$PYTHON" -m tools.bench step --preset "$PRESET" $LENGTH --dir "$WORK" --json "$@" || return
  mv "$OUT/$name.out" "$OUT/$name.json"
  "$PYTHON" - "$OUT/$name.json" <<'P' | tee -a "$OUT/summary.txt"
import json, sys

result = json.load(open(sys.argv[1], encoding="utf-8"))
for table in ("device", "step"):
    for name, figures in result[table].items():
        print(f"  {name}:", ", ".join(f"{key} {value:.4g}" for key, value in figures["median"].items()))
P
}

# train SECONDS NAME ENGINE STEPS: the demo's run under an engine
train() {
  try "$1" "$2" "$PYTHON" -m launch train configs/demo.yaml run.name=gpu run.dir="$WORK/demo" engine.backend="$3" \
    optim.max_steps="$4" engine.dtype=$DTYPE monitor.every_steps=5 checkpoint.every_steps=10 evaluate.every_steps=1000 evaluate.captions=2 --procs 1
}

part_env() {
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>&1 | tee -a "$OUT/summary.txt"
  try 60 doctor "$PYTHON" -m launch doctor
  grep -iE "torch|attention|deepspeed|nccl" "$OUT/doctor.out" | cut -c1-160 | tee -a "$OUT/summary.txt"
}
part_step() { measure 170 own; }
part_full() { measure 120 full --window full; }
part_fsdp2() { measure 120 fsdp2 --backend fsdp2; }
part_compiled() { measure 200 compiled --compile; }
part_demo() { # a run that each engine takes over from the other one, an export, captions
  try 100 demo-data "$PYTHON" -m tools.demo --data-only || return
  train 100 demo-zero2 zero2 $((DEMO_STEPS / 2)) && train 100 demo-fsdp2 fsdp2 "$DEMO_STEPS" || return
  grep -hE "resumes|^step .*loss" "$OUT"/demo-zero2.out "$OUT"/demo-fsdp2.out | cut -c1-120 | tee -a "$OUT/summary.txt"
  try 60 demo-export "$PYTHON" -m tools.export "$WORK/demo" "$WORK/captioner" &&
    try 60 demo-caption "$PYTHON" -m tools.caption "$WORK/captioner" demo/clips/held-out --json
}

trap 'rm -rf "$WORK"; say "all this took $SECONDS s"' EXIT
say "$(date -u +%FT%TZ) $(git rev-parse --short HEAD 2>/dev/null) $PRESET"
for part in $PARTS; do
  say "---- $part ($SECONDS s)"
  "part_$part"
done
