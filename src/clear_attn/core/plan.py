"""Plans: the index tensors of a method on a layout, made once per layout and shared by all layers and steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from clear_attn.core.coordinates import Grid, cell_grid, invert_permutation, raster_coordinates, to_tensor
from clear_attn.core.layout import TokenLayout
from clear_attn.core.region import AttentionRegion


class Layout(Protocol):
    """The part of a layout that a plan reads: a `TokenLayout`, or one rank's shard of it."""

    @property
    def text_tokens(self) -> int: ...

    @property
    def image_tokens(self) -> int: ...

    @property
    def text(self) -> slice: ...

    @property
    def image(self) -> slice: ...

    @property
    def text_keys(self) -> slice: ...

    @property
    def image_keys(self) -> slice: ...

    @property
    def device(self) -> torch.device: ...


class Plan:
    """The positions of text and image in a layout; the base class of plans.

    Args:
        layout: the layout of the call.

    Attributes:
        text_tokens, image_tokens (`int`): the numbers of text keys and of image keys.
        text_keys, image_keys (`slice`): the positions of text and image in key and value.
        text, image (`slice`): their positions in query and output.
        text_queries (`int`): the number of text queries: all text tokens, or none.
        tokens (`int`): the number of all queries.
    """

    def __init__(self, layout: Layout) -> None:
        self.text_tokens, self.image_tokens = layout.text_tokens, layout.image_tokens
        self.text_keys, self.image_keys = layout.text_keys, layout.image_keys
        self.text, self.image, self.device = layout.text, layout.image, layout.device
        self.text_queries = self.text.stop - self.text.start
        self.tokens = self.text_queries + self.image_tokens

    def prepare(self, backend: str) -> None:
        """Build the index tensors of a backend now, because compiled layers cannot."""


class GridPlan(Plan):
    """A plan with the grid, for methods that use convolutions or pooling.

    Attributes:
        grid: (height, width) in tokens.
        permutation, inverse_permutation: see `TokenLayout`.
    """

    def __init__(self, layout: TokenLayout) -> None:
        super().__init__(layout)
        (self.grid,) = layout.grids
        self.permutation, self.inverse_permutation = layout.permutation, layout.inverse_permutation


class WindowPlan(AttentionRegion, Plan):
    """The plan of CLEAR: the window, and the cells of the pooled keys, which are the last keys.

    Args:
        layout: the layout of the call.
        window: the radius in tokens of the first grid.
        down_factor: the side of pooled cells in tokens; 1 for no pooling.

    Attributes:
        pooled_tokens (`int`): the number of pooled keys.
        pool_index: int64 `[pooled tokens, down_factor^2]`, the positions in tile order of each cell's image tokens.
        pool_weight: float32 `[pooled tokens, down_factor^2]`, their weights without the learned factor.
    """

    def __init__(self, layout: TokenLayout, window: float, down_factor: int = 1) -> None:
        Plan.__init__(self, layout)
        self.window, self.down_factor = window, down_factor
        cells, weights = pooled_cells(layout.grids, down_factor)
        rank = invert_permutation(layout.token_set.raster)
        with torch.inference_mode(False):
            self.pool_index = to_tensor(rank[cells], layout.device)
            self.pool_weight = to_tensor(weights, layout.device)
        self.pooled_tokens = len(cells)
        before = layout.image_keys.start
        super().__init__(
            queries=layout.token_set,
            keys=layout.token_set,
            before=before,
            after=layout.text_tokens - before + self.pooled_tokens,
            tokens=self.tokens,
            image=self.image,
            window=window,
            device=layout.device,
        )


def _cells_of(grid: Grid, factor: int) -> tuple[np.ndarray, np.ndarray]:
    height, width = grid if factor > 1 else (0, 0)  # factor 1 has no cells
    corner_y, corner_x = raster_coordinates(cell_grid((height, width), factor))
    inner_y, inner_x = raster_coordinates((factor, factor))
    y, x = corner_y[:, None] * factor + inner_y, corner_x[:, None] * factor + inner_x
    inside = (y < height) & (x < width)
    weight = inside * (factor**2 / inside.sum(axis=1, keepdims=True))
    return np.where(inside, y * width + x, 0), weight.astype(np.float32)


def pooled_count(grid: Grid, factor: int) -> int:
    """Return the number of pooled cells of a grid; none for factor 1."""
    rows, columns = cell_grid(grid, factor)
    return rows * columns if factor > 1 else 0


def pooled_cells(grids: Sequence[Grid], factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the raster indices and the weights of each cell's tokens, both `[cells, factor^2]`.

    The weight is 0 outside the grid and factor^2 / (tokens of the cell) inside, so that a cell that the border cuts is
    still a weighted mean.
    """
    parts, start = [], 0
    for grid in grids:
        index, weight = _cells_of(grid, factor)
        parts.append((start + index, weight))
        start += grid[0] * grid[1]
    cells, weights = (np.concatenate(each) for each in zip(*parts, strict=True))
    return cells, weights
