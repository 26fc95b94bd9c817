#!/usr/bin/env bash
# Trains all models on MNIST with the commands of commands.txt, then writes the table and the pictures.
#
#     experiments/reproduce.sh            the full settings, for a GPU
#     experiments/reproduce.sh --quick    smaller networks: 3 to 80 minutes a model on one CPU core
#
# DATA names the folder with the data sets (data), OUT that of the runs and the report (reproduce,
# reproduce-quick). What is there already goes on where it was, or is left alone if it is finished.
set -euo pipefail
cd "$(dirname "$0")/.."
mode=${1:-} data=${DATA:-data}
out=${OUT:-reproduce${mode/#--/-}}
if [ -n "$mode" ] && [ "$mode" != --quick ]; then
    echo "usage: experiments/reproduce.sh [--quick]" >&2
    exit 2
fi

runs=()
while read -r model flags; do
    full=${flags%%|*} quick=${flags##*|}
    if [ "$mode" = --quick ]; then
        full="$full $quick"
    fi
    run="$out/$model"
    runs+=("$run")
    if [ -e "$run/checkpoint.pt" ]; then
        python "$model.py" --resume "$run" --data-dir "$data"
    else
        python "$model.py" $full --data-dir "$data" --out "$run" # unquoted: these are several words
    fi
done < <(grep -v '^#' experiments/commands.txt)
python -m tools.evaluate "${runs[@]}" --data-dir "$data" --report "$out/report"
