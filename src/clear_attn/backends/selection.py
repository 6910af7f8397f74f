"""The backends by name, and the selection of one for a call."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clear_attn.backends import flex, reference, self_check, tiled, triton
from clear_attn.backends.triton.configurations import CHOSEN
from clear_attn.core.region import AttentionRegion

logger = logging.getLogger(__name__)


class Backend(NamedTuple):
    """A backend, as four functions.

    Attributes:
        attend: computes the attention, see `clear_attn.backends`.
        prepare: builds the backend's index tensors of a plan, because compiled layers cannot.
        unsupported_reason: returns why the backend cannot run a call with this device, dtype, head_dim and need of
            gradients, or None.
        unsupported_device: returns why the backend cannot run on a device of this machine, or None.
    """

    attend: Callable[
        [Tensor, Tensor, Tensor, AttentionRegion, Tensor | None, float, bool], tuple[Tensor, Tensor | None]
    ]
    prepare: Callable[[AttentionRegion], Any]
    unsupported_reason: Callable[[torch.device, torch.dtype, int, bool], str | None]
    unsupported_device: Callable[[torch.device], str | None]


def _runs_everywhere(*_: Any) -> None:
    return None


BACKENDS: dict[str, Backend] = {
    "triton": Backend(
        triton.attend,
        lambda region: region.key_lists,
        triton.unsupported_reason,
        lambda device: triton.unsupported_device(device),
    ),
    "flex": Backend(
        flex.attend,
        flex.prepare,
        flex.unsupported_reason,
        lambda device: flex.unsupported_device(device),
    ),
    "tiled": Backend(tiled.attend, lambda region: region.tiles, _runs_everywhere, _runs_everywhere),
    "reference": Backend(reference.attend, lambda region: None, _runs_everywhere, _runs_everywhere),
}


def validate_backend(name: object) -> None:
    """Raise ValueError for a name that is neither a backend nor "auto"."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(['auto', *BACKENDS])}")


def validate_call(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> None:
    """Raise RuntimeError if a backend cannot run a call."""
    if reason := BACKENDS[name].unsupported_reason(device, dtype, head_dim, needs_grad):
        raise RuntimeError(f"backend={name!r} cannot run: {reason}; use backend='auto' or 'tiled'")


def validate_machine(name: str) -> None:
    """Raise RuntimeError if no device of this machine can run a backend, since pipelines move between devices."""
    if name == "auto":
        return
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    reasons = {device: BACKENDS[name].unsupported_device(torch.device(device)) for device in devices}
    if all(reasons.values()):
        listed = "; ".join(f"on {device}, {reason}" for device, reason in reasons.items())
        raise RuntimeError(f"backend={name!r} cannot run on this machine: {listed}; use backend='auto' or 'tiled'")


class Selection(NamedTuple):
    """A backend's name, and the reason for its selection."""

    backend: str
    reason: str


class Candidates(NamedTuple):
    """The candidates of `backend="auto"` on a kind of device, best first. The last one runs everywhere.

    Attributes:
        half: for bfloat16 and float16 without gradients.
        half_with_gradients: for bfloat16 and float16 with gradients.
        other: for other dtypes without gradients.
        other_with_gradients: for other dtypes with gradients.
    """

    half: tuple[Selection, ...]
    half_with_gradients: tuple[Selection, ...]
    other: tuple[Selection, ...]
    other_with_gradients: tuple[Selection, ...]

    def of(self, dtype: torch.dtype, needs_grad: bool) -> tuple[Selection, ...]:
        """Return the candidates for a call."""
        half = dtype in (torch.bfloat16, torch.float16)
        return self[2 * (not half) + needs_grad]


_TILED_WITHOUT_FLEX_GRADIENTS = Selection("tiled", "torch has open bugs in the gradients of FlexAttention on GPUs")
_FLEX = Selection("flex", "FlexAttention visits only the blocks of keys that the window reaches")
_TILED = Selection("tiled", "it runs everywhere")
_CPU = (
    (Selection("tiled", "faster than flex, or level, at all sizes measured (benchmarks/results/auto-cpu-*.json)"),),
    (Selection("tiled", "FlexAttention has no gradients on a CPU"),),
)
# https://github.com/pytorch/pytorch/issues/158212 and 153799
_OTHER_CUDA = ((_FLEX, _TILED), (_TILED_WITHOUT_FLEX_GRADIENTS,))


# What was measured on a GPU, by architecture.
_MEASURED = {
    "sm_90": "1.9 to 2.4 times faster than flex at all sizes measured on an H200 (benchmarks/results/op-h200.json)"
}


def _compiled_for(architecture: str) -> Candidates:
    compiled = f"compiled for {architecture} within limits, right in the interpreter; not measured"
    fused = Selection("triton", _MEASURED.get(architecture, compiled))
    return Candidates((fused, _FLEX, _TILED), (fused, _TILED_WITHOUT_FLEX_GRADIENTS), *_OTHER_CUDA)


# By kind of device: CPUs, the architectures that the fused kernels were compiled for, and other GPUs.
TABLE: dict[str, Candidates] = {
    "cpu": Candidates(*_CPU, *_CPU),
    **{architecture: _compiled_for(architecture) for architecture in CHOSEN},
    "cuda": Candidates(*_OTHER_CUDA, *_OTHER_CUDA),
}


def choose_backend(
    kind: str, dtype: torch.dtype, needs_grad: bool, refusal: Callable[[str], str | None]
) -> tuple[Selection, Mapping[str, str]]:
    """Return the first candidate of the table that is not refused, and the reasons against those before it.

    Args:
        kind: the kind of device, a key of `TABLE` or another.
        dtype, needs_grad: the dtype of the call, and whether it needs gradients.
        refusal: a function that returns the reason against a backend, or None.
    """
    if kind not in TABLE:
        return Selection("tiled", f"no other backend is tested on devices of type {kind!r}"), {kind: "unknown"}
    *candidates, last = TABLE[kind].of(dtype, needs_grad)
    refused: dict[str, str] = {}
    for candidate in candidates:
        if (reason := refusal(candidate.backend)) is None:
            break
        refused[candidate.backend] = reason
    else:
        candidate = last
    return candidate, refused


def kind_of_device(device: torch.device) -> str:
    """Return the key of `TABLE` for a device of this machine."""
    if device.type != "cuda":
        return device.type
    architecture = triton.architecture(device)
    return architecture if architecture in TABLE else "cuda"


def select_backend(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> Selection:
    """Return the selection of `backend="auto"`: the first candidate that can run and passes its self-check.

    Log the selection once on a GPU, as a warning if it is not the table's first candidate.
    """

    def refusal(name: str) -> str | None:
        if reason := BACKENDS[name].unsupported_reason(device, dtype, head_dim, needs_grad):
            return f"{name} cannot run: {reason}"
        if name == "flex" and (reason := flex.untested_reason(device)):
            return f"flex may fail: {reason}; backend='flex' runs it anyway"
        return self_check.failure(name, BACKENDS[name].attend, device, dtype, head_dim, needs_grad)

    precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype
    kind = kind_of_device(device)
    selection, refused = choose_backend(kind, precision, needs_grad, refusal)
    if kind in TABLE and refused:
        selection = selection._replace(reason="; ".join([*refused.values(), selection.reason]))
    if not torch.compiler.is_compiling():  # a compiled graph cannot log
        level = logging.WARNING if refused else logging.INFO if device.type == "cuda" else logging.DEBUG
        _warn_once(level, f"attention on {kind} runs with backend {selection.backend}: {selection.reason}")
    return selection


@functools.cache
def _warn_once(level: int, message: str) -> None:
    logger.log(level, message)
