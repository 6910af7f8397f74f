"""The ways to compute the attention of image queries, and which one is right for a call.

Each backend is one function:

    attend(query, key, value, layout, scale, return_lse) -> (output, lse or None)

query: `[batch, heads, image tokens, head_dim]` in tile order. key, value: `[batch, heads, key tokens, head_dim]`
in the layout's order of keys. output: as query. lse: float32 `[batch, heads, image tokens]`, the log-sum-exp of
the scaled scores of the keys that each query sees, so that results over parts of the keys merge exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from clear_attn.backends import dense, flex, tiled
from clear_attn.layout import TokenLayout

Attend = Callable[[Tensor, Tensor, Tensor, TokenLayout, float, bool], tuple[Tensor, Tensor | None]]

BACKENDS: dict[str, Attend] = {"flex": flex.attend, "tiled": tiled.attend, "dense": dense.attend}


# Measured on two cores of an EPYC (AVX2) with torch 2.13, float32.
CPU_FLEX_FROM = 4096


class Choice(NamedTuple):
    """A backend's name, and why it was chosen."""

    backend: str
    reason: str


def check_backend(name: object) -> None:
    """Raises ValueError where ``name`` is neither a backend nor "auto"."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {['auto', *BACKENDS]}")


def choose(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool, image_tokens: int) -> Choice:
    """What `backend="auto"` takes, a pure function of a call's properties."""
    obstacle = flex.reason_against(device.type, needs_grad)
    if obstacle:
        return Choice("tiled", f"flex cannot run: {obstacle}")
    if device.type == "cpu" and image_tokens < CPU_FLEX_FROM:
        return Choice("tiled", f"below {CPU_FLEX_FROM} image tokens it beats flex on a CPU")
    return Choice("flex", "FlexAttention visits only the blocks of keys that the window reaches")
