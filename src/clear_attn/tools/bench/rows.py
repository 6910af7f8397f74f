"""What the benchmark says: one row for each variant of each case."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from typing import Any

import torch

from clear_attn.tools.bench.measure import Timing

TOKEN = 16  # pixels


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant of one case; times in seconds, memory in bytes, sizes in tokens.

    Attributes:
        level: `"op"`, one attention, or `"model"`, one denoising step.
        variant: `"dense"`, `"dense-pooled"`, `"raster-flex"`, `"bound"`, or the name of a backend.
        device: its name.
        backward: whether a backward pass is in it.
        kernel: which of torch's own kernels computes dense attention.
        compile_s: how much longer the first run took.
        peak_bytes: most memory held at once beyond what was held before: no weights, no inputs; None for a share of the
            queries.
        visible_flops: 4 x (visible pairs) x heads x head_dim forward; 3.5 times that with a backward pass.
        flops_per_s: visible_flops over median_s.
        matmul_flops_per_s: of a large matrix product in the same run, in the same dtype, on a CPU in float32.
        extrapolated: whether only a share of the queries or blocks was computed, and the time scaled.
        error: distance from the rule in float64, or from the reference backend, relative; None where not computed.
    """

    level: str
    variant: str
    device: str
    height: int
    width: int
    text: int
    heads: int
    head_dim: int
    window: int
    down_factor: int
    dtype: str
    batch: int
    backward: bool
    kernel: str | None
    runs: int
    median_s: float
    min_s: float
    max_s: float
    compile_s: float
    peak_bytes: int | None
    visible_flops: int
    flops_per_s: float
    matmul_flops_per_s: float
    extrapolated: bool
    error: float | None
    torch: str
    cuda: str | None
    threads: int
    blocks: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def times(timing: Timing) -> dict[str, Any]:
    """A row's fields that come from its timing."""
    return {
        "runs": len(timing.seconds),
        "median_s": timing.median_s,
        "min_s": min(timing.seconds),
        "max_s": max(timing.seconds),
        "compile_s": timing.compile_s,
        "error": timing.error,
    }


def machine(device: torch.device) -> dict[str, Any]:
    """A row's fields that say where it was measured."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"cpu, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
    }


HEADER = ("variant", "median ms", "min", "max", "x dense", "TFLOP/s", "of matmul", "peak MiB", "compile s", "error")


def title(row: Row) -> str:
    """What a table of rows is about."""
    kind = "one denoising step" if row.level == "model" else "attention"
    passes = ", forward and backward" if row.backward else ""
    return (
        f"{kind}{passes}: {row.height} x {row.width} tokens ({row.height * TOKEN} x {row.width * TOKEN} px), "
        f"text {row.text}, window {row.window}, down_factor {row.down_factor}, batch {row.batch}, "
        f"{row.heads} heads of {row.head_dim}, {row.dtype}"
    )


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The rows of one case as a table's cells."""
    dense = next((row.median_s for row in rows if row.variant == "dense"), None)
    return [
        (
            row.variant + (f" ({row.kernel})" if row.kernel else "") + (" *" if row.extrapolated else ""),
            *(f"{1000 * seconds:.4g}" for seconds in (row.median_s, row.min_s, row.max_s)),
            f"{dense / row.median_s:.2f}" if dense else "",
            f"{row.flops_per_s / 1e12:.3g}",
            f"{row.flops_per_s / row.matmul_flops_per_s:.0%}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}",
            f"{row.compile_s:.1f}",
            "" if row.error is None else f"{row.error:.0e}",
        )
        for row in rows
    ]
