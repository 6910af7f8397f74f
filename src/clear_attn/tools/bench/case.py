"""The cases of the benchmark, and its results: a row for each variant of a case."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from clear_attn.core.layout import TokenLayout
from clear_attn.methods import Clear
from clear_attn.profiling.cost_report import Cost
from clear_attn.tools.bench import TOKEN
from clear_attn.tools.bench.measure import Subject, Timing
from clear_attn.utils.dtypes import dtype_name
from clear_attn.utils.tables import format_table

CASE_FIELDS = ("level", "height", "width", "text", "heads", "head_dim", "window", "down_factor", "batch", "backward")


@dataclass(frozen=True)
class Case:
    """One case of the benchmark; sizes are in tokens.

    Attributes:
        level: the name of a level, as in `runner.LEVELS`.
        blocks: how many of FLUX.1's 19 double blocks are computed, with twice as many single ones.
        dense_queries: the most queries that dense attention computes.
    """

    height: int
    width: int
    window: int
    down_factor: int
    dtype: torch.dtype
    device: torch.device
    level: str = "op"
    text: int = 512
    heads: int = 24
    head_dim: int = 128
    batch: int = 1
    backward: bool = False
    blocks: int = 19
    dense_queries: int = 32768

    @property
    def grid(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def tokens(self) -> int:
        return self.text + self.height * self.width

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def method(self) -> Clear:
        return Clear(self.window, self.down_factor)

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout([self.grid], self.text, device=self.device)

    @property
    def cost(self) -> Cost:
        """The cost of one attention layer."""
        return Cost.of_layer(self.grid, self.text, self.heads, self.head_dim, self.method, self.batch)

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)

    @property
    def sizes(self) -> str:
        """The sizes in words, for titles."""
        return (
            f"{self.height} x {self.width} tokens ({self.height * TOKEN} x {self.width * TOKEN} px), "
            f"window {self.window}, down_factor {self.down_factor}"
        )


class Level(Protocol):
    """A module with these names, which times one attention or one step; `runner.LEVELS` lists them.

    Attributes:
        TITLE: the title of tables and charts.
        VARIANTS: the names of the ways to compute a case.
        LEGEND: what variants are that are neither dense attention nor a backend, by name.
        MAX_ERRORS: the largest error of a correct result by dtype, if known.
    """

    TITLE: str
    VARIANTS: tuple[str, ...]
    LEGEND: dict[str, str]
    MAX_ERRORS: dict[str, float]

    def unsupported_reason(self, name: str, case: Case) -> str | None:
        """Return why a variant cannot compute a case, or None."""

    def subjects(self, case: Case, names: Sequence[str]) -> Iterator[Subject]:
        """Return variants of a case, ready to be timed."""


class Row(NamedTuple):
    """One variant of one case."""

    case: Case
    subject: Subject
    timing: Timing
    matmul_flops_per_s: float

    @property
    def flops_per_s(self) -> float:
        return self.subject.flops / self.timing.median_s

    @property
    def device_name(self) -> str:
        if self.case.device.type == "cuda":
            return torch.cuda.get_device_name(self.case.device)
        return f"cpu, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"

    def to_dict(self) -> dict[str, Any]:
        """Return the row as in a result file: times in seconds, memory in bytes, sizes in tokens.

        `visible_flops` is 4 x (visible pairs) x heads x head_dim forward, 3.5 times that with a backward pass.
        `peak_bytes` is memory beyond weights and inputs; None if only a share of the queries was computed.
        `matmul_flops_per_s` is the rate of a large matrix product in the same run and dtype, on a CPU in float32.
        `error` is relative to the rule in float64, or to the reference backend; None if it was not computed.
        """
        case, subject, timing = self.case, self.subject, self.timing
        return {
            **{name: getattr(case, name) for name in CASE_FIELDS},
            "variant": subject.name,
            "device": self.device_name,
            "dtype": case.dtype_name,
            "kernel": subject.kernel,
            "runs": len(timing.seconds),
            "median_s": timing.median_s,
            "min_s": min(timing.seconds),
            "max_s": max(timing.seconds),
            "compile_s": timing.compile_s,
            "peak_bytes": timing.peak_bytes,
            "visible_flops": subject.flops,
            "flops_per_s": self.flops_per_s,
            "matmul_flops_per_s": self.matmul_flops_per_s,
            "extrapolated": subject.extrapolated,
            "error": timing.error,
            "torch": torch.__version__,
            "cuda": torch.version.cuda if case.device.type == "cuda" else None,
            "threads": torch.get_num_threads(),
            "blocks": None if case.level == "op" else 3 * case.blocks,
        }


HEADER = ("variant", "median ms", "min", "max", "x dense", "TFLOP/s", "of matmul", "peak MiB", "compile s", "error")


def format_rows(title: str, rows: Sequence[Row], legend: Mapping[str, str]) -> str:
    """Return the rows of one case as a table, with what variants are, the machine and the versions."""
    case, first = rows[0].case, rows[0].to_dict()
    dense = next((row.timing.median_s for row in rows if row.subject.name == "dense"), None)
    heading = (
        f"{title}{', forward and backward' if case.backward else ''}: {case.sizes}, text {case.text}, "
        f"batch {case.batch}, {case.heads} heads of {case.head_dim}, {case.dtype_name}"
    )
    share = f"{first['blocks']} of 57 blocks" if first["blocks"] else "a share of the queries"
    star = f"* scaled from {share}.\n" if any(row.subject.extrapolated for row in rows) else ""
    names = [row.subject.name for row in rows]
    meanings = "".join(f"{name}: {meaning}.\n" for name, meaning in legend.items() if name in names)
    machine = (
        f"{first['device']}, {first['threads']} threads, torch {first['torch']}; a large matrix product runs at "
        f"{first['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s. Medians of {first['runs']} runs in turn.\n"
    )
    return f"{heading}\n{format_table(HEADER, [_cells(row, dense) for row in rows])}\n{star}{meanings}{machine}"


def _cells(row: Row, dense: float | None) -> tuple[str, ...]:
    subject, timing = row.subject, row.timing
    kernel, star = f" ({subject.kernel})" if subject.kernel else "", " *" if subject.extrapolated else ""
    return (
        f"{subject.name}{kernel}{star}",
        *(f"{1000 * seconds:.4g}" for seconds in (timing.median_s, min(timing.seconds), max(timing.seconds))),
        f"{dense / timing.median_s:.2f}" if dense else "",
        f"{row.flops_per_s / 1e12:.3g}",
        f"{row.flops_per_s / row.matmul_flops_per_s:.0%}",
        "" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**20:.1f}",
        f"{timing.compile_s:.1f}",
        "" if timing.error is None else f"{timing.error:.0e}",
    )
