"""Rows of grids with their coordinates, and their tokens in tile order. Numbers on the CPU only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Grid = tuple[int, int]


class Axes(NamedTuple):
    """One segment: its first token's raster index, and the coordinates of its rows and columns."""

    start: int
    y: np.ndarray
    x: np.ndarray


class Placed(NamedTuple):
    """Some rows of each segment, their tokens in tile order.

    Attributes:
        axes: of these rows, the raster indices counting their tokens alone.
        raster: int64 `[tokens]`, each token's raster index among all tokens of the whole grids.
        rank: int64 `[tokens]`, the position in tile order of each raster index of these rows.
        y, x: float32 `[tokens]`, coordinates.
    """

    axes: list[Axes]
    raster: np.ndarray
    rank: np.ndarray
    y: np.ndarray
    x: np.ndarray


def raster(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each token of a grid in raster order."""
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return y, x


def tile_order_of(grid: Grid) -> np.ndarray:
    """Raster indices in tile order: 8 x 8 cells inside 8 x 16 inside 16 x 16, raster among and within them."""
    y, x = raster(grid)
    return np.lexsort((x % 8, y % 8, x // 8 % 2, y // 8 % 2, x // 16, y // 16))


def axis_coordinates(length: int, first: int) -> np.ndarray:
    """Centres of `length` tokens along an axis on which the first grid has `first`, to a sixteenth of a token."""
    centres = (np.arange(length) + 0.5) * (first / length) - 0.5
    return (np.round(centres * 16) / 16).astype(np.float32)


def axes_of(grids: Sequence[Grid]) -> list[Axes]:
    """The axes of whole grids, one after the other, in tokens of the first."""
    starts = itertools.accumulate((height * width for height, width in grids), initial=0)
    return [
        Axes(start, *(axis_coordinates(length, first) for length, first in zip(grid, grids[0], strict=True)))
        for start, grid in zip(starts, grids, strict=False)
    ]


def inverse_of(order: np.ndarray) -> np.ndarray:
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse


def place(whole: Sequence[Axes], rows: Sequence[slice]) -> Placed:
    """Puts the tokens of some rows of each segment into tile order, which begins anew at the first of them."""
    axes: list[Axes] = []
    rasters, orders, start = [], [], 0
    for segment, span in zip(whole, rows, strict=True):
        part = Axes(start, segment.y[span], segment.x)
        order = tile_order_of((len(part.y), len(part.x)))
        start += len(order)
        axes.append(part)
        orders.append(part.start + order)
        rasters.append(segment.start + span.start * len(part.x) + order)
    order = np.concatenate(orders)
    grids = [np.meshgrid(part.y, part.x, indexing="ij") for part in axes]
    y, x = (np.concatenate([each.ravel() for each in lines])[order] for lines in zip(*grids, strict=True))
    return Placed(axes, np.concatenate(rasters), inverse_of(order), y, x)
