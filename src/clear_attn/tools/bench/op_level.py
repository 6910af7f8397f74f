"""The level `op`: one attention operation, dense, in raster order, and by each backend."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clear_attn.backends import selection
from clear_attn.backends.attention import clear_attention, pool
from clear_attn.backends.triton import configurations
from clear_attn.core.window_mask import BLOCK, Coordinates, window_mask
from clear_attn.tools.bench.case import Case
from clear_attn.tools.bench.measure import Mark, Subject, measure
from clear_attn.tools.bench.raster import raster_attention

TITLE = "one attention"
BACKENDS = tuple(name for name in selection.BACKENDS if name != "reference")  # which is not meant to be fast
# Other configurations of the fused kernel, forward, by their rows, columns, warps, stages and registers.
CANDIDATES = {f"triton-{each.key}": each for each in configurations.CANDIDATES["forward"]}
VARIANTS = ("dense", "dense-pooled", "raster-flex", *BACKENDS, *CANDIDATES)
LEGEND = {
    "dense-pooled": "dense attention of the image to the pooled keys alone",
    "raster-flex": "FlexAttention with the image tokens in raster order",
}
MAX_ERRORS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
KERNELS = {
    "cpu": (SDPBackend.FLASH_ATTENTION,),
    "cuda": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION),
}
# A backward pass has five matrix products, a forward pass two.
FORWARD_AND_BACKWARD = 3.5
# How many rows are compared with the rule; for gradients all of them, with up to MOST_SCORES scores.
SAMPLED_ROWS, MOST_SCORES = 64, 2**27

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Variant(NamedTuple):
    """One way to compute a case.

    Attributes:
        name: the name in a row.
        attend: a function of query, key and value that returns the output of the first or of all queries.
        mask: which keys these queries attend to, `[queries, keys and pooled keys]`.
        pairs: the number of pairs of all queries and the keys that they attend to.
        permutation: int64, the raster index of each image token.
        share: the share of queries that is computed.
        first_row: the token of the first query.
        kernel: which of torch's kernels computes it, if torch has several.
    """

    name: str
    attend: Attend
    mask: Callable[[Tensor], Tensor]
    pairs: int
    permutation: Tensor
    share: float = 1.0
    first_row: int = 0
    kernel: SDPBackend | None = None


def unsupported_reason(name: str, case: Case) -> str | None:
    """Return why a variant cannot compute a case, or None."""
    if name == "dense-pooled" and (case.down_factor == 1 or case.backward):
        return "it is for pooled keys alone, forward"
    if name == "raster-flex" and case.tokens < BLOCK:
        return f"it takes at least {BLOCK} tokens"
    if name in CANDIDATES and case.backward:
        return "it is for forward passes"
    backend = {"raster-flex": "flex", **dict.fromkeys(CANDIDATES, "triton")}.get(name, name)
    if backend not in selection.BACKENDS:
        return None
    return selection.BACKENDS[backend].unsupported_reason(case.device, case.dtype, case.head_dim, case.backward)


def subjects(case: Case, names: Sequence[str]) -> Iterator[Subject]:
    """Return variants of a case, on the same inputs."""
    qkv = random_inputs(case)
    return (_subject(_variant(name, case, qkv), case, qkv) for name in names)


def random_inputs(case: Case) -> list[Tensor]:
    """Return query, key and value `[batch, heads, tokens, head_dim]`, in memory as a model's projections make them."""
    shape = case.batch, case.tokens, case.heads, case.head_dim
    parts = [torch.randn(shape, dtype=case.dtype, device=case.device) for _ in range(3)]
    return [part.requires_grad_(case.backward).transpose(1, 2) for part in parts]


def _variant(name: str, case: Case, qkv: list[Tensor]) -> Variant:
    if name in ("dense", "dense-pooled"):
        return fastest_dense(name, case, qkv)
    layout = case.layout
    raster = torch.arange(layout.image_tokens, device=case.device)
    attend, permutation = (
        (_raster_order(case), raster) if name == "raster-flex" else (_backend(name, case), layout.permutation)
    )
    pairs = sum(case.cost.layer_work(case.method).values()) // (4 * case.heads * case.head_dim)
    return Variant(name, attend, _window_mask(case, permutation), pairs, permutation)


def fastest_dense(name: str, case: Case, qkv: list[Tensor]) -> Variant:
    """Return dense attention by the fastest of torch's kernels that can compute a case."""
    candidates = [_dense(name, case, kernel, qkv) for kernel in KERNELS[case.device.type]]
    if len(candidates) == 1:
        return candidates[0]
    seconds = {}
    for candidate in candidates:
        with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
            warnings.simplefilter("ignore")  # torch warns at length why a kernel cannot
            if timing := measure([_subject(candidate, case, qkv)], case.device, 3)[0]:
                seconds[timing.median_s] = candidate
    return seconds[min(seconds)] if seconds else _dense(name, case, SDPBackend.MATH, qkv)


def _dense(name: str, case: Case, kernel: SDPBackend, qkv: list[Tensor]) -> Variant:
    """Return attention of all tokens to all tokens, or of the image tokens to the pooled keys alone."""
    pooled, image_tokens = name == "dense-pooled", case.height * case.width
    cells = [_pooled(x, case).contiguous() for x in qkv[1:]] if pooled else []
    first_row, queries, keys = (case.text, image_tokens, case.cost.pooled_tokens) if pooled else (0, *[case.tokens] * 2)
    computed = slice(first_row, first_row + min(queries, case.dense_queries))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = cells or (key, value)
        with sdpa_kernel([kernel]):
            return F.scaled_dot_product_attention(query[:, :, computed], key, value, scale=case.scale)

    def mask(rows: Tensor) -> Tensor:
        is_pooled = torch.arange(case.tokens + case.cost.pooled_tokens, device=case.device) >= case.tokens
        return (is_pooled == pooled).expand(len(rows), -1)

    raster, share = torch.arange(image_tokens, device=case.device), (computed.stop - first_row) / queries
    return Variant(name, attend, mask, queries * keys, raster, share, first_row, kernel)


def _backend(name: str, case: Case) -> Attend:
    plan = case.method.plan(case.layout)
    weight = torch.full((case.down_factor**2,), 1 / case.down_factor**2, device=case.device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        images = key[:, :, plan.image_keys], value[:, :, plan.image_keys]
        pooled = (pool(images[0], plan, weight), pool(images[1], plan, weight)) if plan.pooled_tokens else None
        if name not in CANDIDATES:
            return clear_attention(query, key, value, plan, pooled=pooled, backend=name, scale=case.scale)
        with configurations.forward_configuration(CANDIDATES[name]):
            return clear_attention(query, key, value, plan, pooled=pooled, backend="triton", scale=case.scale)

    return attend


def _raster_order(case: Case) -> Attend:
    attend = raster_attention(case.grid, case.text, case.window, case.down_factor, case.device)

    def with_pooled(x: Tensor) -> Tensor:
        return torch.cat([x, _pooled(x, case)], dim=2) if case.down_factor > 1 else x

    return lambda query, key, value: attend(query, with_pooled(key), with_pooled(value), case.scale)


def _pooled(x: Tensor, case: Case) -> Tensor:
    """Return means over cells of keys or values in raster order, without the library's own pooling."""
    image = x[:, :, case.text :].transpose(2, 3).unflatten(3, case.grid)
    means = F.avg_pool2d(image.flatten(0, 1), case.down_factor, ceil_mode=True, count_include_pad=False)
    return means.unflatten(0, image.shape[:2]).flatten(3).transpose(2, 3)


def _window_mask(case: Case, permutation: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the rule as a dense mask: which keys, the pooled ones last, the given queries attend to."""
    coordinates = Coordinates(permutation // case.width, permutation % case.width)

    def mask(rows: Tensor) -> Tensor:
        queries = Coordinates(*(axis[(rows - case.text).clamp(min=0)] for axis in coordinates))
        near = window_mask(queries, coordinates, torch.tensor(case.window**2, device=case.device))
        is_text = (rows < case.text)[:, None]
        pooled = ~is_text.expand(-1, case.cost.pooled_tokens)
        return torch.cat([near.new_ones(len(rows), case.text), near | is_text, pooled], dim=1)

    return mask


def _exact(variant: Variant, case: Case, qkv: list[Tensor], rows: Tensor) -> Tensor:
    """Return the output of some queries in float64, one head at a time."""
    mask = variant.mask(rows)
    raster = torch.cat([torch.arange(case.text, device=rows.device), case.text + variant.permutation.argsort()])
    outputs = []
    for heads in zip(*(x.flatten(0, 1) for x in qkv), strict=True):
        query, key, value = (x.double() for x in heads)
        if case.down_factor > 1:
            key, value = (torch.cat([x, _pooled(x[None, None, raster], case)[0, 0]]) for x in (key, value))
        scores = (query[rows] @ key.T * case.scale).masked_fill(~mask, -torch.inf)
        outputs.append(scores.softmax(dim=1) @ value)
    return torch.stack(outputs).unflatten(0, (case.batch, case.heads))


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    return float((result.double() - expected).norm() / expected.norm())


def _subject(variant: Variant, case: Case, qkv: list[Tensor]) -> Subject:
    """Return a variant to be measured forward, and backward if its inputs require gradients."""
    direction = torch.randn_like(qkv[0]) if case.backward else torch.empty(0)

    def with_gradients(output: Tensor, rows: Tensor | slice) -> list[Tensor]:
        gradients = torch.autograd.grad(output, qkv, direction[:, :, rows].to(output)) if case.backward else ()
        return [output, *gradients]

    def call(mark: Mark) -> list[Tensor]:
        output = variant.attend(*qkv)
        return with_gradients(output, slice(variant.first_row, variant.first_row + output.shape[2]))

    def error(result: list[Tensor]) -> float | None:
        if case.backward and case.batch * case.heads * case.tokens**2 > MOST_SCORES:
            return None
        output, *gradients = result
        rows = torch.randperm(output.shape[2], device=case.device)[: None if case.backward else SAMPLED_ROWS]
        tokens = variant.first_row + rows
        expected = with_gradients(_exact(variant, case, qkv, tokens), tokens)
        computed = [output[:, :, rows], *gradients]
        return max(relative_error(a.detach(), b.detach()) for a, b in zip(computed, expected, strict=True))

    flops = int(case.cost.flops(variant.pairs) * case.batch * (FORWARD_AND_BACKWARD if case.backward else 1))
    kernel = variant.kernel.name.lower() if variant.kernel else None
    return Subject(variant.name, call, (1 / variant.share,), error, flops=flops, kernel=kernel)
