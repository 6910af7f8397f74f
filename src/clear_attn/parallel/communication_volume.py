"""How many bytes each rank sends, counted from the layout, beside attention that splits a sequence in other ways."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clear_attn.core.layout import TokenLayout
from clear_attn.methods import Method
from clear_attn.parallel.shard import check_ranks, halo_from, rows_of

# Of log-sum-exps and of sums of the text's parts, whatever the dtype of the model.
WIDE = torch.float32.itemsize


@dataclass(frozen=True)
class Traffic:
    """What one rank sends in bytes, in one attention layer with text but for `output`.

    A gathering of n ranks sends a rank's part n - 1 times, and a sum 2 (n - 1) / n times the tensor, as rings do.

    Attributes:
        halo: keys and values of its tokens that others' windows reach.
        pooled: its pooled keys and values, to all.
        text_lse, text_sum: what merges the ranks' parts of the text's attention.
        ring: in the place of all these, ring attention: keys and values of the rank's tokens, to all.
        all_to_all: likewise, with heads split during attention: query, key, value and output; None where the ranks do
            not divide the heads.
        tokens: image tokens of the largest share, which a gathered output sends for each rank.
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
        """All that a rank sends in a layer."""
        return self.halo + self.pooled + self.text_lse + self.text_sum

    def output(self, channels: int) -> int:
        """What it sends once in a step: its output tokens of so many channels, to all."""
        return (self.ranks - 1) * self.tokens * channels * self.element * self.batch


def traffic(
    layout: TokenLayout,
    method: Method,
    rank: int,
    ranks: int,
    *,
    heads: int,
    head_dim: int,
    element: int,
    batch: int = 1,
) -> Traffic:
    """Counts what a rank sends for a picture.

    Args:
        layout: of the whole image.
        method: CLEAR, or dense attention.
        rank, ranks: which one it is, of how many.
        heads, head_dim: of attention.
        element: bytes of a number of the model's dtype.
        batch: pictures in one forward pass.

    Raises:
        ValueError: more ranks than tile rows.
    """
    check_ranks(layout.grids[0], ranks)
    token = heads * head_dim * element * batch
    others = ranks - 1
    sent = sum(len(halo_from(layout, rank, peer, ranks, method.halo())) for peer in range(ranks) if peer != rank)
    most_tokens = max(_tokens(layout, each, ranks) for each in range(ranks))
    most_cells = max(_cells(layout, method.pooled_factor or 1, each, ranks) for each in range(ranks))
    text = layout.text_tokens
    joint = text + layout.image_tokens
    return Traffic(
        halo=2 * sent * token,
        pooled=2 * others * most_cells * token,
        text_lse=others * text * heads * WIDE * batch,
        text_sum=2 * others * text * heads * head_dim * WIDE * batch // ranks,
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
    """How many pooled cells have a token of a rank."""
    cells = 0
    if factor == 1:
        return 0
    for segment, span in zip(layout.segments, rows_of(layout, rank, ranks), strict=True):
        if span.stop > span.start:
            cells += (-(-span.stop // factor) - span.start // factor) * -(-len(segment.x) // factor)
    return cells
