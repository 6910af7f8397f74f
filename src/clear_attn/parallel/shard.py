"""Shards: the rows of tokens that each rank holds, and the halo that ranks exchange. This file sends nothing."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clear_attn.core.coordinates import (
    Grid,
    Segment,
    cell_grid,
    invert_permutation,
    joint_slices,
    select_rows,
    to_tensor,
)
from clear_attn.core.layout import Images, TokenLayout
from clear_attn.core.plan import Plan, pooled_cells
from clear_attn.core.region import AttentionRegion

# Rows of tokens in a tile. Ranks hold whole tile rows, so that their borders cut no tiles.
TILE_ROW = 8

Rows = list[slice]


def check_ranks(grid: Grid, ranks: int) -> None:
    """Raise ValueError for more ranks than an image has tile rows."""
    height, width = grid
    tile_rows, _ = cell_grid(grid, TILE_ROW)
    if ranks > tile_rows:
        raise ValueError(
            f"{ranks} ranks are too many for an image of {height} x {width} tokens, which has {tile_rows} tile "
            f"row{'s' * (tile_rows > 1)} of {TILE_ROW} tokens; use at most {tile_rows}, or draw a taller image"
        )


def span_of(layout: TokenLayout, rank: int, ranks: int) -> tuple[int, int]:
    """Return the first row of the first grid that a rank holds, and the row after its last one."""
    height = layout.unit[0]
    tile_rows, _ = cell_grid(layout.unit, TILE_ROW)
    first, last = (min(height, TILE_ROW * (tile_rows * each // ranks)) for each in (rank, rank + 1))
    return first, last


def rows_between(layout: TokenLayout, first: int, last: int) -> Rows:
    """Return the rows of each segment with the y coordinates of rows first to last - 1 of the first grid."""

    def row(axes: Segment, bound: int) -> int:
        if bound <= 0:
            return 0
        return len(axes.y) if bound >= layout.unit[0] else int(np.searchsorted(axes.y, bound - 0.5))

    return [slice(row(axes, first), row(axes, last)) for axes in layout.segments]


def rows_of(layout: TokenLayout, rank: int, ranks: int) -> Rows:
    """Return the rows of each segment that a rank holds, possibly none except in the first segment."""
    return rows_between(layout, *span_of(layout, rank, ranks))


def rows_attended(layout: TokenLayout, rows: Rows, window: float) -> Rows:
    """Return the rows of each segment that lie within the window of some rows."""
    y = np.concatenate([axes.y[span] for axes, span in zip(layout.segments, rows, strict=True)])
    if not len(y):
        return [slice(0, 0)] * len(rows)
    low, high = y.min() - window, y.max() + window
    return [
        slice(int(np.searchsorted(axes.y, low, "right")), int(np.searchsorted(axes.y, high, "left")))
        for axes in layout.segments
    ]


def strips_of(layout: TokenLayout, rank: int, ranks: int, window: float) -> list[tuple[Rows, bool]]:
    """Return a rank's rows from top to bottom, split by whether they need the halo above or below.

    Each is returned with whether it needs any halo.
    """
    own = rows_of(layout, rank, ranks)
    first, last = span_of(layout, rank, ranks)

    def needs(row: int) -> tuple[bool, bool]:
        attended = rows_attended(layout, rows_between(layout, row, min(row + TILE_ROW, last)), window)
        pairs = list(zip(attended, own, strict=True))
        return any(a.start < b.start for a, b in pairs), any(a.stop > b.stop for a, b in pairs)

    def has_tokens(row: int) -> bool:
        return any(span.start < span.stop for span in rows_between(layout, row, min(row + TILE_ROW, last)))

    strips = []
    for needed, group in itertools.groupby(filter(has_tokens, range(first, last, TILE_ROW)), key=needs):
        rows = list(group)
        strips.append((rows_between(layout, rows[0], min(rows[-1] + TILE_ROW, last)), any(needed)))
    return strips


def tokens_of(layout: TokenLayout, rank: int, ranks: int) -> np.ndarray:
    """Return int64 `[tokens]`, the raster indices of a rank's tokens in tile order."""
    return select_rows(layout.segments, rows_of(layout, rank, ranks)).raster


def halo_from(layout: TokenLayout, peer: int, rank: int, ranks: int, window: float) -> np.ndarray:
    """Return int64 `[tokens]`, the raster indices of a peer's tokens that a rank needs, in raster order."""
    needed, there = rows_attended(layout, rows_of(layout, rank, ranks), window), rows_of(layout, peer, ranks)
    parts = []
    for axes, a, b in zip(layout.segments, needed, there, strict=True):
        first, last = max(a.start, b.start), max(a.start, b.start, min(a.stop, b.stop))
        parts.append(axes.start + np.arange(first * len(axes.x), last * len(axes.x)))
    return np.concatenate(parts)


class Strip(AttentionRegion):
    """Some of a rank's rows, with the keys that they attend to: image keys, text, pooled keys.

    Attributes:
        queries: int64, positions of the queries among the rank's tokens.
        image_keys: int64, positions of the image keys among the rank's tokens, followed by its halo.
        needs_halo (`bool`): whether any of them is in the halo.
    """

    def __init__(
        self, layout: TokenLayout, rows: Rows, needs_halo: bool, positions: np.ndarray, window: float, others: int
    ) -> None:
        queries = select_rows(layout.segments, rows)
        keys = select_rows(layout.segments, rows_attended(layout, rows, window))
        tokens = len(queries.y)
        super().__init__(queries, keys, 0, others, tokens, slice(0, tokens), window, layout.device)
        self.queries = to_tensor(positions[queries.raster], layout.device)
        self.image_keys = to_tensor(positions[keys.raster], layout.device)
        self.needs_halo = needs_halo


class Message(NamedTuple):
    """Image tokens sent to or received from a peer: int64 positions among the tokens of this rank and its halo."""

    peer: int
    tokens: Tensor


class Shard:
    """The part of a layout that a rank holds: all text tokens and some image tokens, with `TokenLayout`'s attributes.

    Args:
        whole: the layout of all tokens.
        rank, ranks: this rank and the number of ranks.

    Attributes:
        permutation: int64 `[own image tokens]`; `x[permutation]` takes the rank's tokens from raster order.
        inverse_permutation: int64 `[all image tokens]`; puts the concatenated tokens of all ranks into raster order.
        in_whole: int64 `[own image tokens]`; takes the rank's tokens from the tile order of the whole layout.
        counts: the number of image tokens of each rank.

    Raises:
        ValueError: there are more ranks than tile rows.
    """

    def __init__(self, whole: TokenLayout, rank: int, ranks: int) -> None:
        check_ranks(whole.unit, ranks)
        self.whole, self.rank, self.ranks = whole, rank, ranks
        self._of_images: dict[Images, Shard] = {}
        self.grids, self.device = whole.grids, whole.device
        self.text_tokens, self.text_first = whole.text_tokens, whole.text_first
        self.raster = [tokens_of(whole, each, ranks) for each in range(ranks)]
        own = self.raster[rank]
        self.image_tokens, self.counts = len(own), [len(tokens) for tokens in self.raster]
        self.tokens = self.text_tokens + self.image_tokens
        with torch.inference_mode(False):
            self.permutation = to_tensor(own, self.device)
            self.inverse_permutation = to_tensor(invert_permutation(np.concatenate(self.raster)), self.device)
            self.in_whole = whole.inverse_permutation[self.permutation]
        self.text_keys, self.image_keys = joint_slices(self.text_tokens, self.image_tokens, self.text_first)
        text_in_query = self.text_tokens if whole.text_queries else 0
        self.text, self.image = joint_slices(text_in_query, self.image_tokens, self.text_first)

    @functools.cached_property
    def without_text(self) -> Shard:
        """The shard for layers without text."""
        whole = self.whole.without_text
        return self if whole is self.whole else Shard(whole, self.rank, self.ranks)

    def of_images(self, images: Images) -> Shard | None:
        """Return the shard for layers that attend among some of the images, or None if the call has none of them."""
        whole = self.whole.of_images(images)
        if whole is None or whole is self.whole:
            return self if whole else None
        if images not in self._of_images:
            self._of_images[images] = Shard(whole, self.rank, self.ranks)
        return self._of_images[images]


class ShardPlan(Plan):
    """CLEAR or dense attention on the shard of a rank.

    Args:
        shard: the shard of the rank.
        window: the radius in tokens; infinity for dense attention.
        down_factor: the side of pooled cells in tokens; 1 for no pooling.

    Attributes:
        strips: the rank's rows from top to bottom.
        sends, receives (`Message`): halo tokens, by peer. Received tokens come after the rank's own.
        pool_index, pool_weight: see `WindowPlan`; for the cells with a token of the rank. The weight of other ranks'
            tokens is 0, so that the sums of all ranks add up to the pooled cell.
        cells: for each rank, the indices of its cells among all cells, int64.
        all_cells: the number of cells of the image.
    """

    def __init__(self, shard: Shard, window: float, down_factor: int = 1) -> None:
        super().__init__(shard)
        self.window, self.down_factor, self.ranks = window, down_factor, shard.ranks
        whole, rank, ranks, device = shard.whole, shard.rank, shard.ranks, shard.device
        own = shard.raster[rank]
        peers = [peer for peer in range(ranks) if peer != rank]
        halos = [(peer, halo_from(whole, peer, rank, ranks, window)) for peer in peers]
        there = np.concatenate([own, *(halo for _, halo in halos)])
        positions = np.full(whole.image_tokens, -1)
        positions[there] = np.arange(len(there))
        with torch.inference_mode(False):
            self.sends = [
                Message(peer, to_tensor(positions[halo], device))
                for peer in peers
                if len(halo := halo_from(whole, rank, peer, ranks, window))
            ]
            self.receives = [Message(peer, to_tensor(positions[halo], device)) for peer, halo in halos if len(halo)]
            self._pool(shard, positions)
            others = whole.text_tokens + self.all_cells
            self.strips = [
                Strip(whole, rows, needs_halo, positions, window, others)
                for rows, needs_halo in strips_of(whole, rank, ranks, window)
            ]

    def _pool(self, shard: Shard, positions: np.ndarray) -> None:
        index, weight = pooled_cells(shard.grids, self.down_factor)
        owner = np.empty(shard.whole.image_tokens, np.int64)
        for each, tokens in enumerate(shard.raster):
            owner[tokens] = each
        held = [((owner[index] == each) & (weight > 0)) for each in range(shard.ranks)]
        cells = [np.flatnonzero(mine.any(axis=1)) for mine in held]
        mine, own_cells = held[shard.rank], cells[shard.rank]
        self.all_cells = len(index)
        self.cells = [to_tensor(each, shard.device) for each in cells]
        self.pool_index = to_tensor(np.where(mine, positions[index], 0)[own_cells], shard.device)
        self.pool_weight = to_tensor((mine * weight)[own_cells].astype(np.float32), shard.device)
        self.pooled_tokens = len(own_cells)
