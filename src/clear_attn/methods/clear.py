"""CLEAR (arXiv 2412.16112): a circular window, and optionally pooled keys of the whole image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clear_attn.backends.attention import clear_attention, pool
from clear_attn.backends.selection import BACKENDS
from clear_attn.core.coordinates import Grid
from clear_attn.core.layout import TokenLayout
from clear_attn.core.plan import WindowPlan, pooled_count
from clear_attn.methods.method import Layer, Method, Options, proportional_scale

# The pooling parameter, named as in the published checkpoints.
SPATIAL_WEIGHT = "spatial_weight"


@dataclass(frozen=True)
class Clear(Method):
    """Attend to text and to the image keys with dy^2 + dx^2 < window^2 (arXiv 2412.16112).

    Args:
        window (`int`, defaults to 16): the radius r in tokens. One token is 16 x 16 pixels, 8 x 8 in the small FLUX.
        down_factor (`int`, defaults to 1): the side f of pooled cells in tokens; 1 for no pooling. Every image query
            also attends to the weighted mean key and value of each cell. Each layer learns the weights,
            `spatial_weight`, `(1, 1, 1, f, 1, f, 1)`.

    Raises:
        TypeError: a value is not a whole number.
        ValueError: a value is below 1.

    Examples:
        >>> Clear(window=8).plan(TokenLayout([(16, 24)], text_tokens=7)).key_tokens
        391
    """

    uses_backends = True
    supports_segments = True

    window: int = 16
    down_factor: int = 1

    def __post_init__(self) -> None:
        self._validate_whole("window", "it is a radius in tokens, 8, 16 and 32 are usual")
        self._validate_whole("down_factor", "it is the side of a pooled cell in tokens, 1 is none")

    @property
    def quadratic(self) -> str | None:  # type: ignore[override]
        return "attention to the pooled keys" if self.down_factor > 1 else None

    def with_window(self, window: int) -> Clear:
        return Clear(window, self.down_factor)

    def with_settings(self, window: int | None, down_factor: int | None) -> Clear:
        return Clear(
            self.window if window is None else window, self.down_factor if down_factor is None else down_factor
        )

    @property
    def pooled_factor(self) -> int:
        return self.down_factor

    @property
    def title(self) -> str:
        return "CLEAR"

    def purpose(self, model: str) -> str:
        f = self.down_factor
        pooled = f", and means over cells of {f} x {f} tokens" if f > 1 else ""
        return f"""that make the image attention of {model} local: an image token attends to the text
and the image tokens at a distance below {self.window} tokens{pooled}.
The method is CLEAR ([arXiv 2412.16112](https://arxiv.org/abs/2412.16112))."""

    def as_arguments(self) -> str:
        return f"window={self.window}, down_factor={self.down_factor}"

    def plan(self, layout: TokenLayout) -> ClearPlan:
        return ClearPlan(layout, self.window, self.down_factor)

    def parameters_for(self, layer: Layer) -> dict[str, Tensor]:
        f = self.down_factor
        return {SPATIAL_WEIGHT: torch.full((1, 1, 1, f, 1, f, 1), 1 / f**2)} if f > 1 else {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Any, parameters: Sequence[Tensor], options: Options
    ) -> Tensor:
        pooled = None
        if self.down_factor > 1:
            (weight,) = parameters
            pooled = pool(key[:, :, plan.image_keys], plan, weight), pool(value[:, :, plan.image_keys], plan, weight)
        output: Tensor = plan.attend(query, key, value, pooled, options)
        return output

    def flops(self, grid: Grid, text_tokens: int, heads: int, head_dim: int) -> dict[str, int]:
        image = grid[0] * grid[1]
        pairs = {
            "image queries, text keys": image * text_tokens,
            "image queries, image keys": window_pairs(grid, self.window),
            "image queries, pooled keys": image * pooled_count(grid, self.down_factor),
        }
        return {kind: 4 * number * heads * head_dim for kind, number in pairs.items()}

    def covers(self, grid: Grid) -> bool:
        return (grid[0] - 1) ** 2 + (grid[1] - 1) ** 2 < self.window**2

    def halo(self) -> float:
        return self.window

    def scale_multiplier(self, tokens: int) -> float:
        """Return the published multiplier, which counts tokens ten times with pooled keys."""
        return proportional_scale(tokens * (10 if self.down_factor > 1 else 1))


class ClearPlan(WindowPlan):
    """The plan of CLEAR on a single process."""

    def prepare(self, backend: str) -> None:
        """Build the index tensors of a backend now, because compiled layers cannot."""
        BACKENDS[backend].prepare(self)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, pooled: tuple[Tensor, Tensor] | None, options: Options
    ) -> Tensor:
        """Return the attention of all queries, `[batch, heads, tokens, head_dim]`."""
        bias = options.bias
        output: Tensor = clear_attention(
            query,
            key,
            value,
            self,
            pooled=pooled,
            key_bias=F.pad(bias.keys, (0, self.pooled_tokens)) if bias else None,
            text_bias=bias.text_queries if bias else None,
            backend=options.backend,
            scale=options.scale,
            text_attention=options.dense,
        )
        return output


def window_pairs(grid: Grid, window: int) -> int:
    """Return the number of (query, key) pairs with dy^2 + dx^2 < window^2 in an image.

    Each offset (dy, dx) of the disc occurs (height - |dy|) (width - |dx|) times.
    """
    height, width = grid
    total = 0
    for dy in range(-min(window, height) + 1, min(window, height)):
        most = min(math.isqrt(window**2 - dy**2 - 1), width - 1)  # the largest |dx| with dy^2 + dx^2 < window^2
        total += (height - abs(dy)) * (width * (2 * most + 1) - most * (most + 1))
    return total
