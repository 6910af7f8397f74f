"""The keys that the fused kernels visit for each tile of queries: index lists, and a bit per pair of query and key.

A tile has up to 128 queries and two lists of keys. One has the starts of blocks of 64 consecutive keys to which every
query of the tile attends. The other has single keys in steps of 64, with a bit for each pair of query and key. Tiles
that are translations of each other share their bits, because a translation keeps the order of the keys.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clear_attn.core.coordinates import Segment, TokenSet, raster_coordinates, to_tensor
from clear_attn.core.tiles import Span, spans_by_pattern
from clear_attn.core.window_mask import Coordinates, window_mask
from clear_attn.utils._torch import maybe_mark_dynamic

# The queries of a tile, and the keys of a block or step. In tile order, the tokens of an 8 x 16 tile or an 8 x 8 cell
# are consecutive, even if the border cuts it.
TILE_ROWS, TILE_SIDES = 128, (8, 16)
BLOCK_KEYS, CELL_SIDE = 64, 8
# The number of columns of `KeyLists.tiles`.
TILE_FIELDS = 7


class KeyLists(NamedTuple):
    """The lists of all tiles. Positions count in the sequence of all queries, or of all keys.

    Attributes:
        rows: int32 `[tiles, 128]`, the position of each query; -1 where a tile has fewer.
        tiles: int32 `[tiles, 7]`: the first entry in `blocks`, the numbers of image blocks and of all blocks; the first
            step in `keys`, the numbers of image steps and of all steps; the first step in `bits`. Shared keys come
            after image keys.
        blocks: int32 `[entries]`, the position of the first key of each block.
        keys: int32 `[steps, 64]`, the positions of single keys.
        bits: int16 `[steps, 128, 4]`: bit 2 j + e of word q is 1 if the query attends to key 8 j + 2 q + e of the
            step. GPU threads hold the results of a matrix product in the same layout.
    """

    rows: Tensor
    tiles: Tensor
    blocks: Tensor
    keys: Tensor
    bits: Tensor


class SharedKeys(NamedTuple):
    """The keys to which all queries attend: text and pooled keys, before and after the image keys.

    Attributes:
        before, image, after: the number of shared keys before the image keys, of image keys, of shared keys after.
    """

    before: int
    image: int
    after: int

    @property
    def blocks(self) -> np.ndarray:
        """The first key of each whole block of shared keys."""
        whole = [number - number % BLOCK_KEYS for number in (self.before, self.after)]
        starts = self.before + self.image
        return np.concatenate([np.arange(0, whole[0], BLOCK_KEYS), starts + np.arange(0, whole[1], BLOCK_KEYS)])

    @property
    def rest(self) -> np.ndarray:
        """The shared keys outside these blocks."""
        first = self.before - self.before % BLOCK_KEYS
        total = self.before + self.image + self.after
        return np.concatenate([np.arange(first, self.before), np.arange(total - self.after % BLOCK_KEYS, total)])


class _Group(NamedTuple):
    """Tiles that share their bits: rows `[tiles, q]`, blocks `[lists, b]`, keys `[lists, k]`, mask `[q, k]`.

    There is a list for each tile, or one for all. Image blocks and steps come first.
    """

    rows: np.ndarray
    blocks: np.ndarray
    keys: np.ndarray
    mask: np.ndarray
    image_blocks: int = 0
    image_steps: int = 0


def window_lists(
    queries: TokenSet, keys: TokenSet, window: float, first_query: int, shared: SharedKeys, device: torch.device
) -> KeyLists:
    """Return the key lists of the window.

    Args:
        queries, keys: the image tokens of the queries and of the keys.
        window: the radius in tokens of the first grid.
        first_query: the position of the first image token in the sequence of queries.
        shared: the keys before and after the image keys.
        device: the device of the lists.
    """
    groups = []
    for segment in queries.segments:
        spans = [
            spans_by_pattern(axis, others, window, side, CELL_SIDE)
            for axis, others, side in (
                (segment.y, [other.y for other in keys.segments], TILE_SIDES[0]),
                (segment.x, [other.x for other in keys.segments], TILE_SIDES[1]),
            )
        ]
        for rows, columns in itertools.product(*spans):
            groups.append(_window_group(queries, keys, segment, rows, columns, window, first_query, shared.before))
    return _join([_append_shared(group, shared) for group in groups], device)


def partition_lists(label: np.ndarray, first_query: int, shared: SharedKeys, device: torch.device) -> KeyLists:
    """Return the key lists of queries that attend to the keys with their own label.

    Args:
        label: integers `[image tokens]`, in the order of the sequence.
        first_query, shared, device: see `window_lists`.
    """
    order = np.argsort(label, kind="stable")
    _, sizes = np.unique(label, return_counts=True)
    parts = []
    for members in np.split(order, np.cumsum(sizes)[:-1]):
        blocks, keys = _split_runs(members)
        padded = np.full(-(-len(members) // TILE_ROWS) * TILE_ROWS, -1)
        padded[: len(members)] = members + first_query
        rows = padded.reshape(-1, TILE_ROWS)
        mask = np.ones((TILE_ROWS, len(keys)), bool)
        group = _Group(rows, (shared.before + blocks)[None], (shared.before + keys)[None], mask)
        parts.append(_append_shared(group, shared))
    return _join(parts, device)


def _split_runs(members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the starts of blocks of 64 consecutive numbers in an ascending array, and the numbers outside them."""
    run_starts = np.flatnonzero(np.diff(members, prepend=-2) != 1)
    lengths = np.diff(np.append(run_starts, len(members)))
    within = np.arange(len(members)) - np.repeat(run_starts, lengths)
    whole = within < np.repeat(lengths - lengths % BLOCK_KEYS, lengths)
    return members[whole & (within % BLOCK_KEYS == 0)], members[~whole]


def _window_group(
    queries: TokenSet,
    keys: TokenSet,
    segment: Segment,
    rows: Sequence[Span],
    columns: Sequence[Span],
    window: float,
    first_query: int,
    first_key: int,
) -> _Group:
    """Return the tiles at all pairs of these rows and columns, which are translations of each other."""
    y, x = _box(rows[0].queries, columns[0].queries)
    query = queries.rank[_positions(segment, [r.queries for r in rows], [c.queries for c in columns], y, x)]
    blocks, singles, masks = [], [], []
    radius_sq = torch.tensor(float(window) ** 2, device="cpu")
    query_coordinates = Coordinates(*(torch.from_numpy(axis[query[0]]) for axis in (queries.y, queries.x)))
    for number, other in enumerate(keys.segments):
        key_rows, key_columns = [r.keys[number] for r in rows], [c.keys[number] for c in columns]
        y, x = _box(key_rows[0], key_columns[0])
        y_in_grid, x_in_grid = key_rows[0].start + y, key_columns[0].start + x
        key_coordinates = Coordinates(torch.from_numpy(other.y[y_in_grid]), torch.from_numpy(other.x[x_in_grid]))
        mask = window_mask(query_coordinates, key_coordinates, radius_sq).numpy()
        cell = y_in_grid // CELL_SIDE * len(other.x) + x_in_grid // CELL_SIDE
        order = np.lexsort((x, y, cell))
        y, x, cell, mask = y[order], x[order], cell[order], mask[:, order]
        cells, cell_index = np.unique(cell, return_inverse=True)
        full = np.bincount(cell_index, weights=mask.all(axis=0), minlength=len(cells)) == BLOCK_KEYS
        single = mask.any(axis=0) & ~full[cell_index]
        first = np.flatnonzero(np.diff(cell_index, prepend=-1) != 0)[full]
        blocks.append(keys.rank[_positions(other, key_rows, key_columns, y[first], x[first])])
        singles.append(keys.rank[_positions(other, key_rows, key_columns, y[single], x[single])])
        masks.append(mask[:, single])
    return _Group(
        first_query + query,
        first_key + np.concatenate(blocks, axis=1),
        first_key + np.concatenate(singles, axis=1),
        np.concatenate(masks, axis=1),
    )


def _box(rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and column of each token of a box, relative to its first token, in raster order."""
    return raster_coordinates((rows.stop - rows.start, columns.stop - columns.start))


def _positions(
    segment: Segment, rows: Sequence[slice], columns: Sequence[slice], y: np.ndarray, x: np.ndarray
) -> np.ndarray:
    """Return raster indices `[rows x columns, n]` of tokens (y, x) in the box at each pair of row and column."""
    first_y = np.array([span.start for span in rows])[:, None, None]
    first_x = np.array([span.start for span in columns])[None, :, None]
    return (segment.start + (first_y + y) * len(segment.x) + first_x + x).reshape(len(rows) * len(columns), len(y))


def _append_shared(group: _Group, shared: SharedKeys) -> _Group:
    """Append the shared keys to a group: whole blocks to its blocks, the rest to its steps."""
    lists = len(group.keys)
    blocks = np.concatenate([group.blocks, np.tile(shared.blocks, (lists, 1))], axis=1)
    own_keys, own_mask = _pad_steps(group.keys, group.mask)
    rest = np.tile(shared.rest, (lists, 1)), np.ones((len(group.mask), len(shared.rest)), bool)
    keys, mask = (np.concatenate(parts, axis=1) for parts in zip((own_keys, own_mask), _pad_steps(*rest), strict=True))
    return _Group(group.rows, blocks, keys, mask, group.blocks.shape[1], own_keys.shape[1] // BLOCK_KEYS)


def _pad_steps(keys: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pad to whole steps with the last key, masked. The tile attends to it, so that padding adds no further NaN."""
    missing = -keys.shape[1] % BLOCK_KEYS
    if not missing:
        return keys, mask
    return np.pad(keys, ((0, 0), (0, missing)), mode="edge"), np.pad(mask, ((0, 0), (0, missing)))


def _pack(mask: np.ndarray) -> np.ndarray:
    """Pack bool `[q, 64 steps]` into int16 `[steps, 128, 4]`, see `KeyLists`."""
    rows = np.pad(mask, ((0, TILE_ROWS - mask.shape[0]), (0, 0)))
    fields = rows.reshape(TILE_ROWS, -1, BLOCK_KEYS // 8, 4, 2).transpose(1, 0, 3, 2, 4)
    words = np.packbits(fields.reshape(*fields.shape[:3], BLOCK_KEYS // 4), axis=-1, bitorder="little")
    return np.ascontiguousarray(words).view("<i2")[..., 0]


def _join(groups: Sequence[_Group], device: torch.device) -> KeyLists:
    """Join the lists of all groups: store equal bits once, and sort the tiles by their queries."""
    tables, rows, first_steps = [], [], {}
    blocks = keys = bits = 0
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    for group in groups:
        tiles, lists = len(group.rows), np.arange(len(group.keys))
        steps, block_count = group.keys.shape[1] // BLOCK_KEYS, group.blocks.shape[1]
        packed = _pack(group.mask)
        pattern = packed.tobytes()
        if pattern not in first_steps:
            first_steps[pattern] = bits
            parts["bits"].append(packed)
            bits += steps
        table = np.empty((tiles, TILE_FIELDS), np.int32)
        table[:, 0], table[:, 1], table[:, 2] = blocks + lists * block_count, group.image_blocks, block_count
        table[:, 3], table[:, 4], table[:, 5] = keys + lists * steps, group.image_steps, steps
        table[:, 6] = first_steps[pattern]
        tables.append(table)
        rows.append(np.pad(group.rows, ((0, 0), (0, TILE_ROWS - group.rows.shape[1])), constant_values=-1))
        parts["blocks"].append(group.blocks.astype(np.int32).ravel())
        parts["keys"].append(group.keys.astype(np.int32).reshape(-1, BLOCK_KEYS))
        blocks, keys = blocks + group.blocks.size, keys + group.keys.size // BLOCK_KEYS
    joined_rows, joined_tables = np.concatenate(rows).astype(np.int32), np.concatenate(tables)
    order = np.argsort(joined_rows[:, 0], kind="stable")
    arrays = [joined_rows[order], joined_tables[order], *(np.concatenate(parts[k]) for k in ("blocks", "keys", "bits"))]
    joined = KeyLists(*(to_tensor(each, device) for each in arrays))
    for tensor in joined:
        maybe_mark_dynamic(tensor, 0)
    return joined
