"""Strided attention, of sparse transformers (arXiv 1904.10509): every n-th token in both directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clear_attn.core.coordinates import raster
from clear_attn.core.layout import Grid, TokenLayout
from clear_attn.methods.base import Method
from clear_attn.methods.groups import GroupedAttnProcessor, make_groups, pairs


@dataclass(frozen=True)
class Strided(Method):
    """A query sees text and the tokens that are a multiple of the stride away from it, in both directions.

    Its work grows with the square of the tokens, 1 / stride^2 of dense attention's. Of what keeps a pre-trained model
    alive it has the same formulation, high rank and intact features; it has no locality, for of the neighbours of a
    query it sees none.

    Args:
        stride (`int`, defaults to 4): in tokens; 1 is dense attention.

    Raises:
        TypeError: stride is not a whole number.
        ValueError: stride is below 1.
    """

    quadratic = "attention to every n-th key, and the lists of these"

    stride: int = 4

    def __post_init__(self) -> None:
        self._keep_whole("stride", "it is a distance in tokens, 1 sees every token")

    def processor(self, attn: Any, layer: str, number: int) -> GroupedAttnProcessor:
        return GroupedAttnProcessor(self, layer=layer)

    def prepare(self, layout: TokenLayout) -> Any:
        super().prepare(layout)
        y, x = raster(layout.grids[0])
        return [make_groups(layout, y % self.stride * self.stride + x % self.stride)]

    def work(self, grid: Grid, text_tokens: int, heads: int, head_dim: int, number: int) -> dict[str, int]:
        inner = heads * head_dim
        seen = pairs(*([len(range(first, n, self.stride)) for first in range(min(n, self.stride))] for n in grid))
        return {
            "image queries, text keys": 4 * grid[0] * grid[1] * text_tokens * inner,
            "image queries, every n-th key": 4 * seen * inner,
        }
