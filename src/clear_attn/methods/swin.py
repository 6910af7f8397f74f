"""Swin (arXiv 2103.14030): attention in windows that shift from layer to layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from clear_attn.core.coordinates import Grid, raster_coordinates
from clear_attn.methods.groups import GroupedMethod, pairs


@dataclass(frozen=True)
class Swin(GroupedMethod):
    """Attend to text and to the query's own square window; windows shift by half a side in every second layer.

    Windows are cut at the border. The original Swin joins windows of opposite borders and masks them from each other,
    with the same result. The work of this method grows linearly with the tokens. Of the four properties that CLEAR's
    paper asks for, it keeps the formulation, high rank and intact features. It keeps locality except across the edges
    of windows.

    Args:
        side (`int`, defaults to 16): the side of a window in tokens.

    Raises:
        TypeError: side is not a whole number.
        ValueError: side is below 1.
    """

    quadratic = None

    side: int = 16

    def __post_init__(self) -> None:
        self._validate_whole("side", "it is the side of a window in tokens, 8 and 16 are usual")

    def for_layer(self, number: int) -> Swin:
        return _ShiftedSwin(self.side) if number % 2 else self

    def labels(self, grid: Grid) -> np.ndarray:
        y, x = raster_coordinates(grid)
        columns = grid[1] + 1  # at least the number of windows in a row, also when shifted
        return self._window_of(y) * columns + self._window_of(x)

    def flops(self, grid: Grid, text_tokens: int, heads: int, head_dim: int) -> dict[str, int]:
        inner = heads * head_dim
        return {
            "image queries, text keys": 4 * grid[0] * grid[1] * text_tokens * inner,
            "image queries, keys of the window": 4 * self.window_pairs(grid) * inner,
        }

    def window_pairs(self, grid: Grid) -> int:
        """Return the number of pairs of image tokens that share a window."""
        return pairs(*(list(Counter(self._window_of(np.arange(n)).tolist()).values()) for n in grid))

    @property
    def shift(self) -> int:
        """The distance in tokens from the first window's start to the image's."""
        return 0

    def _window_of(self, axis: np.ndarray) -> np.ndarray:
        """Return the number of the window of each position along an axis."""
        return (axis + self.shift) // self.side


@dataclass(frozen=True)
class _ShiftedSwin(Swin):
    """Swin with shifted windows, for every second layer."""

    @property
    def shift(self) -> int:
        return self.side - self.side // 2
