"""Image tokens as a picture with channels, as convolutions and pooling take it."""

from __future__ import annotations

from torch import Tensor

from clear_attn.core.layout import TokenLayout


def to_picture(image: Tensor, layout: TokenLayout) -> Tensor:
    """`[batch, heads x head_dim, height, width]` of image tokens `[batch, heads, tokens, head_dim]` in tile order."""
    return image.index_select(2, layout.inverse).transpose(2, 3).flatten(1, 2).unflatten(2, layout.grids[0])


def from_picture(picture: Tensor, heads: int) -> Tensor:
    """The reverse, in raster order."""
    # Fused attention takes no other strides within a head.
    return picture.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3).contiguous()
