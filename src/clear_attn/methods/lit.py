"""LiT (arXiv 2501.12976): linear attention with few heads and a depth-wise convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clear_attn.core.coordinates import Grid
from clear_attn.methods.image_grid import GridMethod, from_channels, to_channels
from clear_attn.methods.method import Layer, Options


@dataclass(frozen=True)
class LiT(GridMethod):
    """Linear attention, `relu(q) (relu(k)^T v) / (relu(q) sum relu(k))`, plus a convolution of the image's values.

    Its work grows linearly with the tokens. Of the four properties that CLEAR's paper asks for, it keeps features
    intact, and has locality by the convolution alone. It does not keep the formulation, because there is no softmax.
    The rank of a head is bounded by its channels; fewer and wider heads raise it.

    Args:
        heads (`int`, *optional*, defaults to 2): the number of heads after regrouping; None keeps the layer's own.
        kernel_size (`int`, defaults to 5): the side of the convolution in tokens, an odd number; 0 for none.

    Raises:
        TypeError: a value is not a whole number.
        ValueError: a value is out of range.
    """

    quadratic = None
    uses_scale = False
    supports_bias = False

    heads: int | None = 2
    kernel_size: int = 5

    def __post_init__(self) -> None:
        if self.heads is not None:
            self._validate_whole("heads", "2 to 4 are usual, None keeps the layer's own")
        self._validate_whole("kernel_size", "it is the side of a convolution, 0 for none", least=0)
        if self.kernel_size and self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, or 0 for no convolution, got {self.kernel_size}")

    def parameters_for(self, layer: Layer) -> dict[str, Tensor]:
        """Return `convolution`, `[channels, 1, kernel_size, kernel_size]`, which starts as zeros and adds nothing."""
        if self.heads and layer.channels % self.heads:
            raise ValueError(
                f"heads={self.heads} does not divide the {layer.channels} channels of {layer.name}; give a divisor"
            )
        side = self.kernel_size
        return {"convolution": torch.zeros(layer.channels, 1, side, side)} if side else {}

    def flops(self, grid: Grid, text_tokens: int, heads: int, head_dim: int) -> dict[str, int]:
        image, inner = grid[0] * grid[1], heads * head_dim
        width = inner // (self.heads or heads)
        return {
            "keys and values summed": 2 * (text_tokens + image) * width * inner,
            "image queries, the sums": 2 * image * width * inner,
            "convolution of values": 2 * image * self.kernel_size**2 * inner,
        }

    def attend_image(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Any, parameters: Sequence[Tensor], options: Options
    ) -> Tensor:
        heads = query.shape[1]
        output = linear_attention(*(_regroup(x, self.heads or heads) for x in (query, key, value)))
        output = _regroup(output, heads)
        if not parameters:
            return output
        channels = to_channels(value[:, :, plan.image_keys], plan)
        kernel = parameters[0].to(channels.device, channels.dtype)
        convolved = F.conv2d(channels, kernel, padding="same", groups=len(kernel))
        return output + from_channels(convolved, heads).index_select(2, plan.permutation)


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return `relu(q) (relu(k)^T v) / (relu(q) sum relu(k))`, computed in at least float32; 0 where the divisor is 0.

    Args:
        query, key, value: `[batch, heads, tokens, head_dim]`; the query may have fewer tokens.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        query, key = (F.relu(x.to(dtype)) for x in (query, key))
        total = (query @ key.sum(dim=2, keepdim=True).transpose(2, 3)).clamp_min(torch.finfo(dtype).eps)
        return (query @ (key.transpose(2, 3) @ value.to(dtype)) / total).to(value.dtype)


def _regroup(x: Tensor, heads: int) -> Tensor:
    """Return `[batch, heads, tokens, head_dim]` regrouped to another number of heads."""
    return x.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)
