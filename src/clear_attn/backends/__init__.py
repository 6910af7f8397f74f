"""The ways to compute the attention of image queries, and which one is right for a call.

Each backend is one function:

    attend(query, key, value, layout, scale, return_lse) -> (output, lse or None)

query: `[batch, heads, tokens, head_dim]`, of all tokens, those of the image in tile order. key, value: `[batch, heads,
key tokens, head_dim]` in the layout's order of keys. output: as query; only the image's rows are set, the text's are
for the caller to write, so that there is one tensor for both. lse: `[batch, heads, tokens]`, likewise, float32 at
least, the log-sum-exp of the scaled scores of the keys that each query sees: with it, results over parts of the keys
merge exactly.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clear_attn.backends import flex, tiled
from clear_attn.backends import reference as dense
from clear_attn.core.layout import Neighbourhood

logger = logging.getLogger(__name__)


class Backend(NamedTuple):
    """A way to compute.

    Attributes:
        attend: the function.
        prepare: makes what it needs of a layout, for compiled code, which cannot.
    """

    attend: Callable[[Tensor, Tensor, Tensor, Neighbourhood, float, bool], tuple[Tensor, Tensor | None]]
    prepare: Callable[[Neighbourhood], Any]


BACKENDS: dict[str, Backend] = {
    "flex": Backend(flex.attend, lambda layout: layout.block_lists),
    "tiled": Backend(tiled.attend, lambda layout: layout.tiles),
    "dense": Backend(dense.attend, lambda layout: None),
}


def check_backend(name: object) -> None:
    """Raises ValueError where ``name`` is neither a backend nor "auto"."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {['auto', *BACKENDS]}")


def check_can_run(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> None:
    """Raises RuntimeError where a backend cannot serve a call."""
    if name == "flex" and (obstacle := flex.reason_against(device, dtype, head_dim, needs_grad)):
        raise RuntimeError(f"backend='flex' cannot run: {obstacle}; use backend='auto' or 'tiled'")


class Choice(NamedTuple):
    """A backend's name, and why it was chosen."""

    backend: str
    reason: str


# By kind of device, and whether gradients are needed.
TABLE = {
    ("cpu", False): Choice(
        "tiled", "faster than flex, or level, at all sizes measured (benchmarks/results/auto-cpu-*.json)"
    ),
    ("cpu", True): Choice("tiled", "FlexAttention has no gradients on a CPU"),
    ("cuda", False): Choice("flex", "FlexAttention visits only the blocks of keys that the window reaches"),
    # https://github.com/pytorch/pytorch/issues/158212 and 153799
    ("cuda", True): Choice("tiled", "torch has open bugs in the gradients of FlexAttention on GPUs"),
}


def choose(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> Choice:
    """What `backend="auto"` takes: the table's choice, or tiled where that cannot run or the table knows nothing."""
    choice = TABLE.get((device.type, needs_grad))
    if choice is None:
        return Choice("tiled", f"nothing else was tried on devices of type {device.type!r}")
    if choice.backend != "flex":
        return choice
    if obstacle := flex.reason_against(device, dtype, head_dim, needs_grad):
        return Choice("tiled", f"flex cannot run: {obstacle}")
    if doubt := flex.reason_for_doubt(device):
        return Choice("tiled", f"flex may fail: {doubt}; backend='flex' tries it all the same")
    return choice


def choose_aloud(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> Choice:
    """As `choose`, and warns once where it could not take what the table has for a GPU."""
    choice = choose(device, dtype, head_dim, needs_grad)
    logger.debug("attention on %s with backend %s: %s", device.type, *choice)
    if choice != TABLE.get((device.type, needs_grad)):
        _warn_once(f"attention on {device.type} runs with backend {choice.backend}: {choice.reason}")
    return choice


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
