"""Swin (arXiv 2103.14030): attention in windows that shift from layer to layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from clear_attn.core.coordinates import Grid, raster_coordinates
from clear_attn.methods.groups import GroupedMethod, pairs


@dataclass(frozen=True)
class Swin(GroupedMethod):
    """Square windows that tile the image, shifted by half a side in every second layer.

    An image query attends to text and to its own window. Windows are cut at the border, where Swin joins the rests of
    opposite borders and masks the one from the other, which comes to the same. Its work grows with the tokens. Of what
    keeps a pre-trained model alive it has the same formulation, high rank and intact features; locality too, but not
    for neighbors on two sides of a window's edge.

    Args:
        side (`int`, defaults to 16): of a window, in tokens.

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
        columns = grid[1] + 1  # no fewer than there are, shifted windows included
        return self._window_of(y) * columns + self._window_of(x)

    def flops(self, grid: Grid, text_tokens: int, heads: int, head_dim: int) -> dict[str, int]:
        inner = heads * head_dim
        return {
            "image queries, text keys": 4 * grid[0] * grid[1] * text_tokens * inner,
            "image queries, keys of the window": 4 * self.window_pairs(grid) * inner,
        }

    def window_pairs(self, grid: Grid) -> int:
        """Return the number of pairs of image tokens in one window."""
        return pairs(*(list(Counter(self._window_of(np.arange(n)).tolist()).values()) for n in grid))

    @property
    def shift(self) -> int:
        """How far in tokens a layer's windows start before the image."""
        return 0

    def _window_of(self, axis: np.ndarray) -> np.ndarray:
        """Return the window's number along an axis; where windows are shifted, a cut one comes first."""
        return (axis + self.shift) // self.side


@dataclass(frozen=True)
class _ShiftedSwin(Swin):
    """Of every second layer."""

    @property
    def shift(self) -> int:
        return self.side - self.side // 2
