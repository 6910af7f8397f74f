"""What one rank has of a picture: its tile rows, what it needs of others' and they of its. A function of the whole
layout, the rank and the number of ranks; nothing is sent here."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clear_attn.core.coordinates import Axes, Grid, inverse_of, place
from clear_attn.core.layout import Neighbourhood, TokenLayout, on_device, pooled_cells
from clear_attn.core.tiles import Tiles
from clear_attn.core.window_mask import BlockLists
from clear_attn.parallel.handles import remember

# Of tokens: ranks have whole ones, so that a rank's tiles are cut by its border no more than by the picture's.
TILE_ROW = 8

Rows = list[slice]


def check_ranks(grid: Grid, ranks: int) -> None:
    """Raises ValueError where there are more ranks than a picture has tile rows."""
    height, width = grid
    tile_rows = -(-height // TILE_ROW)
    if ranks > tile_rows:
        raise ValueError(
            f"{ranks} ranks are too many for a picture of {height} x {width} tokens, which has {tile_rows} tile "
            f"row{'s' * (tile_rows > 1)} of {TILE_ROW} tokens; use at most {tile_rows}, or draw a taller picture"
        )


def span_of(layout: TokenLayout, rank: int, ranks: int) -> tuple[int, int]:
    """The first row of the first grid that a rank has, and the first that it no longer has."""
    height = layout.grids[0][0]
    tile_rows = -(-height // TILE_ROW)
    first, last = (min(height, TILE_ROW * (tile_rows * each // ranks)) for each in (rank, rank + 1))
    return first, last


def rows_between(layout: TokenLayout, first: int, last: int) -> Rows:
    """The rows of each segment that stand where those rows of the first grid stand."""

    def row(axes: Axes, bound: int) -> int:
        if bound <= 0:
            return 0
        return len(axes.y) if bound >= layout.grids[0][0] else int(np.searchsorted(axes.y, bound - 0.5))

    return [slice(row(axes, first), row(axes, last)) for axes in layout.axes]


def rows_of(layout: TokenLayout, rank: int, ranks: int) -> Rows:
    """The rows of each segment that a rank has; of other segments than the first it may be none."""
    return rows_between(layout, *span_of(layout, rank, ranks))


def rows_seen(layout: TokenLayout, rows: Rows) -> Rows:
    """The rows of each segment that lie within the window of some rows."""
    y = np.concatenate([axes.y[span] for axes, span in zip(layout.axes, rows, strict=True)])
    low, high = y.min() - layout.window, y.max() + layout.window
    return [
        slice(int(np.searchsorted(axes.y, low, "right")), int(np.searchsorted(axes.y, high, "left")))
        for axes in layout.axes
    ]


def strips_of(layout: TokenLayout, rank: int, ranks: int) -> list[tuple[Rows, bool]]:
    """A rank's rows from top to bottom, cut where what they need begins or ceases to be the rank's own.

    With each, whether it needs tokens of other ranks.
    """
    own = rows_of(layout, rank, ranks)
    first, last = span_of(layout, rank, ranks)

    def needs(row: int) -> tuple[bool, bool]:
        seen = rows_seen(layout, rows_between(layout, row, min(row + TILE_ROW, last)))
        pairs = list(zip(seen, own, strict=True))
        return any(a.start < b.start for a, b in pairs), any(a.stop > b.stop for a, b in pairs)

    strips = []
    for needed, group in itertools.groupby(range(first, last, TILE_ROW), key=needs):
        rows = list(group)
        strips.append((rows_between(layout, rows[0], min(rows[-1] + TILE_ROW, last)), any(needed)))
    return strips


def tokens_of(layout: TokenLayout, rank: int, ranks: int) -> np.ndarray:
    """int64 `[tokens]`, the raster indices of a rank's tokens in their order, which no window changes: tile order."""
    return place(layout.axes, rows_of(layout, rank, ranks)).raster


def halo_from(layout: TokenLayout, peer: int, rank: int, ranks: int) -> np.ndarray:
    """int64 `[tokens]`, the raster indices of those tokens of a peer that a rank needs, in raster order."""
    needed, there = rows_seen(layout, rows_of(layout, rank, ranks)), rows_of(layout, peer, ranks)
    parts = []
    for axes, a, b in zip(layout.axes, needed, there, strict=True):
        first, last = max(a.start, b.start), max(a.start, b.start, min(a.stop, b.stop))
        parts.append(axes.start + np.arange(first * len(axes.x), last * len(axes.x)))
    return np.concatenate(parts)


class Strip(Neighbourhood):
    """Some of a rank's rows, with the keys that they may see: image keys, text, pooled keys.

    Attributes:
        queries: int64, positions of its queries among the rank's tokens.
        image_keys: int64, positions of its image keys among the rank's tokens and, behind them, those received.
        needs_halo (`bool`): whether any of them is received.
    """

    def __init__(self, layout: TokenLayout, rows: Rows, needs_halo: bool, positions: np.ndarray) -> None:
        queries, keys = place(layout.axes, rows), place(layout.axes, rows_seen(layout, rows))
        tokens = len(queries.y)
        after = layout.text_tokens + layout.pooled_tokens
        every = slice(0, tokens)
        super().__init__(queries, keys, 0, after, tokens, every, layout.window, layout.device)
        self.queries = on_device(positions[queries.raster], layout.device)
        self.image_keys = on_device(positions[keys.raster], layout.device)
        self.needs_halo = needs_halo


class Message(NamedTuple):
    """Image tokens that go to a peer, or come from it: positions among those that the sender has, int64."""

    peer: int
    tokens: Tensor


class Share:
    """The layout that a rank uses: as `TokenLayout`, with its image tokens alone.

    Args:
        whole: the layout of all ranks' tokens.
        rank, ranks: which one it is, of how many.
        attention (*optional*): what its layers call.

    Attributes:
        order: int64 `[own image tokens]`; `x[order]` takes the rank's tokens from raster order.
        inverse: int64 `[all image tokens]`; puts all ranks' tokens, one rank's after the other's, into raster order.
        in_whole: int64 `[own image tokens]`; takes the rank's tokens from the whole's tile order.
        counts: how many image tokens each rank has.
        strips: its rows from top to bottom.
        sends, receives (`Message`): halo tokens, by peer. Those that are received stand behind the rank's own.
        pool_index, pool_weight: as in `TokenLayout`, of the cells of which the rank has a token; the weight is 0 for
            tokens that it has not, so that the ranks' sums of a cell add up to it.
        cells: int64, by rank, which of all cells these are.

    Raises:
        ValueError: more ranks than tile rows.
    """

    def __init__(
        self, whole: TokenLayout, rank: int, ranks: int, attention: Callable[..., Tensor] | None = None
    ) -> None:
        check_ranks(whole.grids[0], ranks)
        self.whole, self.rank, self.ranks, self.attention = whole, rank, ranks, attention
        self.config, self.device, self.grids = whole.config, whole.device, whole.grids
        self.window, self.down_factor = whole.window, whole.down_factor
        self._within: dict[float, Share] = {}
        self.text_tokens, self.text_first = whole.text_tokens, whole.text_first
        self.handle = remember(self)
        with torch.inference_mode(False):
            self._build()

    def _build(self) -> None:
        whole, rank, ranks, device = self.whole, self.rank, self.ranks, self.device
        orders = [tokens_of(whole, each, ranks) for each in range(ranks)]
        own = orders[rank]
        self.image_tokens, self.counts = len(own), [len(order) for order in orders]
        self.order, self.inverse = on_device(own, device), on_device(inverse_of(np.concatenate(orders)), device)
        self.in_whole = whole.inverse[self.order]
        first = self.text_tokens if self.text_first else 0
        self.image = slice(first, first + self.image_tokens)
        first = 0 if self.text_first else self.image_tokens
        self.text = slice(first, first + self.text_tokens)

        peers = [peer for peer in range(ranks) if peer != rank]
        halos = [(peer, halo_from(whole, peer, rank, ranks)) for peer in peers]
        there = np.concatenate([own, *(halo for _, halo in halos)])
        positions = np.full(whole.image_tokens, -1)
        positions[there] = np.arange(len(there))
        self.sends = [
            Message(peer, on_device(positions[halo], device))
            for peer in peers
            if len(halo := halo_from(whole, rank, peer, ranks))
        ]
        self.receives = [Message(peer, on_device(positions[halo], device)) for peer, halo in halos if len(halo)]
        self.strips = [Strip(whole, *strip, positions) for strip in strips_of(whole, rank, ranks)]
        self._pool(orders, positions)

    def _pool(self, orders: Sequence[np.ndarray], positions: np.ndarray) -> None:
        index, weight = pooled_cells(self.grids, self.down_factor)
        owner = np.empty(self.whole.image_tokens, np.int64)
        for each, order in enumerate(orders):
            owner[order] = each
        held = [((owner[index] == each) & (weight > 0)) for each in range(self.ranks)]
        cells = [np.flatnonzero(mine.any(axis=1)) for mine in held]
        mine, own_cells = held[self.rank], cells[self.rank]
        self.cells = [on_device(each, self.device) for each in cells]
        self.pool_index = on_device(np.where(mine, positions[index], 0)[own_cells], self.device)
        self.pool_weight = on_device((mine * weight)[own_cells].astype(np.float32), self.device)
        self.pooled_tokens = len(own_cells)

    def within(self, window: float | None) -> Share:
        """The share of a layer with its own window, as in `TokenLayout`; the same tokens in the same order."""
        whole = self.whole.within(window)
        if whole is self.whole:
            return self
        if whole.window not in self._within:
            self._within[whole.window] = Share(whole, self.rank, self.ranks, self.attention)
        return self._within[whole.window]

    @functools.cached_property
    def without_text(self) -> Share:
        """The share of a layer in which the image tokens stand alone."""
        return Share(self.whole.without_text, self.rank, self.ranks, self.attention) if self.text_tokens else self

    @property
    def block_lists(self) -> list[BlockLists]:
        return [strip.block_lists for strip in self.strips]

    @property
    def tiles(self) -> list[Tiles]:
        return [strip.tiles for strip in self.strips]
