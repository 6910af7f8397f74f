"""CLEAR's attention over several ranks, each with a shard of the image tokens, with the same numbers as on one.

It is a custom operator, which compiled graphs do not trace.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from clear_attn.backends.selection import BACKENDS, validate_call
from clear_attn.backends.softmax import has_lse_kernel, merge_, softmax_attention
from clear_attn.methods.method import Options
from clear_attn.parallel.communicator import Communicator, Future
from clear_attn.parallel.handles import recall, remember
from clear_attn.parallel.shard import Shard, ShardPlan, Strip

# The most scores in memory at a time, for kernels that store them.
MAX_SCORES = 2**26


class ShardedPlan(ShardPlan):
    """A plan whose attention all ranks compute together.

    Args:
        shard: the shard of the rank.
        window, down_factor: see `ShardPlan`.
        communicator: the communicator of the ranks.
    """

    def __init__(self, shard: Shard, window: float, down_factor: int, communicator: Communicator) -> None:
        super().__init__(shard, window, down_factor)
        self.handle, self.communicator = remember(self), communicator

    def prepare(self, backend: str) -> None:
        """Build the index tensors of a backend now, because compiled layers cannot."""
        for strip in self.strips if math.isfinite(self.window) else ():
            BACKENDS[backend].prepare(strip)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, pooled: tuple[Tensor, Tensor] | None, options: Options
    ) -> Tensor:
        """Return the attention of the rank's own queries; `pooled` are the sums of its tokens in each cell.

        Dense attention of text must return its log-sum-exp, so the kernels of `options.dense` are not used.
        """
        parts = [] if pooled is None else list(pooled)
        backend, scale = options.backend, options.scale
        bias = (options.bias.text, options.bias.text_queries) if options.bias else (None, None)
        output: Tensor = attend(query, key, value, parts, self.handle, backend, scale, *bias)
        return output.transpose(1, 2)


@torch.library.custom_op("clear_attn::parallel", mutates_args=())
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled: list[Tensor],
    handle: Tensor,
    backend: str,
    scale: float,
    text_bias: Tensor | None,
    text_query_bias: Tensor | None,
) -> Tensor:
    """Return `[batch, tokens, heads, head_dim]`. Tensors for other ranks are sent first; theirs are awaited last."""
    plan: ShardedPlan = recall(handle)
    validate_call(backend, query.device, query.dtype, query.shape[-1], needs_grad=False)
    output = query.new_empty(query.transpose(1, 2).shape)
    image, text = (output.transpose(1, 2)[:, :, where] for where in (plan.image, plan.text))
    own = torch.stack([key[:, :, plan.image_keys], value[:, :, plan.image_keys]])
    halo = _start_halo(own, plan)
    cells = _start_pooling(pooled, plan)
    text_part = None
    if plan.text_queries:
        text_part = _start_text(query, key, value, plan, scale, text_query_bias)
    shared = [torch.stack([key[:, :, plan.text_keys], value[:, :, plan.text_keys]]), *cells()]

    def attend_strip(strip: Strip, tokens: Tensor) -> None:
        keys = torch.cat([tokens.index_select(3, strip.image_keys), *shared], dim=3)
        rows = query[:, :, plan.image].index_select(2, strip.queries)
        bias = None if text_bias is None else F.pad(text_bias, (len(strip.image_keys), plan.all_cells))
        if math.isfinite(plan.window):
            part, _ = BACKENDS[backend].attend(rows, keys[0], keys[1], strip, bias, scale, False)
        else:
            bias = bias if bias is None else bias[:, None, None]
            part, _ = softmax_attention(rows, keys[0], keys[1], None, scale, False, bias)
        image.index_copy_(2, strip.queries, part)

    for strip in plan.strips:
        if not strip.needs_halo:
            attend_strip(strip, own)
    text_sum = text_part() if text_part else None
    received = halo()
    for strip in plan.strips:
        if strip.needs_halo:
            attend_strip(strip, received)
    if text_sum:
        text.copy_(text_sum())
    return output


@attend.register_fake
def _(query, key, value, pooled, handle, backend, scale, text_bias, text_query_bias):  # type: ignore[no-untyped-def]
    return query.new_empty(query.transpose(1, 2).shape)


def _start_halo(own: Tensor, plan: ShardedPlan) -> Future[Tensor]:
    """Start the exchange of halo tokens.

    The future gives keys and values, the rank's own and then its halo, `[2, batch, heads, tokens, head_dim]`.
    """
    sends = [(peer, own.index_select(3, tokens)) for peer, tokens in plan.sends]
    receives = [(peer, own.new_empty(*own.shape[:3], len(tokens), own.shape[4])) for peer, tokens in plan.receives]
    wait = plan.communicator.exchange(sends, receives)

    def finish() -> Tensor:
        wait()
        sends.clear()
        return torch.cat([own, *(tokens for _, tokens in receives)], dim=3)

    return finish


def _start_pooling(pooled: list[Tensor], plan: ShardedPlan) -> Future[list[Tensor]]:
    """Start to gather pooled keys and values. If a cell has tokens of several ranks, its sums are added.

    The future gives a list of `[2, batch, heads, cells, head_dim]`, empty without pooled keys.
    """
    if not pooled:
        return list
    wait = plan.communicator.all_gather(torch.stack(pooled), [len(cells) for cells in plan.cells], dim=3)

    def finish() -> list[Tensor]:
        parts = torch.cat(wait(), dim=3)
        shape = (*parts.shape[:3], plan.all_cells, parts.shape[4])
        return [parts.new_zeros(shape).index_add_(3, torch.cat(plan.cells), parts)]

    return finish


def _start_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: ShardedPlan,
    scale: float,
    text_query_bias: Tensor | None,
) -> Future[Future[Tensor]]:
    """Start attention of text queries to the rank's keys; two futures merge it over all ranks.

    The weight of a rank's part is exp(its log-sum-exp - that over all keys). Only the first rank includes text keys.
    """
    rows = slice(None) if plan.communicator.rank == 0 else plan.image_keys
    bias = text_query_bias if plan.communicator.rank == 0 else None  # image keys have no bias
    part, lse = dense_with_lse(query[:, :, plan.text], key[:, :, rows], value[:, :, rows], scale, bias)
    wait = plan.communicator.all_gather(lse, [plan.text_queries] * plan.communicator.ranks, dim=2)

    def weigh() -> Future[Tensor]:
        weight = torch.exp(lse - torch.logsumexp(torch.stack(wait()), dim=0))
        total = part.to(weight.dtype) * weight[..., None]
        finish = plan.communicator.all_reduce(total)

        def result() -> Tensor:
            finish()
            return total

        return result

    return weigh


def dense_with_lse(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return dense attention and its log-sum-exp, in spans of keys if the kernel stores scores."""
    batch, heads, queries, _ = query.shape
    span = key.shape[2] if has_lse_kernel(query) else max(1, MAX_SCORES // (batch * heads * queries))
    biases = [None] * len(key.split(span, dim=2)) if bias is None else bias.split(span, dim=-1)
    parts = zip(key.split(span, dim=2), value.split(span, dim=2), biases, strict=True)
    results = (softmax_attention(query, *each[:2], None, scale, True, each[2]) for each in parts)
    output, lse = next(results)
    assert lse is not None
    for other in results:
        merge_(output, lse, *other)
    return output, lse
