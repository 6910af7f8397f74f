#!/usr/bin/env bash
# The speed that the project aims at, measured on one H100 or H200 in about seven minutes. Rows go to
# benchmarks/results/, or to the folder that is given, each as soon as it is measured. Correctness first, then whole
# steps and operations; each command takes ten minutes at most, and one that fails does not stop the others.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results}
mkdir -p "$results"
device=$(python3 -c 'import torch; print(torch.cuda.get_device_name().split()[1].lower())')

failed=0
limited() { timeout 600 "$@" || failed=1; }
bench() { limited python3 -m clear_attn bench --overwrite --runs 10 "$@"; }

# Correctness: the self-check of each backend, with and without gradients.
checks=()
for head_dim in 64 128 256; do
    timeout 600 python3 benchmarks/check_backends.py --head-dim "$head_dim" >"$results/check-$head_dim-$device.txt" &
    checks+=($!)
done
for check in "${checks[@]}"; do wait "$check" || failed=1; done
cat "$results"/check-*-"$device.txt"

# One attention of FLUX.1-dev beside the fastest dense kernel, FlexAttention in tile order and in raster order.
bench --pixels 1024x1024 --pixels 2048x2048 --pixels 4096x4096 --pixels 8192x8192 --window 8 --window 16 --window 32 \
    --dense-queries 16384 --variant dense --variant raster-flex --variant flex --variant triton \
    --json "$results/op-$device.json"
# A denoising step, beside the bound: the step if attention cost nothing.
bench --level model --pixels 2048x2048 --pixels 4096x4096 --pixels 8192x8192 --window 16 --blocks 1 --runs 3 \
    --variant dense --variant flex --variant triton --variant bound --json "$results/model-$device.json"
bench --level model --pixels 1024x1024 --window 8 --runs 5 --variant dense --variant triton --variant bound \
    --json "$results/model-1024-$device.json"
# Gradients.
bench --pixels 1024x1024 --window 16 --heads 4 --backward --variant dense --variant triton --variant tiled \
    --json "$results/op-backward-$device.json"
bench --pixels 2048x2048 --window 16 --backward --variant dense --variant triton \
    --json "$results/op-backward-2048-$device.json"
# What pooled keys cost beside dense attention to as many keys.
bench --pixels 4096x4096 --window 16 --down-factor 4 --variant dense --variant dense-pooled --variant flex \
    --variant triton --json "$results/op-pooled-$device.json"
# What training takes beside the drawing, to hold against the arithmetic in docs/distilling.md.
limited python3 benchmarks/distill_memory.py --heads 24 --layers 19 --single-layers 38 --pixels 1024 \
    --text-tokens 512 --window 16 --down-factor 4 --output "$results/distill-memory-$device.json"
# NATTEN's shape: a disc of the area of its 80 x 80 window, no text.
bench --grid 256x256 --text 0 --window 45 --variant dense --variant flex --variant triton --dense-queries 65536 \
    --json "$results/op-natten-$device.json"
# The configurations of the fused kernel that were not chosen.
bench --pixels 8192x8192 --window 16 --variant triton --variant triton-128-64-8-3 --variant triton-64-64-4-3 \
    --variant triton-128-64-8-3-128 --json "$results/op-candidates-$device.json"
exit $failed
