#!/usr/bin/env bash
# All that waits for a GPU, on one H100 or H200 in at most 25 minutes.
#
#     experiments/gpu.sh                  all parts: tests bench train evaluate
#     experiments/gpu.sh bench train      these parts alone
#
# Called again, each part goes on where it stopped; to repeat something, remove it from OUT or RUNS.
#
#     MINUTES       25         then nothing new is begun, and a run in progress saves and stops
#     DATA          data       folder with the data sets; MNIST may lie there gzipped
#     OUT           docs/gpu   tables and pictures, from where docs/speed.md and docs/results.md take them
#     RUNS          runs/gpu   the runs
#     SEEDS         0 1 2      of the runs; all models with the first, then all with the next
#     MODELS        all of commands.txt, which has their flags, too
#     STEPS         20000      of each run
#     BENCH_SECONDS 2          for each of bench's figures
#     FLAGS                    more flags, for bench and for the runs
#     SAMPLES                  of each run in the evaluation; unless given, as many as tools.evaluate takes
#     DEVICE        cuda
#
# A trial without a GPU, of some minutes:
#
#     DEVICE=cpu STEPS=20 SEEDS=0 FLAGS="--width 4 --batch-size 16" SAMPLES=500 OUT=try RUNS=try/runs \
#         BENCH_SECONDS=1 experiments/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda} data=${DATA:-data} out=${OUT:-docs/gpu} runs=${RUNS:-runs/gpu}
read -ra extra <<< "${FLAGS:-}"
commands=experiments/commands.txt
models=${MODELS:-$(grep -v '^#' $commands | cut -d' ' -f1)}
deadline=$((SECONDS + 60 * ${MINUTES:-25}))
failed=0

say() { echo "[$((SECONDS / 60)) min] $*"; }

left() { echo $((deadline - SECONDS)); } # seconds

limited() { # RESERVE COMMAND…: it has until the deadline less some seconds; 124 if that was too little
    local room=$(($(left) - $1))
    [ "$room" -gt 0 ] || return 124
    timeout --signal=TERM --kill-after=30 "$room" "${@:2}" &
    child=$!
    wait $child
}
child=
trap 'kill -TERM $child; wait $child; exit 130' INT TERM # a run in progress saves before it ends

complain() { # STATUS WHAT
    if [ "$1" = 124 ]; then
        say "$2: no time is left; the same command goes on"
    else
        say "$2 ended with $1"
        failed=1
    fi
}

tests() {
    [ ! -e "$out/tests.txt" ] || return 0
    limited 0 python -W ignore::DeprecationWarning -m pytest -m cuda tests/test_cuda.py --durations 10 \
        > >(tee "$out/tests-unfinished.txt") 2>&1
    local status=$?
    if [ "$status" = 0 ] && [ "$device" != cuda ]; then
        say "tests: without a GPU all are skipped"
    elif [ "$status" = 0 ]; then
        mv "$out/tests-unfinished.txt" "$out/tests.txt"
    else
        complain "$status" tests
    fi
}

bench() {
    local model status tables=()
    mkdir -p "$out/bench"
    for model in $models; do
        if [ ! -e "$out/bench/$model.json" ]; then
            limited 0 python -m tools.bench "$model" --dataset mnist --data-dir "$data" --device "$device" \
                --seconds "${BENCH_SECONDS:-2}" --baseline --json "$out/bench/$model.json" ${extra[@]+"${extra[@]}"}
            status=$?
            [ "$status" = 0 ] || complain "$status" "bench of $model"
        fi
        [ ! -e "$out/bench/$model.json" ] || tables+=("$out/bench/$model.json")
    done
    [ ${#tables[@]} = 0 ] || python - "${tables[@]}" > "$out/speed.md" << 'END'
import json
import sys

from tools import bench, tables

results = [result for path in sys.argv[1:] for result in json.load(open(path))["results"]]
print(tables.markdown(bench.table(results)))
END
}

train() {
    local model seed run status begun flags reserve=0
    [[ " $parts " != *" evaluate "* ]] || reserve=240
    for seed in ${SEEDS:-0 1 2}; do
        for model in $models; do
            run=$runs/$model-$seed
            [ ! -e "$run/finished" ] || continue
            say "$model, seed $seed"
            flags=$(sed -n "s/^$model //p" $commands | cut -d'|' -f1)
            begun=$SECONDS
            if [ -e "$run/checkpoint.pt" ]; then
                limited "$reserve" python "$model.py" --resume "$run" --device "$device" --data-dir "$data"
            else
                # flags, without quotes, is several words
                limited "$reserve" python "$model.py" $flags --data-dir "$data" --device "$device" \
                    --seed "$seed" --out "$run" --steps "${STEPS:-20000}" ${extra[@]+"${extra[@]}"}
            fi
            status=$?
            echo "$model,$seed,$((SECONDS - begun)),$status" >> "$out/train.csv"
            if [ "$status" = 0 ]; then
                touch "$run/finished"
            else
                complain "$status" "$model, seed $seed"
                [ "$status" != 124 ] || return
            fi
        done
    done
}

evaluate() {
    local model seed run kind status finished=() report=()
    for model in $models; do
        for seed in ${SEEDS:-0 1 2}; do
            run=$runs/$model-$seed
            [ -e "$run/finished" ] || continue
            finished+=("$run")
            for kind in samples reconstructions; do
                [ ! -d "$run/$kind" ] || cp "$(ls "$run/$kind"/* | tail -1)" "$out/$model-$seed-$kind.png"
            done
        done
    done
    [ ${#finished[@]} != 0 ] || return 0
    if [ -e "$out/results.txt" ] && [ -z "$(find "$runs" -name finished -newer "$out/results.txt")" ]; then
        return 0
    fi
    python -c "import matplotlib, umap" 2> /dev/null && report=(--report "$out/report")
    [ -z "${SAMPLES:-}" ] || report+=(--n "$SAMPLES")
    limited 0 python -m tools.evaluate "${finished[@]}" --data-dir "$data" --device "$device" \
        ${report[@]+"${report[@]}"} > >(tee "$out/results-unfinished.txt")
    status=$?
    if [ "$status" = 0 ]; then
        mv "$out/results-unfinished.txt" "$out/results.txt"
    else
        complain "$status" evaluation
    fi
}

parts=${*:-tests bench train evaluate}
for part in $parts; do
    if [[ " tests bench train evaluate " != *" $part "* ]]; then
        echo "$part is no part; they are: tests bench train evaluate" >&2
        exit 2
    fi
done
mkdir -p "$out" "$runs"
python - "$device" > "$out/machine.txt" << 'END'
import platform
import sys
from datetime import date

import torch

card = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else platform.machine()
print(f"{card}, torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}, {date.today()}")
END
echo "commit ${COMMIT:-$(git rev-parse --short HEAD 2> /dev/null)}" >> "$out/machine.txt"
for part in $parts; do
    say "$part"
    "$part"
done
say "done: $out"
exit $failed
