"""Square tiles of queries, each with the keys that at least one of its queries attends to."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clear_attn.core.coordinates import Segment, TokenSet
from clear_attn.core.window_mask import Coordinates, window_mask


def tile_side(window: float, device: torch.device) -> int:
    """Return the side of a tile in tokens: small tiles compute fewer masked pairs, large ones copy fewer keys.

    On a CPU 8 is the fastest for windows up to 16, and 16 for larger windows. Other devices are not measured.
    """
    return 8 if device.type == "cpu" and window <= 16 else 16


class TileGroup(NamedTuple):
    """Tiles that are translations of each other and therefore share one mask.

    Attributes:
        queries: int64 `[tiles, q]`, positions of the queries among the image tokens in tile order.
        keys: int64 `[tiles, k]`, positions of the keys that at least one query of the tile attends to.
        mask: bool `[q, k]`, the rule for every tile.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor


class Tiles(NamedTuple):
    """All tiles of a layout, in five tensors for any number of groups, so that one compiled graph serves all.

    Attributes:
        queries, keys, mask: the tensors of all groups, flattened and joined.
        sizes: int64 `[groups, 3]` on the CPU: the number of tiles, queries and keys of each group.
        image_keys: int64 `[]` on the CPU: the number of all image keys.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor
    sizes: Tensor
    image_keys: Tensor

    @classmethod
    def join(cls, groups: Sequence[TileGroup], image_keys: int) -> Tiles:
        """Flatten and join groups of tiles."""
        sizes = [(*group.queries.shape, group.keys.shape[1]) for group in groups]
        queries, keys, mask = (torch.cat([part.flatten() for part in parts]) for parts in zip(*groups, strict=True))
        return cls(queries, keys, mask, *(torch.tensor(each, device="cpu") for each in (sizes, image_keys)))

    def groups(self) -> list[TileGroup]:
        """Return the groups that `join` flattened, as views."""
        sizes = self.sizes.tolist()
        parts = [
            [part.view(shape) for part, shape in zip(joined.split([a * b for a, b in shapes]), shapes, strict=True)]
            for joined, shapes in (
                (self.queries, [(tiles, q) for tiles, q, _ in sizes]),
                (self.keys, [(tiles, k) for tiles, _, k in sizes]),
                (self.mask, [(q, k) for _, q, k in sizes]),
            )
        ]
        return [TileGroup(*group) for group in zip(*parts, strict=True)]


class Span(NamedTuple):
    """A tile's extent along one axis: its queries, and the keys of each segment within their window."""

    queries: slice
    keys: tuple[slice, ...]


def spans_by_pattern(
    query: np.ndarray, keys: Sequence[np.ndarray], window: float, side: int, cell: int = 1
) -> Iterable[list[Span]]:
    """Return the spans along one axis, grouped by their coordinates relative to the first query.

    Args:
        query, keys: the coordinates of queries, and of keys in each segment, along the axis.
        window: the radius.
        side: the number of queries in a span.
        cell: the side of cells of keys; the keys of a group's spans start at the same offset in a cell.
    """
    by_pattern: dict[bytes, list[Span]] = defaultdict(list)
    for first in range(0, len(query), side):
        inside = slice(first, min(first + side, len(query)))
        low, high = query[inside][0] - window, query[inside][-1] + window
        near = [slice(np.searchsorted(key, low, "right"), np.searchsorted(key, high, "left")) for key in keys]
        relative = [query[inside], *(key[span] for key, span in zip(keys, near, strict=True))]
        pattern = b"|".join((part - query[first]).tobytes() for part in relative)
        pattern += bytes(int(span.start) % cell for span in near)
        by_pattern[pattern].append(Span(inside, tuple(near)))
    return by_pattern.values()


def _raster_indices(segment: Segment, rows: Sequence[slice], columns: Sequence[slice]) -> np.ndarray:
    """Return the raster indices `[rows x columns, tokens]` of equally large boxes, one per pair of row and column."""

    def indices(spans: Sequence[slice]) -> np.ndarray:
        return np.stack([np.arange(span.start, span.stop) for span in spans])

    y, x = indices(rows)[:, None, :, None], indices(columns)[None, :, None, :]
    boxes = segment.start + y * len(segment.x) + x
    return boxes.reshape(len(rows) * len(columns), -1)


def build_tiles(queries: TokenSet, keys: TokenSet, window: float, device: torch.device) -> Tiles:
    """Split all segments of the queries into tiles.

    Args:
        queries, keys: the image tokens. Coordinates are float32 multiples of 1/16, so that differences are exact and
            equal patterns compare equal.
        window: the radius in tokens of the first grid.
        device: the device of the tiles.
    """
    radius_sq = torch.tensor(float(window) ** 2, device="cpu")
    side = tile_side(window, device)
    groups = []
    for segment in queries.segments:
        all_rows = spans_by_pattern(segment.y, [other.y for other in keys.segments], window, side)
        all_columns = spans_by_pattern(segment.x, [other.x for other in keys.segments], window, side)
        for rows, columns in itertools.product(all_rows, all_columns):
            query = queries.rank[
                _raster_indices(segment, [span.queries for span in rows], [span.queries for span in columns])
            ]
            boxes = [
                _raster_indices(other, [span.keys[i] for span in rows], [span.keys[i] for span in columns])
                for i, other in enumerate(keys.segments)
            ]
            key = keys.rank[np.concatenate(boxes, axis=1)]
            first_query, first_key = (
                Coordinates(*(torch.from_numpy(axis[index[0]]) for axis in (tokens.y, tokens.x)))
                for tokens, index in ((queries, query), (keys, key))
            )
            mask = window_mask(first_query, first_key, radius_sq)
            attended = mask.any(dim=0)
            parts = torch.from_numpy(query), torch.from_numpy(key[:, attended.numpy()]), mask[:, attended]
            groups.append(TileGroup(*(part.to(device) for part in parts)))
    return Tiles.join(groups, len(keys.y))
