"""Detect forward-mode derivatives and `torch.func` transforms, which custom operators would drop without an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from clear_attn.utils._torch import is_transformed


def needs_grad(*tensors: Tensor) -> bool:
    """Return whether autograd records operations on these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def needs_transforms(*tensors: Tensor) -> bool:
    """Return whether a tensor has a forward-mode tangent, or is inside a transform of `torch.func`."""
    if torch.compiler.is_compiling():
        return False
    return any(is_transformed(x) or forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def validate_derivatives(backend: str, *tensors: Tensor) -> None:
    """Raise RuntimeError if a backend behind a custom operator gets a tensor of `needs_transforms`."""
    if needs_transforms(*tensors):
        raise RuntimeError(
            f"backend={backend!r} supports a backward pass, but neither forward-mode derivatives nor transforms of "
            "torch.func; use backend='reference', inside "
            "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
        )


def refuse_second_backward(backend: str) -> Callable[..., NoReturn]:
    """Return the backward function of a backend's backward operator, which raises RuntimeError."""

    def refuse(ctx: Any, *gradients: Any) -> NoReturn:
        raise RuntimeError(
            f"backend={backend!r} has no second derivatives; use backend='reference', inside "
            "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
        )

    return refuse
