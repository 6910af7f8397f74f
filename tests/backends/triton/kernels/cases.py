"""Calls of the fused kernels, and the same attention by the dense rule of the tests, in float64.

Under `TRITON_INTERPRET=1` they run on the CPU, otherwise on a GPU.
"""

from typing import NamedTuple

import torch

from clear_attn import TokenLayout, clear_attention, methods
from clear_attn.backends.attention import pool
from clear_attn.backends.selection import BACKENDS
from clear_attn.backends.triton import interpreter
from tests.helpers import reference_attention

DEVICE = torch.device("cpu" if interpreter.is_requested() else "cuda")
# The most exact dtype. Kernels for float32 are only interpreted: a GPU has no room for their blocks.
EXACT = torch.float32 if interpreter.is_requested() else torch.float16
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    """What is computed. Float32 goes to the kernels themselves, since the backend refuses it."""

    grids: list
    text: int = 7
    window: int = 4
    text_first: bool = True
    down_factor: int = 1
    batch: int = 1
    heads: int = 1
    key_heads: int = 1
    head_dim: int = 16
    dtype: torch.dtype = EXACT
    bias: bool = False
    scale: float | None = None

    @property
    def layout(self):
        return TokenLayout(self.grids, self.text, text_first=self.text_first, device=DEVICE)

    @property
    def plan(self):
        return methods.Clear(self.window, self.down_factor).plan(self.layout)


def inputs(case):
    """Query, key, value and a direction, `[batch, heads, tokens, head_dim]`, text first and the image in raster order,
    as slices of one tensor like a fused projection's."""
    numbers = case.heads, case.key_heads, case.key_heads, case.heads
    fused = torch.randn(case.batch, case.layout.tokens, sum(numbers), case.head_dim, device=DEVICE).to(case.dtype)
    return [part.transpose(1, 2) for part in fused.split(numbers, dim=2)]


def in_layout(x, case):
    """From text first and raster order to the layout's order."""
    text, image = x[:, :, : case.text], x[:, :, case.text :].index_select(2, case.layout.permutation)
    return torch.cat([text, image] if case.text_first else [image, text], dim=2)


def from_layout(x, case):
    text, image = x[:, :, case.layout.text], x[:, :, case.layout.image]
    return torch.cat([text, image.index_select(2, case.layout.inverse_permutation)], dim=2)


def key_bias(case):
    """`[batch, keys]` for text first and raster order, with one key hidden if there is text."""
    bias = torch.randn(case.batch, case.layout.tokens, device=DEVICE)
    if case.text > 1:
        bias[:, 0] = -torch.inf
    return bias


def expected(case, query, key, value, bias):
    group = case.heads // case.key_heads
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    weight = torch.full((case.down_factor,) * 2, 1 / case.down_factor**2, dtype=torch.float64)
    rule = methods.Clear(case.window, case.down_factor)
    scores_bias = None if bias is None else bias.double()[:, None, None]
    return reference_attention.attention(
        query, key, value, case.grids, case.text, rule, weight, case.scale, scores_bias
    )


def ours(case, query, key, value, bias):
    plan = case.plan
    query, key, value = (in_layout(x, case) for x in (query, key, value))
    pooled = None
    if case.down_factor > 1:
        weight = torch.full((case.down_factor,) * 2, 1 / case.down_factor**2, device=DEVICE)
        pooled = [pool(x[:, :, plan.image], plan, weight) for x in (key, value)]
    if bias is not None:
        joint = in_layout(bias[:, None, :, None], case)[:, 0, :, 0]
        bias = torch.cat([joint, bias[:, -1:].expand(-1, plan.pooled_tokens)], dim=1)
    if case.dtype != torch.float32:
        output = clear_attention(
            query, key, value, plan, pooled=pooled, key_bias=bias, backend="triton", scale=case.scale, return_lse=True
        )
    else:
        keys, values = (
            (torch.cat([x, p], 2) for x, p in zip((key, value), pooled, strict=True)) if pooled else (key, value)
        )
        scale = case.head_dim**-0.5 if case.scale is None else case.scale
        output = BACKENDS["triton"].attend(query, keys, values, plan, bias, scale, True)
    output, lse = output
    return from_layout(output, case), from_layout(lse[..., None], case)[..., 0]


def both(case, gradients=True):
    """(ours, expected): output, log-sum-exp, and the gradients of query, key and value, of image rows alone."""
    *tensors, direction = inputs(case)
    bias = key_bias(case) if case.bias else None
    results = []
    for compute, device, dtype in ((ours, DEVICE, case.dtype), (expected, "cpu", torch.float64)):
        leaves = [x.detach().to(device, dtype).requires_grad_(gradients) for x in tensors]
        output, lse = (x[:, :, case.text :] for x in compute(case, *leaves, None if bias is None else bias.to(device)))
        result = [output, lse]
        if gradients:
            loss = (output.double() * direction[:, :, case.text :].to(device)).sum() + lse.double().square().sum()
            result += torch.autograd.grad(loss, leaves)
        results.append([x.detach().cpu() for x in result])
    return results


def distance(a, b):
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def distances(case, gradients=True):
    return {
        name: distance(a, b)
        for name, a, b in zip(("output", "lse", "query", "key", "value"), *both(case, gradients), strict=False)
    }
