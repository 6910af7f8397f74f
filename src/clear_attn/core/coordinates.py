"""Token coordinates on one or several grids, and the tile order of tokens. Uses NumPy on the CPU only."""

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
        segments: the selected rows; their raster indices count only the selected tokens.
        raster: int64 `[tokens]`, the raster index of each token in the whole grids.
        rank: int64 `[tokens]`, the position in tile order of each raster index of the selected rows.
        y, x: float32 `[tokens]`, the coordinates in tile order.
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


def cell_grid(grid: Grid, factor: int) -> Grid:
    """Return the rows and columns of cells of factor x factor tokens, including cells that the border cuts."""
    return -(-grid[0] // factor), -(-grid[1] // factor)


def tile_permutation(grid: Grid) -> np.ndarray:
    """Return the raster indices in tile order.

    Tiles of 16 x 16 tokens contain tiles of 8 x 16, which contain cells of 8 x 8. Each level is in raster order.
    """
    y, x = raster_coordinates(grid)
    return np.lexsort((x % 8, y % 8, x // 8 % 2, y // 8 % 2, x // 16, y // 16))


def invert_permutation(permutation: np.ndarray) -> np.ndarray:
    """Return the inverse of a permutation of indices."""
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(len(permutation))
    return inverse


def axis_coordinates(length: int, first: int) -> np.ndarray:
    """Return the centers of `length` tokens on an axis of `first` tokens of the first grid, rounded to 1/16."""
    centers = (np.arange(length) + 0.5) * (first / length) - 0.5
    return (np.round(centers * 16) / 16).astype(np.float32)


def joint_slices(text_tokens: int, image_tokens: int, text_first: bool) -> tuple[slice, slice]:
    """Return the positions of text and image in a joint sequence, with the text first or the image first."""
    text = 0 if text_first else image_tokens
    image = text_tokens if text_first else 0
    return slice(text, text + text_tokens), slice(image, image + image_tokens)


def segments_of(grids: Sequence[Grid], unit: Grid | None = None) -> list[Segment]:
    """Return one segment per grid, in coordinates of a grid, by default the first."""
    unit = unit or grids[0]
    starts = itertools.accumulate((height * width for height, width in grids), initial=0)
    return [
        Segment(start, *(axis_coordinates(length, first) for length, first in zip(grid, unit, strict=True)))
        for start, grid in zip(starts, grids, strict=False)
    ]


def select_rows(segments: Sequence[Segment], rows: Sequence[slice]) -> TokenSet:
    """Return the tokens of some rows of each segment. The first tile starts at the first of these rows."""
    selected: list[Segment] = []
    rasters, permutations, start = [], [], 0
    for segment, span in zip(segments, rows, strict=True):
        part = Segment(start, segment.y[span], segment.x)
        permutation = tile_permutation((len(part.y), len(part.x)))
        start += len(permutation)
        selected.append(part)
        permutations.append(part.start + permutation)
        rasters.append(segment.start + span.start * len(part.x) + permutation)
    permutation = np.concatenate(permutations)
    grids = [np.meshgrid(part.y, part.x, indexing="ij") for part in selected]
    y, x = (np.concatenate([each.ravel() for each in axes])[permutation] for axes in zip(*grids, strict=True))
    return TokenSet(selected, np.concatenate(rasters), invert_permutation(permutation), y, x)


def to_tensor(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a tensor on a device."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)
