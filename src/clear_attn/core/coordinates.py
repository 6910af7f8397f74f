"""Token coordinates on one or several grids, and the tile order of tokens. NumPy on the CPU only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Grid = tuple[int, int]


class Segment(NamedTuple):
    """One grid of the sequence: the raster index of its first token, and the coordinates of its rows and columns."""

    start: int
    y: np.ndarray
    x: np.ndarray


class TokenSet(NamedTuple):
    """The tokens of some rows of each segment, in tile order.

    Attributes:
        segments: these rows; their raster indices count these tokens alone.
        raster: int64 `[tokens]`, the raster index of each token among all tokens of the whole grids.
        rank: int64 `[tokens]`, the position in tile order of each raster index of these rows.
        y, x: float32 `[tokens]`, coordinates.
    """

    segments: list[Segment]
    raster: np.ndarray
    rank: np.ndarray
    y: np.ndarray
    x: np.ndarray


def raster_coordinates(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and column of each token of a grid, in raster order."""
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return y, x


def tile_permutation(grid: Grid) -> np.ndarray:
    """Return raster indices in tile order: 8 x 8 cells inside 8 x 16 inside 16 x 16, raster among and within them."""
    y, x = raster_coordinates(grid)
    return np.lexsort((x % 8, y % 8, x // 8 % 2, y // 8 % 2, x // 16, y // 16))


def invert_permutation(permutation: np.ndarray) -> np.ndarray:
    """Return the inverse of a permutation of indices."""
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(len(permutation))
    return inverse


def axis_coordinates(length: int, first: int) -> np.ndarray:
    """Return the centers of `length` tokens on an axis where the first grid has `first`, to a sixteenth of a token."""
    centers = (np.arange(length) + 0.5) * (first / length) - 0.5
    return (np.round(centers * 16) / 16).astype(np.float32)


def segments_of(grids: Sequence[Grid]) -> list[Segment]:
    """Return one segment per grid, in coordinates of the first grid."""
    starts = itertools.accumulate((height * width for height, width in grids), initial=0)
    return [
        Segment(start, *(axis_coordinates(length, first) for length, first in zip(grid, grids[0], strict=True)))
        for start, grid in zip(starts, grids, strict=False)
    ]


def select_rows(segments: Sequence[Segment], rows: Sequence[slice]) -> TokenSet:
    """Return the tokens of some rows of each segment. Their tile order starts at the first of these rows."""
    selected: list[Segment] = []
    rasters, orders, start = [], [], 0
    for segment, span in zip(segments, rows, strict=True):
        part = Segment(start, segment.y[span], segment.x)
        order = tile_permutation((len(part.y), len(part.x)))
        start += len(order)
        selected.append(part)
        orders.append(part.start + order)
        rasters.append(segment.start + span.start * len(part.x) + order)
    order = np.concatenate(orders)
    grids = [np.meshgrid(part.y, part.x, indexing="ij") for part in selected]
    y, x = (np.concatenate([each.ravel() for each in lines])[order] for lines in zip(*grids, strict=True))
    return TokenSet(selected, np.concatenate(rasters), invert_permutation(order), y, x)


def to_tensor(values: np.ndarray, device: torch.device) -> Tensor:
    """Return a tensor of an array's values on a device."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)
