"""CLEAR's attention where each rank has a share of the image tokens: the same numbers as on one.

It stands behind a custom operator, so that a compiled graph takes it as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clear_attn.backends import BACKENDS, check_can_run
from clear_attn.backends.softmax import has_lse_kernel, merge_, softmax_attention
from clear_attn.parallel.communicator import Links, Pending
from clear_attn.parallel.handles import recall
from clear_attn.parallel.shard import Share, Strip

# How many scores are held at a time, where they are held.
MAX_SCORES = 2**26


class ParallelAttention:
    """Takes the place of `clear_attn.clear_attention` in the layers of a call.

    Args:
        links: to the other ranks.
    """

    def __init__(self, links: Links) -> None:
        self.handle = links.handle

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Share,
        *,
        pooled: tuple[Tensor, Tensor] | None,
        backend: str,
        scale: float,
        text_attention: Any,
    ) -> Tensor:
        """As `clear_attention`, of the rank's own tokens; `pooled` are its sums of its tokens in each cell.

        The text's plain attention has to tell its log-sum-exp, which the kernels that `text_attention` calls keep to
        themselves, so that is not used.
        """
        parts = [] if pooled is None else list(pooled)
        output = _attend(query, key, value, parts, layout.handle, self.handle, backend, scale)
        return output.transpose(1, 2)


@torch.library.custom_op("clear_attn::parallel", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled: list[Tensor],
    share: Tensor,
    links: Tensor,
    backend: str,
    scale: float,
) -> Tensor:
    return attend(query, key, value, pooled, recall(share), recall(links), backend, scale)


@_attend.register_fake
def _(query, key, value, pooled, share, links, backend, scale):  # type: ignore[no-untyped-def]
    return query.new_empty(query.transpose(1, 2).shape)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled: list[Tensor],
    share: Share,
    links: Links,
    backend: str,
    scale: float,
) -> Tensor:
    """`[batch, tokens, heads, head_dim]`. What others wait for goes first; what comes from them is waited for last."""
    check_can_run(backend, query.device, query.dtype, query.shape[-1], needs_grad=False)
    output = query.new_empty(query.transpose(1, 2).shape)
    image, text = (output.transpose(1, 2)[:, :, places] for places in (share.image, share.text))
    own = torch.stack([key[:, :, share.image], value[:, :, share.image]])
    halo = _start_halo(own, share, links)
    cells = _start_pooling(pooled, share, links)
    text_part = _start_text(query, key, value, share, links, scale) if share.text_tokens else None
    seen_by_all = [torch.stack([key[:, :, share.text], value[:, :, share.text]]), *cells()]

    def attend_strip(strip: Strip, tokens: Tensor) -> None:
        keys = torch.cat([tokens.index_select(3, strip.image_keys), *seen_by_all], dim=3)
        rows = query[:, :, share.image].index_select(2, strip.queries)
        if share.config is None:  # all see all
            part, _ = softmax_attention(rows, keys[0], keys[1], None, scale, False)
        else:
            part, _ = BACKENDS[backend].attend(rows, keys[0], keys[1], strip, scale, False)
        image.index_copy_(2, strip.queries, part)

    for strip in share.strips:
        if not strip.needs_halo:
            attend_strip(strip, own)
    text_sum = text_part() if text_part else None
    received = halo()
    for strip in share.strips:
        if strip.needs_halo:
            attend_strip(strip, received)
    if text_sum:
        text.copy_(text_sum())
    return output


def _start_halo(own: Tensor, share: Share, links: Links) -> Pending[Tensor]:
    """Then the rank's own keys and values, those of its halo behind them, `[2, batch, heads, tokens, head_dim]`."""
    sends = [(peer, own.index_select(3, tokens)) for peer, tokens in share.sends]
    receives = [(peer, own.new_empty(*own.shape[:3], len(tokens), own.shape[4])) for peer, tokens in share.receives]
    wait = links.exchange(sends, receives)

    def finish() -> Tensor:
        wait()
        sends.clear()
        return torch.cat([own, *(tokens for _, tokens in receives)], dim=3)

    return finish


def _start_pooling(pooled: list[Tensor], share: Share, links: Links) -> Pending[list[Tensor]]:
    """Then a list of all pooled keys and values, `[2, batch, heads, cells, head_dim]`, empty where there are none.

    A cell that lies on several ranks is the sum of theirs.
    """
    if not pooled:
        return list
    wait = links.gather(torch.stack(pooled), [len(cells) for cells in share.cells], dim=3)

    def finish() -> list[Tensor]:
        parts = torch.cat(wait(), dim=3)
        shape = (*parts.shape[:3], share.whole.pooled_tokens, parts.shape[4])
        return [parts.new_zeros(shape).index_add_(3, torch.cat(share.cells), parts)]

    return finish


def _start_text(
    query: Tensor, key: Tensor, value: Tensor, share: Share, links: Links, scale: float
) -> Pending[Pending[Tensor]]:
    """The text's attention to the rank's keys; then, in two steps, to all ranks'.

    Each rank's part weighs exp(its log-sum-exp - that over all keys). The text's own keys count on the first rank.
    """
    places = slice(None) if links.rank == 0 else share.image
    part, lse = dense_with_lse(query[:, :, share.text], key[:, :, places], value[:, :, places], scale)
    wait = links.gather(lse, [share.text_tokens] * links.ranks, dim=2)

    def weigh() -> Pending[Tensor]:
        weight = torch.exp(lse - torch.logsumexp(torch.stack(wait()), dim=0))
        total = part.to(weight.dtype) * weight[..., None]
        finish = links.add_up(total)

        def result() -> Tensor:
            finish()
            return total

        return result

    return weigh


def dense_with_lse(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Plain attention and its log-sum-exp, over spans of keys where the scores would have to be held."""
    batch, heads, queries, _ = query.shape
    span = key.shape[2] if has_lse_kernel(query) else max(1, MAX_SCORES // (batch * heads * queries))
    parts = zip(key.split(span, dim=2), value.split(span, dim=2), strict=True)
    output, lse = softmax_attention(query, *next(parts), None, scale, True)
    assert lse is not None
    for each in parts:
        merge_(output, lse, *softmax_attention(query, *each, None, scale, True))
    return output, lse
