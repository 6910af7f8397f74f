"""Measure an 8192 x 8192 px image on a CPU: its layout with block lists, and one small transformer block.

    python benchmarks/large_grid.py --output benchmarks/results/large_grid-cpu.json

Each part runs in its own process, and its memory is the peak of that process beyond the memory after the imports.
"""

import json
import multiprocessing
import platform
import resource
import time
from pathlib import Path
from typing import Annotated

import typer

GRID, TEXT = (512, 512), 512


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def layout_and_block_lists() -> None:
    import clear_attn as clear

    clear.methods.Clear(window=16).plan(clear.TokenLayout([GRID], TEXT)).block_indices  # noqa: B018


def forward_of_one_block(backend: str) -> None:
    import torch
    from diffusers import FluxTransformer2DModel

    import clear_attn as clear

    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=0,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 12, 16),
    )
    clear.linearize(transformer, 16, weights=None, backend=backend)
    tokens = GRID[0] * GRID[1]
    ids = torch.cat([torch.zeros(tokens, 1), torch.cartesian_prod(*map(torch.arange, GRID))], dim=1)
    with torch.no_grad():
        transformer(
            torch.randn(1, tokens, 16),
            torch.randn(1, TEXT, 32),
            torch.randn(1, 32),
            torch.ones(1),
            ids,
            torch.zeros(TEXT, 3),
        )


PARTS = {
    "layout and block lists": (layout_and_block_lists, ()),
    "forward of one block, flex": (forward_of_one_block, ("flex",)),
    "forward of one block, tiled": (forward_of_one_block, ("tiled",)),
}


def measure(name: str, results: multiprocessing.Queue) -> None:
    import torch
    from diffusers import FluxTransformer2DModel  # noqa: F401

    import clear_attn  # noqa: F401

    function, arguments = PARTS[name]
    before, started = peak_bytes(), time.perf_counter()
    function(*arguments)
    row = {"part": name, "seconds": round(time.perf_counter() - started, 2), "bytes": peak_bytes() - before}
    results.put({**row, "threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine()})


def main(output: Annotated[Path | None, typer.Option(help="Where the rows go as JSON.")] = None) -> None:
    context = multiprocessing.get_context("spawn")
    rows = []
    for name in PARTS:
        results = context.Queue()
        process = context.Process(target=measure, args=(name, results))
        process.start()
        rows.append(results.get())
        process.join()
        print(f"{name}: {rows[-1]['seconds']:.2f} s, {rows[-1]['bytes'] / 2**20:.0f} MiB", flush=True)
    if output:
        output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
