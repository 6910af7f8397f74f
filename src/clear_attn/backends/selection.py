"""The backends by name, and which one serves a call."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clear_attn.backends import flex, reference, tiled, triton
from clear_attn.core.region import AttentionRegion

logger = logging.getLogger(__name__)


class Backend(NamedTuple):
    """A way to compute the attention of image queries.

    Attributes:
        attend: see `clear_attn.backends`.
        prepare: builds what it needs of a plan, since compiled layers cannot.
        unsupported_reason: why it cannot serve a call of this device, dtype, head_dim and need of gradients, or None.
    """

    attend: Callable[
        [Tensor, Tensor, Tensor, AttentionRegion, Tensor | None, float, bool], tuple[Tensor, Tensor | None]
    ]
    prepare: Callable[[AttentionRegion], Any]
    unsupported_reason: Callable[[torch.device, torch.dtype, int, bool], str | None]


def _runs_everywhere(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> None:
    return None


BACKENDS: dict[str, Backend] = {
    "flex": Backend(flex.attend, lambda region: region.block_indices, flex.unsupported_reason),
    "triton": Backend(triton.attend, lambda region: region.key_lists, triton.unsupported_reason),
    "tiled": Backend(tiled.attend, lambda region: region.tiles, _runs_everywhere),
    "reference": Backend(reference.attend, lambda region: None, _runs_everywhere),
}


def validate_backend(name: object) -> None:
    """Raise ValueError for a name that is neither a backend nor "auto"."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {['auto', *BACKENDS]}")


def validate_call(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> None:
    """Raise RuntimeError if a backend cannot serve a call."""
    if reason := BACKENDS[name].unsupported_reason(device, dtype, head_dim, needs_grad):
        raise RuntimeError(f"backend={name!r} cannot run: {reason}; use backend='auto' or 'tiled'")


def validate_machine(name: str) -> None:
    """Raise RuntimeError if no device of this machine can run a backend; pipelines move between devices."""
    if name != "flex":
        return
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    reasons = {device: flex.unsupported_device(torch.device(device)) for device in devices}
    if all(reasons.values()):
        raise RuntimeError(f"backend='flex' cannot run on this machine: {reasons}; use backend='auto' or 'tiled'")


class Selection(NamedTuple):
    """A backend's name, and why it was selected."""

    backend: str
    reason: str


# By kind of device, and whether gradients are needed.
TABLE = {
    ("cpu", False): Selection(
        "tiled", "faster than flex, or level, at all sizes measured (benchmarks/results/auto-cpu-*.json)"
    ),
    ("cpu", True): Selection("tiled", "FlexAttention has no gradients on a CPU"),
    ("cuda", False): Selection("flex", "FlexAttention visits only the blocks of keys that the window reaches"),
    # https://github.com/pytorch/pytorch/issues/158212 and 153799
    ("cuda", True): Selection("tiled", "torch has open bugs in the gradients of FlexAttention on GPUs"),
}


def select_backend(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> Selection:
    """Return what `backend="auto"` takes: the table's choice, or tiled if that cannot run or is not in the table.

    Warns once if it could not take what the table has for a GPU.
    """
    selection = _select(device, dtype, head_dim, needs_grad)
    if not torch.compiler.is_compiling():  # a compiled graph cannot log
        logger.debug("attention on %s with backend %s: %s", device.type, *selection)
        if selection != TABLE.get((device.type, needs_grad)):
            _warn_once(f"attention on {device.type} runs with backend {selection.backend}: {selection.reason}")
    return selection


def _select(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> Selection:
    selection = TABLE.get((device.type, needs_grad))
    if selection is None:
        return Selection("tiled", f"nothing else was tried on devices of type {device.type!r}")
    if selection.backend != "flex":
        return selection
    if reason := flex.unsupported_reason(device, dtype, head_dim, needs_grad):
        return Selection("tiled", f"flex cannot run: {reason}")
    if reason := flex.untested_reason(device):
        return Selection("tiled", f"flex may fail: {reason}; backend='flex' tries it all the same")
    return selection


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
