"""Count the bytes that each rank sends, and those of other ways to split attention over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clear_attn.core.layout import TokenLayout
from clear_attn.methods import Method
from clear_attn.parallel.shard import check_ranks, halo_from, rows_of

# Bytes of a log-sum-exp and of a sum of text parts, for every dtype of the model.
WIDE = torch.float32.itemsize


@dataclass(frozen=True)
class CommunicationVolume:
    """Bytes that one rank sends in an attention layer with text; `output` is once per step.

    As in ring algorithms with n ranks, all_gather sends a rank's part n - 1 times, and all_reduce 2 (n - 1) / n times.

    Attributes:
        halo: keys and values of tokens in the windows of other ranks.
        pooled: pooled keys and values, sent to all ranks.
        text_lse, text_sum: results that merge the attention of text queries over the ranks.
        ring: the bytes of ring attention instead: keys and values of the rank's tokens, sent to all ranks.
        all_to_all: the bytes of splitting by heads instead: query, key, value and output; None if the number of ranks
            does not divide the heads.
        tokens: image tokens of the largest shard; the output is gathered with this length.
        ranks, element, batch: number of ranks, bytes of a value, images in one forward pass.
    """

    halo: int
    pooled: int
    text_lse: int
    text_sum: int
    ring: int
    all_to_all: int | None
    tokens: int
    ranks: int
    element: int
    batch: int

    @property
    def layer(self) -> int:
        """All bytes that a rank sends in a layer."""
        return self.halo + self.pooled + self.text_lse + self.text_sum

    def output(self, channels: int) -> int:
        """Return the bytes of the rank's output tokens, sent to all ranks once per step."""
        return (self.ranks - 1) * self.tokens * channels * self.element * self.batch


def count_volume(
    layout: TokenLayout,
    method: Method,
    rank: int,
    ranks: int,
    *,
    heads: int,
    head_dim: int,
    element: int,
    batch: int = 1,
) -> CommunicationVolume:
    """Count the bytes that a rank sends.

    Args:
        layout: the layout of the whole image.
        method: CLEAR or dense attention.
        rank, ranks: this rank and the number of ranks.
        heads, head_dim: the heads of a layer.
        element: bytes of a value in the model's dtype.
        batch: images in one forward pass.

    Raises:
        ValueError: there are more ranks than tile rows.
    """
    check_ranks(layout.grids[0], ranks)
    token = heads * head_dim * element * batch
    others = ranks - 1
    sent = sum(len(halo_from(layout, rank, peer, ranks, method.halo())) for peer in range(ranks) if peer != rank)
    most_tokens = max(_tokens(layout, each, ranks) for each in range(ranks))
    most_cells = max(_cells(layout, method.pooled_factor or 1, each, ranks) for each in range(ranks))
    queries = layout.text.stop - layout.text.start
    joint = layout.text_tokens + layout.image_tokens
    return CommunicationVolume(
        halo=2 * sent * token,
        pooled=2 * others * most_cells * token,
        text_lse=others * queries * heads * WIDE * batch,
        text_sum=2 * others * queries * heads * head_dim * WIDE * batch // ranks,
        ring=2 * others * joint * token // ranks,
        all_to_all=None if heads % ranks else 4 * others * joint * token // ranks**2,
        tokens=most_tokens,
        ranks=ranks,
        element=element,
        batch=batch,
    )


def _tokens(layout: TokenLayout, rank: int, ranks: int) -> int:
    rows = rows_of(layout, rank, ranks)
    return sum((span.stop - span.start) * len(segment.x) for segment, span in zip(layout.segments, rows, strict=True))


def _cells(layout: TokenLayout, factor: int, rank: int, ranks: int) -> int:
    """Return the number of pooled cells with a token of a rank."""
    cells = 0
    if factor == 1:
        return 0
    for segment, span in zip(layout.segments, rows_of(layout, rank, ranks), strict=True):
        if span.stop > span.start:
            cells += (-(-span.stop // factor) - span.start // factor) * -(-len(segment.x) // factor)
    return cells
