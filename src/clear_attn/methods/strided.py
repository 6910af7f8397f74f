"""Strided attention from sparse transformers (arXiv 1904.10509): every n-th token in both directions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clear_attn.core.coordinates import Grid, raster_coordinates
from clear_attn.methods.groups import GroupedMethod, pairs


@dataclass(frozen=True)
class Strided(GroupedMethod):
    """Attend to text and to the image tokens that are a multiple of the stride away in both directions.

    Its work grows with the square of the tokens, 1 / stride^2 of dense attention's. Of the four properties that CLEAR's
    paper asks for, it keeps the formulation, high rank and intact features. It has no locality: a query attends to none
    of its neighbors.

    Args:
        stride (`int`, defaults to 4): the distance in tokens; 1 is dense attention.

    Raises:
        TypeError: stride is not a whole number.
        ValueError: stride is below 1.
    """

    quadratic = "attention to every n-th key, and the lists of these keys"

    stride: int = 4

    def __post_init__(self) -> None:
        self._validate_whole("stride", "it is a distance in tokens, 1 attends to every token")

    def labels(self, grid: Grid) -> np.ndarray:
        y, x = raster_coordinates(grid)
        return y % self.stride * self.stride + x % self.stride

    def flops(self, grid: Grid, text_tokens: int, heads: int, head_dim: int) -> dict[str, int]:
        inner = heads * head_dim
        attended = pairs(*([len(range(first, n, self.stride)) for first in range(min(n, self.stride))] for n in grid))
        return {
            "image queries, text keys": 4 * grid[0] * grid[1] * text_tokens * inner,
            "image queries, every n-th key": 4 * attended * inner,
        }
