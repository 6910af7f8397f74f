"""The backends of `clear_attention` against each other on a CPU, forward, in float32.

    python benchmarks/backends_cpu.py --output benchmarks/results/backends-cpu.json

All run in turn, after a first run that compiles; the figure is the median.
"""

import itertools
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

import clear_attn as clear

TEXT, HEADS, RUNS = 128, 4, 5
BACKENDS = ("tiled", "flex")


def seconds(side: int, window: int, head_dim: int) -> dict[str, float]:
    layout = clear.TokenLayout([(side, side)], TEXT, clear.ClearConfig(window))
    query, key, value = torch.randn(3, 1, HEADS, TEXT + side * side, head_dim)
    times: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for _ in range(1 + RUNS):
        for backend in BACKENDS:
            started = time.perf_counter()
            clear.clear_attention(query, key, value, layout, backend=backend)
            times[backend].append(time.perf_counter() - started)
    return {backend: round(statistics.median(each[1:]), 4) for backend, each in times.items()}


def main(output: Annotated[Path | None, typer.Option(help="Where the numbers go as JSON.")] = None) -> None:
    torch.manual_seed(0)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    rows = []
    for head_dim, window, side in itertools.product((64, 128), (8, 16, 32), (16, 32, 64, 128)):
        size = {"image_tokens": side * side, "text": TEXT, "heads": HEADS, "head_dim": head_dim, "window": window}
        rows.append({**size, "seconds": seconds(side, window, head_dim), **machine})
        print(rows[-1], flush=True)
    if output:
        output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
