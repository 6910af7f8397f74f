#!/usr/bin/env bash
# The speed that the project aims at, measured on one H100 or H200. Rows go to benchmarks/results/, or to the folder
# that is given. Operations first, then whole steps; one that fails does not stop the others.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results}
device=$(python -c 'import torch; print(torch.cuda.get_device_name().split()[1].lower())')

failed=0
bench() { clear-attn bench --overwrite "$@" || failed=1; }

# One attention of FLUX.1-dev at 1024 px, beside dense attention and raster order.
bench --pixels 1024x1024 --variant dense --variant raster-flex --variant flex --json "$results/op-1024-$device.json"
# Gradients, where training takes another backend.
bench --pixels 1024x1024 --window 16 --heads 4 --backward --variant dense --variant flex --variant tiled \
    --json "$results/op-backward-$device.json"
# What pooled keys cost beside dense attention to as many keys.
bench --pixels 4096x4096 --window 16 --down-factor 1 --down-factor 4 --variant dense-pooled --variant flex \
    --json "$results/op-pooled-$device.json"
# NATTEN's shape: a disc of the area of its 80 x 80 window, no text.
bench --grid 256x256 --text 0 --window 45 --variant dense --variant flex --dense-queries 65536 \
    --json "$results/op-natten-$device.json"
bench --pixels 8192x8192 --variant dense --variant raster-flex --variant flex --dense-queries 8192 --runs 10 \
    --json "$results/op-8192-$device.json"
# A whole denoising step, beside the bound.
bench --level model --pixels 1024x1024 --runs 5 --variant dense --variant flex --variant bound \
    --json "$results/model-1024-$device.json"
bench --level model --pixels 2048x2048 --pixels 4096x4096 --pixels 8192x8192 --blocks 1 --runs 5 \
    --variant dense --variant flex --variant bound --json "$results/model-$device.json" --plot "$results/model-$device.png"
# What training takes beside the drawing, to hold against the arithmetic in docs/distilling.md.
python benchmarks/distill_memory.py --heads 24 --layers 19 --single-layers 38 --pixels 1024 --text-tokens 512 \
    --window 16 --down-factor 4 --output "$results/distill-memory-$device.json" || failed=1
exit $failed
