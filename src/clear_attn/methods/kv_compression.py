"""KV compression from PixArt-Sigma (arXiv 2403.04692): a learned convolution pools the image's keys and values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clear_attn.backends.softmax import softmax_attention
from clear_attn.core.coordinates import Grid, cell_grid
from clear_attn.core.plan import GridPlan
from clear_attn.methods.image_grid import GridMethod, from_channels, to_channels
from clear_attn.methods.method import Layer, Options


@dataclass(frozen=True)
class KVCompression(GridMethod):
    """Attend to text and to one key and value per cell of tokens, weighted sums over the cell.

    Unlike PixArt-Sigma, keys and values have separate weights, without bias or norm after them. Distillation therefore
    starts from plain means.

    Its work grows with the square of the tokens, 1 / factor^2 of dense attention's. Of the four properties that CLEAR's
    paper asks for, it keeps the formulation. It keeps locality and high rank only down to a cell, and does not keep
    features intact, because keys and values are mixed.

    Args:
        factor (`int`, defaults to 4): the side of a cell in tokens. The sum over a cell that the border cuts is
            multiplied by factor^2 / (the number of its tokens).

    Raises:
        TypeError: factor is not a whole number.
        ValueError: factor is below 1.
    """

    quadratic = "attention to the compressed keys"

    factor: int = 4

    def __post_init__(self) -> None:
        self._validate_whole("factor", "it is the side of a cell in tokens, 2 and 4 are usual")

    def parameters_for(self, layer: Layer) -> dict[str, Tensor]:
        """Return `key_kernel` and `value_kernel`, `[channels, 1, factor, factor]`, which start as plain means.

        Keys are compressed after norm and rotary embedding.
        """
        shape, mean = (layer.channels, 1, self.factor, self.factor), 1 / self.factor**2
        return {name: torch.full(shape, mean) for name in ("key_kernel", "value_kernel")}

    def flops(self, grid: Grid, text_tokens: int, heads: int, head_dim: int) -> dict[str, int]:
        image, inner = grid[0] * grid[1], heads * head_dim
        cells = math.prod(cell_grid(grid, self.factor))
        return {
            "keys and values compressed": 2 * 2 * image * inner,
            "image queries, text keys": 4 * image * text_tokens * inner,
            "image queries, compressed keys": 4 * image * cells * inner,
        }

    def attend_image(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Any, parameters: Sequence[Tensor], options: Options
    ) -> Tensor:
        key, value = (
            torch.cat([x[:, :, plan.text_keys], compress(x[:, :, plan.image_keys], plan, kernel)], dim=2)
            for x, kernel in zip((key, value), parameters, strict=True)
        )
        bias = options.bias.before(key.shape[2]) if options.bias else None
        return softmax_attention(query, key, value, None, options.scale, False, bias)[0]


def compress(image: Tensor, plan: GridPlan, kernel: Tensor) -> Tensor:
    """Return weighted sums over cells, `[batch, heads, cells, head_dim]`.

    Args:
        image: `[batch, heads, tokens, head_dim]` in tile order.
        plan: the plan of the image's grid.
        kernel: the weights in a cell, `[heads x head_dim, 1, factor, factor]`.
    """
    factor, (height, width) = kernel.shape[-1], plan.grid
    rest = (0, -width % factor, 0, -height % factor)
    channels = to_channels(image, plan)
    sums = F.conv2d(
        F.pad(channels, rest), kernel.to(channels.device, channels.dtype), stride=factor, groups=len(kernel)
    )
    inside = F.pad(torch.ones(1, height, width, device=channels.device), rest)
    tokens = F.avg_pool2d(inside, factor, divisor_override=1)
    return from_channels(sums / tokens * factor**2, image.shape[1]).to(image.dtype)
