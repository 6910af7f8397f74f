"""KV compression, of PixArt-Sigma (arXiv 2403.04692): keys and values of the image pooled by a learned convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clear_attn.core.layout import Grid, TokenLayout
from clear_attn.methods.base import Method, MethodProcessor
from clear_attn.methods.image_grid import from_picture, to_picture


@dataclass(frozen=True)
class KVCompression(Method):
    """A query sees text, and a key and a value for each cell of tokens: weighted sums over the cell.

    Unlike in PixArt-Sigma, keys and values have weights of their own, and neither bias nor norm follows, so that the
    pre-trained model begins with plain means.

    Its work grows with the square of the tokens, 1 / factor^2 of dense attention's. Of what keeps a pre-trained model
    alive it has the same formulation; locality and high rank only down to a cell; features are not intact, for keys
    and values are mixed.

    Args:
        factor (`int`, defaults to 4): side of a cell in tokens; one that the border cuts is a sum over the tokens it
            has, times factor^2 / (their number).

    Raises:
        TypeError: factor is not a whole number.
        ValueError: factor is below 1.
    """

    quadratic = "attention to the compressed keys"

    factor: int = 4

    def __post_init__(self) -> None:
        self._keep_whole("factor", "it is the side of a cell in tokens, 2 and 4 are usual")

    def processor(self, attn: Any, layer: str, number: int) -> KVCompressionAttnProcessor:
        return KVCompressionAttnProcessor(self, attn.inner_dim, layer)

    def work(self, grid: Grid, text_tokens: int, heads: int, head_dim: int, number: int) -> dict[str, int]:
        image, inner = grid[0] * grid[1], heads * head_dim
        cells = -(-grid[0] // self.factor) * -(-grid[1] // self.factor)
        return {
            "keys and values compressed": 2 * 2 * image * inner,
            "image queries, text keys": 4 * image * text_tokens * inner,
            "image queries, compressed keys": 4 * image * cells * inner,
        }


class KVCompressionAttnProcessor(MethodProcessor):
    """KV compression for one layer.

    Its parameters `key_kernel` and `value_kernel`, `[channels, 1, factor, factor]`, start as plain means. Keys are
    compressed as the layer's queries meet them, after norm and rotary embedding.

    Args:
        method: the settings.
        channels: heads x head_dim of the layer.
        layer: its name, for errors.
    """

    method: KVCompression

    def __init__(self, method: KVCompression, channels: int, layer: str = "") -> None:
        super().__init__(method, layer)
        shape, mean = (channels, 1, method.factor, method.factor), 1 / method.factor**2
        self.key_kernel = nn.Parameter(torch.full(shape, mean))
        self.value_kernel = nn.Parameter(torch.full(shape, mean))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, scale: float) -> Tensor:
        key, value = (
            torch.cat([x[:, :, layout.text], compress(x[:, :, layout.image], layout, kernel)], dim=2)
            for x, kernel in ((key, self.key_kernel), (value, self.value_kernel))
        )
        return F.scaled_dot_product_attention(query, key, value, scale=scale)


def compress(image: Tensor, layout: TokenLayout, kernel: Tensor) -> Tensor:
    """Weighted sums over cells, `[batch, heads, cells, head_dim]`.

    Args:
        image: `[batch, heads, tokens, head_dim]` in tile order.
        layout: of one grid.
        kernel: the weights in a cell, `[heads x head_dim, 1, factor, factor]`.
    """
    factor, (height, width) = kernel.shape[-1], layout.grids[0]
    rest = (0, -width % factor, 0, -height % factor)
    picture = to_picture(image, layout)
    sums = F.conv2d(F.pad(picture, rest), kernel.to(picture.device, picture.dtype), stride=factor, groups=len(kernel))
    inside = F.pad(torch.ones(1, height, width, device=picture.device), rest)
    tokens = F.avg_pool2d(inside, factor, divisor_override=1)
    return from_picture(sums / tokens * factor**2, image.shape[1]).to(image.dtype)
