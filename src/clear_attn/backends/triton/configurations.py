"""The block sizes, warps and stages of each kernel on each architecture: what was compiled ahead of time and chosen.

`clear-attn bench --level compile` compiles them, and tests hold the result to limits. Nothing here was measured on a
GPU.
"""

from __future__ import annotations

from typing import NamedTuple

KERNELS = ("forward", "query_gradient", "key_gradients", "shared_key_gradients")


class Configuration(NamedTuple):
    """How a kernel is compiled.

    Attributes:
        rows: of a program, 128 or 64.
        columns: keys, or queries for the gradients of keys, of one step of a loop: 64, 32 or 16.
        warps, stages: as Triton's `num_warps` and `num_stages`.
    """

    rows: int
    columns: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}, {self.warps} warps, {self.stages} stages"


_HOPPER = {
    ("forward", 128): Configuration(128, 64, 8, 3),
    ("forward", 256): Configuration(64, 32, 4, 2),
    ("query_gradient", 128): Configuration(128, 64, 8, 2),
    ("query_gradient", 256): Configuration(64, 32, 4, 2),
    ("key_gradients", 128): Configuration(128, 32, 8, 2),
    ("key_gradients", 256): Configuration(64, 16, 4, 2),
    ("shared_key_gradients", 128): Configuration(128, 32, 8, 2),
    ("shared_key_gradients", 256): Configuration(64, 16, 4, 2),
}

# By architecture, then by kernel and the largest head_dim that the configuration serves.
CHOSEN: dict[str, dict[tuple[str, int], Configuration]] = {
    "sm_80": _HOPPER,
    "sm_86": _HOPPER,
    "sm_89": _HOPPER,
    "sm_90": _HOPPER,
    "sm_100": _HOPPER,
    "sm_120": _HOPPER,
    "gfx942": _HOPPER,
}
# What the interpreter runs, on no architecture.
INTERPRETED = "sm_90"


def configuration(architecture: str, kernel: str, head_dim: int) -> Configuration:
    """Return the configuration of a kernel for a head_dim, by the smallest entry that is not below it."""
    table = CHOSEN[architecture]
    return table[kernel, min(most for name, most in table if name == kernel and most >= head_dim)]
