#!/usr/bin/env bash
# The speed that the project aims at, measured on one H100 or H200. Rows go to benchmarks/results/, or to the folder
# that is given, each as soon as it is measured. Correctness first, then operations, then whole steps; each command
# takes ten minutes at most, and one that fails does not stop the others.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results}
device=$(python -c 'import torch; print(torch.cuda.get_device_name().split()[1].lower())')

failed=0
limited() { timeout 600 "$@" || failed=1; }
bench() { limited clear-attn bench --overwrite "$@"; }

# Correctness: the self-check of each backend, with and without gradients.
for head_dim in 64 128 256; do
    limited python benchmarks/check_backends.py --head-dim "$head_dim"
done

# One attention of FLUX.1-dev beside the fastest dense kernel, FlexAttention in tile order and in raster order.
for pixels in 1024 2048 4096; do
    for window in 8 16 32; do
        bench --pixels "${pixels}x$pixels" --window "$window" --dense-queries 16384 --variant dense \
            --variant raster-flex --variant flex --variant triton --json "$results/op-$pixels-$window-$device.json"
    done
done
for window in 8 16 32; do
    bench --pixels 8192x8192 --window "$window" --dense-queries 8192 --runs 10 --variant dense --variant raster-flex \
        --variant flex --variant triton --json "$results/op-8192-$window-$device.json"
done
# The configurations of the fused kernel that were compiled and not chosen.
bench --pixels 8192x8192 --runs 10 --variant triton --variant triton-128-64-8-2 --variant triton-64-64-4-3 \
    --variant triton-128-32-8-3 --json "$results/op-candidates-$device.json"
# NATTEN's shape: a disc of the area of its 80 x 80 window, no text.
bench --grid 256x256 --text 0 --window 45 --variant dense --variant flex --variant triton --dense-queries 65536 \
    --json "$results/op-natten-$device.json"
# What pooled keys cost beside dense attention to as many keys.
bench --pixels 4096x4096 --window 16 --down-factor 1 --down-factor 4 --variant dense-pooled --variant flex \
    --variant triton --json "$results/op-pooled-$device.json"
# Gradients.
bench --pixels 1024x1024 --window 16 --heads 4 --backward --variant dense --variant flex --variant triton \
    --variant tiled --json "$results/op-backward-$device.json"
bench --pixels 2048x2048 --window 16 --backward --variant dense --variant triton \
    --json "$results/op-backward-2048-$device.json"

# A whole denoising step, beside the bound.
bench --level model --pixels 1024x1024 --runs 5 --variant dense --variant flex --variant triton --variant bound \
    --json "$results/model-1024-$device.json"
for pixels in 2048 4096 8192; do
    bench --level model --pixels "${pixels}x$pixels" --blocks 1 --runs 5 --variant dense --variant flex \
        --variant triton --variant bound --json "$results/model-$pixels-$device.json" \
        --plot "$results/model-$pixels-$device.png"
done
# What training takes beside the drawing, to hold against the arithmetic in docs/distilling.md.
limited python benchmarks/distill_memory.py --heads 24 --layers 19 --single-layers 38 --pixels 1024 \
    --text-tokens 512 --window 16 --down-factor 4 --output "$results/distill-memory-$device.json"
exit $failed
