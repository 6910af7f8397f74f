"""The ways to compute the attention of image queries, and which one is right for a call.

Each backend is one function:

    attend(query, key, value, layout, scale, return_lse) -> (output, lse or None)

query: `[batch, heads, image tokens, head_dim]` in tile order. key, value: `[batch, heads, key tokens, head_dim]`
in the layout's order of keys. output: as query. lse: float32 `[batch, heads, image tokens]`, the log-sum-exp of
the scaled scores of the keys that each query sees, so that results over parts of the keys merge exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clear_attn.backends import dense, flex, tiled
from clear_attn.layout import TokenLayout


class Backend(NamedTuple):
    """A way to compute.

    Attributes:
        attend: the function.
        prepare: makes what it needs of a layout, for compiled code, which cannot.
    """

    attend: Callable[[Tensor, Tensor, Tensor, TokenLayout, float, bool], tuple[Tensor, Tensor | None]]
    prepare: Callable[[TokenLayout], Any]


BACKENDS: dict[str, Backend] = {
    "flex": Backend(flex.attend, lambda layout: layout.block_lists),
    "tiled": Backend(tiled.attend, lambda layout: layout.tiles),
    "dense": Backend(dense.attend, lambda layout: None),
}


class Choice(NamedTuple):
    """A backend's name, and why it was chosen."""

    backend: str
    reason: str


def check_backend(name: object) -> None:
    """Raises ValueError where ``name`` is neither a backend nor "auto"."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {['auto', *BACKENDS]}")


def choose(device_type: str, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> Choice:
    """What `backend="auto"` takes, a pure function of a call's properties."""
    obstacle = flex.reason_against(device_type, dtype, head_dim, needs_grad)
    if obstacle:
        return Choice("tiled", f"flex cannot run: {obstacle}")
    if needs_grad:
        # https://github.com/pytorch/pytorch/issues/158212 and 153799
        return Choice("tiled", "torch has open bugs in the gradients of FlexAttention on GPUs")
    if device_type == "cpu":
        return Choice("tiled", "it beat flex at every size that was measured (benchmarks/results/backends-cpu.json)")
    return Choice("flex", "FlexAttention visits only the blocks of keys that the window reaches")
