#!/usr/bin/env bash
# Trains all seven models on MNIST with the README's commands, then writes the table and the pictures.
#
#     tools/reproduce.sh            the full settings, for a GPU
#     tools/reproduce.sh --quick    smaller ones: at most 12 minutes a model on two CPU cores
#
# DATA names the folder with the data sets (data), OUT that of the runs and the report (reproduce, reproduce-quick).
# What is there already goes on where it was, or is left alone if it is finished.
set -euo pipefail
cd "$(dirname "$0")/.."
mode=${1:-} data=${DATA:-data}
out=${OUT:-reproduce${mode/#--/-}}

train() { # NAME MODEL.py FLAGS…: a new run, or the rest of one
    local run="$out/$1" file=$2
    shift 2
    if [ -e "$run/checkpoint.pt" ]; then
        python "$file" --resume "$run" --data-dir "$data"
    else
        python "$file" "$@" --data-dir "$data" --out "$run"
    fi
}

case "$mode" in
--quick)
    train dcgan dcgan.py --dataset mnist --width 16 --steps 6000
    train wgan wgan.py --dataset mnist --width 16 --steps 2000 --lr 2e-4
    train wgan_gp wgan_gp.py --dataset mnist --width 16 --steps 1500 --lr 5e-4
    train bigan bigan.py --dataset mnist --network mlp --width 64 --steps 8000 --decay-start 4000 --decay-end 8000
    train wbli wbli.py --dataset mnist --width 16 --steps 1000
    train gm_wae gm_wae.py --dataset mnist --network mlp --width 16 --steps 2000
    train alpha_gan alpha_gan.py --dataset mnist --width 16 --steps 4000
    ;;
"")
    train dcgan dcgan.py --dataset mnist
    train wgan wgan.py --dataset mnist
    train wgan_gp wgan_gp.py --dataset mnist
    train bigan bigan.py --dataset mnist --network mlp
    train wbli wbli.py --dataset mnist
    train gm_wae gm_wae.py --dataset mnist --network mlp
    train alpha_gan alpha_gan.py --dataset mnist
    ;;
*)
    echo "usage: tools/reproduce.sh [--quick]" >&2
    exit 2
    ;;
esac
python -m tools.evaluate "$out"/{dcgan,wgan,wgan_gp,bigan,wbli,gm_wae,alpha_gan} --data-dir "$data" --report "$out/report"
