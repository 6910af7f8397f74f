"""Samples of parameters, which show whether their values were changed later."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Of each parameter, at least this many values if it has them, and less than twice as many.
VALUES = 64
# A round trip through these dtypes rounds values. It does not count as a change.
ROUNDED = (torch.bfloat16, torch.float16)


def sample(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a few values of each parameter, on the CPU; quantized and sharded parameters are left out."""
    plain = {name: value.detach() for name, value in parameters.items() if _is_plain(value)}
    return {name: _sample(value).to("cpu", copy=True) for name, value in plain.items()}


def changed(parameters: Mapping[str, Tensor], samples: Mapping[str, Tensor]) -> list[str]:
    """Return the names of parameters that have other values than when they were sampled."""
    present = sample({name: value for name, value in parameters.items() if name in samples})
    return [name for name, value in present.items() if not _same(value, samples[name])]


def changed_beyond_rounding(parameters: Mapping[str, Tensor], samples: Mapping[str, Tensor]) -> list[str]:
    """Return the names as `changed` does, without those only rounded, as by fusing and unfusing a LoRA."""
    names = changed(parameters, samples)
    present = sample({name: parameters[name] for name in names})
    return [name for name in names if _share_that_differs(present[name], samples[name]) > 1 / 8]


def _share_that_differs(present: Tensor, before: Tensor) -> float:
    # Fusing a large LoRA update rounds small weights by more than their own eps, but not an eighth of all.
    eps = max(torch.finfo(x.dtype).eps for x in (present, before))
    before, present = before.double(), present.double()
    return ((present - before).abs() > 8 * eps * before.abs()).double().mean().item()


def _is_plain(value: Tensor) -> bool:
    return type(value.data) is Tensor and value.is_floating_point() and not value.is_meta


def _sample(value: Tensor) -> Tensor:
    flat = value.reshape(-1)
    return flat[:: max(1, len(flat) // VALUES)]


def _same(present: Tensor, before: Tensor) -> bool:
    expected = (before.to(dtype).to(present.dtype) for dtype in (before.dtype, *ROUNDED))
    return any(torch.equal(values.double(), present.double()) for values in expected)
