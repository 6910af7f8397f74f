"""The `tiled` backend: torch's own attention on tiles of queries with their gathered keys.

It needs no compiler and has gradients on all devices. It is a custom operator, so that a compiled graph has one node
for it at any image size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from clear_attn.backends.derivatives import refuse_second_backward, validate_derivatives
from clear_attn.backends.softmax import has_lse_kernel, merge_, softmax_attention, softmax_attention_backward
from clear_attn.core.key_lists import SharedKeys
from clear_attn.core.tiles import Tiles

# The most elements of keys that a step gathers: what fits a CPU's caches, elsewhere a fraction of a model's memory.
GATHERED_ELEMENTS_ON_CPU = 2**20
GATHERED_ELEMENTS = 2**26
# Enough queries for the CPU kernel's largest blocks, with results that stay in its caches.
QUERIES_AT_A_TIME = 4096
# The most scores of a step that stores them.
MAX_SCORES = 2**26


class TiledPlan(Protocol):
    """The part of a plan that this backend reads: the tiles, and the positions of image queries and shared keys."""

    @property
    def tiles(self) -> Tiles: ...

    @property
    def image(self) -> slice: ...

    @property
    def shared_keys(self) -> SharedKeys: ...


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TiledPlan,
    key_bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """See `clear_attn.backends`. Time and memory are linear in the image tokens."""
    validate_derivatives("tiled", query, key, value)
    if torch.is_autocast_enabled(query.device.type) and not return_lse:  # as torch's own attention does
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) if x.dtype != torch.float64 else x for x in (query, key, value))
    starts = [plan.image.start, plan.shared_keys.before]
    output, lse = _tiled(query, key, value, list(plan.tiles), starts, key_bias, scale, return_lse)
    # The operator returns no view, so that the caller may write text rows while autograd records.
    return output.transpose(1, 2), lse if return_lse else None


@torch.library.custom_op("clear_attn::tiled", mutates_args=())
def _tiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: list[Tensor],
    starts: list[int],
    key_bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    # Shared keys, text and pooled ones, need no gathering where results can be merged.
    image, shared = _split(key, tiles, starts)
    merged = has_lse_kernel(query) and len(shared) > 0
    needs_lse = return_lse or merged
    rows = [query[:, :, image].transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)]
    output, lse = _new_results(query, needs_lse)
    own_lse = lse[:, :, image] if needs_lse else lse
    for queries, keys, mask in _steps(tiles, shared[:0] if merged else shared, starts[1], query, needs_lse):
        part, part_lse = softmax_attention(
            _gather(rows[0], queries),
            _gather(rows[1], keys),
            _gather(rows[2], keys),
            mask,
            scale,
            needs_lse,
            _gather_bias(key_bias, keys),
        )
        output[:, image][:, queries.flatten()] = _scatter(part, queries)
        if part_lse is not None:
            own_lse[:, :, queries.flatten()] = _scatter(part_lse[..., None], queries)[..., 0].transpose(1, 2)
    if merged:
        shared_key, shared_value = key[:, :, shared], value[:, :, shared]
        shared_bias = None if key_bias is None else key_bias[:, None, None, shared]
        for first in range(image.start, image.stop, QUERIES_AT_A_TIME):
            span = slice(first, min(first + QUERIES_AT_A_TIME, image.stop))
            other = softmax_attention(query[:, :, span], shared_key, shared_value, None, scale, True, shared_bias)
            merge_(output.transpose(1, 2)[:, :, span], lse[:, :, span], *other)
    return output, lse if return_lse else lse.new_empty(0)


@_tiled.register_fake
def _(query, key, value, tiles, starts, key_bias, scale, return_lse):  # type: ignore[no-untyped-def]
    return _new_results(query, return_lse)


@torch.library.custom_op("clear_attn::tiled_backward", mutates_args=())
def _tiled_backward(
    output_gradient: Tensor,
    lse_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: list[Tensor],
    starts: list[int],
    key_bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute each step, so that only one step's scores are in memory."""
    image, shared = _split(key, tiles, starts)
    rows = [query[:, :, image].transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)]
    gradients = [_new_gradient(x, summed) for x, summed in ((query, False), (key, True), (value, True))]
    sums = [gradients[0][:, :, image], *gradients[1:]]
    output_gradient = output_gradient[:, image]
    if return_lse:
        lse_gradient = lse_gradient[:, :, image, None].transpose(1, 2)
    for queries, keys, mask in _steps(tiles, shared, starts[1], query, holds_scores=True):
        places = (queries, keys, keys)
        query_part, key_part, value_part = (_gather(x, index) for x, index in zip(rows, places, strict=True))
        inner = softmax_attention_backward(
            _gather(output_gradient, queries),
            _gather(lse_gradient, queries)[..., 0] if return_lse else None,
            query_part,
            key_part,
            value_part,
            mask,
            scale,
            _gather_bias(key_bias, keys),
        )
        for total, part, index in zip(sums, inner, places, strict=True):
            _add(total.transpose(1, 2), part, index, 0 if index is queries else len(shared))
    query_gradient, key_gradient, value_gradient = gradients
    return query_gradient, key_gradient.to(key.dtype), value_gradient.to(value.dtype)


@_tiled_backward.register_fake
def _(output_gradient, lse_gradient, query, key, value, *rest):  # type: ignore[no-untyped-def]
    return tuple(_new_gradient(x, False) for x in (query, key, value))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, tiles, ctx.starts, key_bias, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, key_bias, *tiles)


def _backward(ctx, output_gradient, lse_gradient):  # type: ignore[no-untyped-def]
    query, key, value, key_bias, *tiles = ctx.saved_tensors
    arguments = query, key, value, tiles, ctx.starts, key_bias, *ctx.rest
    gradients = _tiled_backward(output_gradient, lse_gradient, *arguments)
    return *gradients, [None] * len(tiles), None, None, None, None


_tiled.register_autograd(_backward, setup_context=_setup_context)
_tiled_backward.register_autograd(refuse_second_backward("tiled"))


def _new_results(query: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Return empty tensors for the output, `[batch, tokens, heads, head_dim]`, and for the log-sum-exp."""
    output = query.new_empty(query.transpose(1, 2).shape)
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return output, query.new_empty(query.shape[:3] if return_lse else (0,), dtype=lse_dtype)


def _new_gradient(x: Tensor, summed: bool) -> Tensor:
    """Return zeros in the memory layout of `_new_results`, in at least float32 if many terms are summed."""
    dtype = torch.promote_types(x.dtype, torch.float32) if summed else x.dtype
    return x.new_zeros(x.transpose(1, 2).shape, dtype=dtype).transpose(1, 2)


def _split(key: Tensor, tiles: list[Tensor], starts: list[int]) -> tuple[slice, Tensor]:
    """Return the positions of the image queries, and of the keys that are not image tokens.

    `starts` are the positions of the first image query and of the first image key.
    """
    found, (first_query, first_key) = Tiles(*tiles), starts
    places = torch.arange(key.shape[2], device=key.device)
    shared = torch.cat([places[:first_key], places[first_key + int(found.image_keys) :]])
    return slice(first_query, first_query + len(found.queries)), shared


def _steps(
    tiles: list[Tensor], shared: Tensor, first_key: int, query: Tensor, holds_scores: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield positions of queries `[tiles, q]` and of their keys `[tiles, k]`, shared keys first, and the mask."""
    batch, heads, _, head_dim = query.shape
    most = GATHERED_ELEMENTS_ON_CPU if query.device.type == "cpu" else GATHERED_ELEMENTS
    for group in Tiles(*tiles).groups():
        mask = F.pad(group.mask, (len(shared), 0), value=True)
        step = most // (batch * heads * head_dim * mask.shape[1])
        if holds_scores:
            step = min(step, MAX_SCORES // (batch * heads * mask.numel()))
        for queries, keys in zip(group.queries.split(max(1, step)), group.keys.split(max(1, step)), strict=True):
            yield queries, torch.cat([shared.expand(len(keys), -1), keys + first_key], dim=1), mask


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Gather `[batch, tokens, heads, d]` at `[tiles, n]` into `[batch * tiles, heads, n, d]`."""
    picked = x.index_select(1, index.flatten()).unflatten(1, index.shape)
    return picked.flatten(0, 1).transpose(1, 2)


def _gather_bias(key_bias: Tensor | None, index: Tensor) -> Tensor | None:
    """Gather `[batch, keys]` at `[tiles, n]` into `[batch * tiles, 1, 1, n]`."""
    if key_bias is None:
        return None
    return key_bias.index_select(1, index.flatten()).unflatten(1, index.shape).flatten(0, 1)[:, None, None]


def _scatter(x: Tensor, index: Tensor) -> Tensor:
    """Reshape `[batch * tiles, heads, n, d]` to `[batch, tiles * n, heads, d]`, the inverse of `_gather`."""
    return x.transpose(1, 2).unflatten(0, (-1, len(index))).flatten(1, 2)


def _add(gradient: Tensor, part: Tensor, index: Tensor, shared: int) -> None:
    """Add `part` to the gradient at `index`; the first `shared` positions are the same for all tiles."""
    # Sum over the tiles first: separate additions to the same position are slow and, on a GPU, round each time.
    own = _scatter(part[:, :, shared:], index).to(gradient.dtype)
    gradient.index_add_(1, index[:, shared:].flatten(), own)
    if shared:
        sums = part[:, :, :shared].transpose(1, 2).unflatten(0, (-1, len(index))).sum(dim=1, dtype=gradient.dtype)
        gradient.index_add_(1, index[0, :shared], sums)
