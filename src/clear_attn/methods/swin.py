"""Swin (arXiv 2103.14030): attention in windows that shift from layer to layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from clear_attn.core.coordinates import raster
from clear_attn.core.layout import Grid, TokenLayout
from clear_attn.methods.base import Method
from clear_attn.methods.groups import GroupedAttnProcessor, make_groups, pairs


@dataclass(frozen=True)
class Swin(Method):
    """Square windows side by side, moved by half a side in every second layer: a query sees text and its own window.

    Windows are cut at the border, where Swin joins the rests of opposite borders and masks the one from the other,
    which comes to the same. Its work grows with the tokens. Of what keeps a pre-trained model alive it has the same
    formulation, high rank and intact features; locality too, but not for neighbours on two sides of a window's edge.

    Args:
        side (`int`, defaults to 16): of a window, in tokens.

    Raises:
        TypeError: side is not a whole number.
        ValueError: side is below 1.
    """

    quadratic = None

    side: int = 16

    def __post_init__(self) -> None:
        self._keep_whole("side", "it is the side of a window in tokens, 8 and 16 are usual")

    def processor(self, attn: Any, layer: str, number: int) -> GroupedAttnProcessor:
        return GroupedAttnProcessor(self, number % 2, layer)

    def prepare(self, layout: TokenLayout) -> Any:
        super().prepare(layout)
        y, x = raster(layout.grids[0])
        columns = layout.grids[0][1] + 1  # no fewer than there are, moved windows included
        return [
            make_groups(layout, self._window_of(y, moved) * columns + self._window_of(x, moved))
            for moved in (False, True)
        ]

    def work(self, grid: Grid, text_tokens: int, heads: int, head_dim: int, number: int) -> dict[str, int]:
        inner = heads * head_dim
        return {
            "image queries, text keys": 4 * grid[0] * grid[1] * text_tokens * inner,
            "image queries, keys of the window": 4 * self.window_pairs(grid, bool(number % 2)) * inner,
        }

    def window_pairs(self, grid: Grid, moved: bool) -> int:
        """Visible pairs of image tokens in a layer whose windows are moved, or are not."""
        return pairs(*(list(Counter(self._window_of(np.arange(n), moved).tolist()).values()) for n in grid))

    def _window_of(self, axis: np.ndarray, moved: bool) -> np.ndarray:
        """The window's number along an axis; moved ones begin at half a side, and a cut one before them."""
        return (axis + (self.side - self.side // 2 if moved else 0)) // self.side
