"""Compare a backend with the rule on a small case, before `auto` selects it.

An untested driver, compiler or GPU may give wrong numbers without an error.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clear_attn.backends import reference
from clear_attn.core.layout import TokenLayout
from clear_attn.core.plan import WindowPlan
from clear_attn.utils.dtypes import dtype_name

VARIABLE = "CLEAR_ATTN_SELF_CHECK"
# Tiles do not divide this grid, and image and text have both whole blocks of keys and single keys.
GRID, TEXT_TOKENS, WINDOW, HEADS = (27, 35), 70, 20, 2
# Limits of the relative distance from the rule. Half precision rounds to 4e-3 and 5e-4; errors are much larger.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2}
OTHER_TOLERANCE = 1e-2

Attend = Callable[..., tuple[Tensor, Any]]


def failure(
    name: str, attend: Attend, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool
) -> str | None:
    """Return the failure of a backend's self-check and the remedy, or None. Each GPU is checked once per process.

    CPUs, GPUs of other machines, and calls that are being compiled or captured are not checked.
    `CLEAR_ATTN_SELF_CHECK=0` turns the check off.
    """
    if device.type == "cpu" or os.environ.get(VARIABLE) == "0" or torch.compiler.is_compiling():
        return None
    if device.type == "cuda" and (not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing()):
        return None
    return checked(name, attend, device, dtype, head_dim, needs_grad)


@functools.cache
def checked(
    name: str, attend: Attend, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool
) -> str | None:
    """Run the self-check and return its failure, or None."""
    where = f"on {_name_of(device)} in {dtype_name(dtype)} at head_dim {head_dim}"
    remedy = f"report this with the output of python -m torch.utils.collect_env; {VARIABLE}=0 turns the check off"
    try:
        with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
            found = distance(attend, device, dtype, head_dim, needs_grad)
    except Exception as error:
        return f"{name} failed its self-check {where} ({type(error).__name__}: {error}); {remedy}"
    if found < TOLERANCE.get(dtype, OTHER_TOLERANCE):  # false for NaN
        return None
    return f"{name} failed its self-check {where}: its result is {found:.1e} off the rule; {remedy}"


def distance(attend: Attend, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> float:
    """Return the largest relative distance of output and gradients from the rule in float32 on the CPU."""
    rng = torch.Generator("cpu").manual_seed(0)
    tokens = GRID[0] * GRID[1] + TEXT_TOKENS
    *qkv, direction = (torch.randn(1, HEADS, tokens, head_dim, generator=rng, device="cpu") for _ in range(4))
    qkv = [x.to(dtype) for x in qkv]
    ours = _compute(attend, [x.to(device) for x in qkv], direction.to(device), needs_grad)
    rule = _compute(reference.attend, [x.float() for x in qkv], direction, needs_grad)
    distances = [((a.cpu().float() - b).norm() / b.norm()).item() for a, b in zip(ours, rule, strict=True)]
    return max(distances, key=lambda each: float("inf") if each != each else each)


def _compute(attend: Attend, qkv: list[Tensor], direction: Tensor, needs_grad: bool) -> list[Tensor]:
    plan = WindowPlan(TokenLayout([GRID], TEXT_TOKENS, device=direction.device), WINDOW)
    leaves = [x.detach().requires_grad_(needs_grad) for x in qkv]
    with torch.set_grad_enabled(needs_grad):
        output, _ = attend(*leaves, plan, None, leaves[0].shape[-1] ** -0.5, False)
        image = output[:, :, plan.image]
        gradients: tuple[Tensor, ...] = ()
        if needs_grad:
            gradients = torch.autograd.grad((image.float() * direction[:, :, plan.image]).sum(), leaves)
    return [image.detach(), *gradients]


def _name_of(device: torch.device) -> str:
    available = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if available else str(device)
