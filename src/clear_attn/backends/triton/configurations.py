"""The block sizes, warps and stages of each kernel on each architecture, chosen by compiling ahead of time.

`clear-attn bench --level compile` compiles them, and tests hold the result to limits. Those of Hopper up to head_dim
128 were chosen by time on an H200 (benchmarks/NOTES.md); the others were not measured.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

KERNELS = ("forward", "query_gradient", "key_gradients", "shared_key_gradients")


class Configuration(NamedTuple):
    """The compile-time settings of a kernel.

    Attributes:
        rows: the rows of a program, 128 or 64.
        columns: the keys, or for the gradients of keys the queries, of one step of a loop: 64, 32 or 16.
        warps, stages: Triton's `num_warps` and `num_stages`.
        most_registers: Triton's `maxnreg`, the limit of registers per thread; None leaves it to the compiler.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    most_registers: int | None = None

    def __str__(self) -> str:
        limit = "" if self.most_registers is None else f", {self.most_registers} registers"
        return f"{self.rows}x{self.columns}, {self.warps} warps, {self.stages} stages{limit}"

    @property
    def key(self) -> str:
        """The numbers, joined by hyphens, as in the names of the benchmark's variants."""
        return "-".join(str(number) for number in self if number is not None)

    @property
    def options(self) -> dict[str, int]:
        """The options that Triton compiles a kernel with."""
        limit = {} if self.most_registers is None else {"maxnreg": self.most_registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


Table = dict[str, dict[int, Configuration]]

# By kernel, then by the largest head_dim that a configuration serves.
_AMPERE: Table = {
    "forward": {128: Configuration(128, 64, 8, 3), 256: Configuration(64, 32, 8, 2)},
    "query_gradient": {
        64: Configuration(128, 64, 8, 2),
        128: Configuration(128, 32, 8, 2),
        256: Configuration(64, 16, 4, 2),
    },
    "key_gradients": {
        64: Configuration(128, 32, 8, 2),
        128: Configuration(64, 32, 4, 2),
        256: Configuration(64, 16, 8, 1),
    },
    "shared_key_gradients": {
        64: Configuration(128, 32, 8, 2),
        128: Configuration(64, 32, 4, 2),
        256: Configuration(64, 16, 8, 1),
    },
}
# Three stages spill 64 bytes at head_dim 128.
_AMPERE_80: Table = {
    **_AMPERE,
    "forward": {
        64: Configuration(128, 64, 8, 3),
        128: Configuration(128, 64, 8, 2),
        256: Configuration(64, 32, 8, 2),
    },
}
# 128 registers let a multiprocessor run two programs of the forward kernel, and that outweighs what is spilled.
_HOPPER: Table = {
    "forward": {128: Configuration(128, 64, 8, 2, 128), 256: Configuration(128, 32, 8, 2)},
    "query_gradient": {128: Configuration(128, 32, 8, 2, 128), 256: Configuration(128, 32, 8, 2)},
    "key_gradients": {128: Configuration(64, 64, 4, 2), 256: Configuration(64, 16, 8, 1)},
    "shared_key_gradients": {128: Configuration(64, 64, 4, 2), 256: Configuration(64, 16, 8, 1)},
}
_BLACKWELL: Table = {
    "forward": {128: Configuration(128, 64, 8, 3), 256: Configuration(128, 32, 8, 2)},
    "query_gradient": {128: Configuration(128, 64, 8, 2), 256: Configuration(128, 32, 8, 2)},
    "key_gradients": {
        64: Configuration(128, 32, 8, 2),
        128: Configuration(64, 32, 8, 2),
        256: Configuration(64, 32, 8, 1),
    },
    "shared_key_gradients": {
        64: Configuration(64, 32, 8, 2),
        128: Configuration(128, 32, 8, 1),
        256: Configuration(64, 16, 8, 1),
    },
}
_CDNA: Table = {
    "forward": {128: Configuration(128, 64, 8, 2), 256: Configuration(64, 32, 4, 2)},
    "query_gradient": {128: Configuration(128, 32, 8, 2), 256: Configuration(64, 32, 4, 2)},
    "key_gradients": {128: Configuration(64, 32, 4, 2), 256: Configuration(64, 16, 8, 1)},
    "shared_key_gradients": {128: Configuration(64, 32, 4, 2), 256: Configuration(64, 16, 8, 1)},
}

CHOSEN: dict[str, Table] = {
    "sm_80": _AMPERE_80,
    "sm_86": _AMPERE,
    "sm_89": _AMPERE,
    "sm_90": _HOPPER,
    "sm_100": _BLACKWELL,
    "sm_120": _AMPERE,
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
    "gfx950": _CDNA,
}
# The architecture with the configurations that the interpreter runs.
INTERPRETED = "sm_90"

# Other configurations to measure against the chosen ones.
CANDIDATES: dict[str, tuple[Configuration, ...]] = {
    "forward": (Configuration(128, 64, 8, 3, 128), Configuration(128, 64, 8, 3), Configuration(64, 64, 4, 3)),
    "query_gradient": (Configuration(128, 64, 8, 2), Configuration(64, 64, 4, 2)),
    "key_gradients": (Configuration(128, 64, 8, 2), Configuration(64, 32, 4, 2)),
    "shared_key_gradients": (Configuration(128, 64, 8, 2), Configuration(64, 32, 4, 2)),
}


_forward: contextvars.ContextVar[Configuration | None] = contextvars.ContextVar("clear_attn_forward", default=None)


@contextlib.contextmanager
def forward_configuration(candidate: Configuration) -> Iterator[None]:
    """Run the forward kernel with another configuration, to measure it."""
    token = _forward.set(candidate)
    try:
        yield
    finally:
        _forward.reset(token)


def configuration(architecture: str, kernel: str, head_dim: int) -> Configuration:
    """Return the configuration of a kernel for a head_dim: the smallest entry that is not below it."""
    if kernel == "forward" and (candidate := _forward.get()):
        return candidate
    table = CHOSEN[architecture][kernel]
    return table[min(most for most in table if most >= head_dim)]
