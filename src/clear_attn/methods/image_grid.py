"""Convert image tokens to a channels-first image, for convolutions and pooling, and back."""

from __future__ import annotations

from torch import Tensor

from clear_attn.core.layout import TokenLayout
from clear_attn.core.plan import GridPlan
from clear_attn.methods.method import ImageMethod


class GridMethod(ImageMethod):
    """A method that computes with convolutions or pooling on the token grid."""

    def plan(self, layout: TokenLayout) -> GridPlan:
        self.validate_layout(layout)
        return GridPlan(layout)


def to_channels(image: Tensor, plan: GridPlan) -> Tensor:
    """Return tokens `[batch, heads, tokens, head_dim]` in tile order as `[batch, heads x head_dim, height, width]`."""
    return image.index_select(2, plan.inverse_permutation).transpose(2, 3).flatten(1, 2).unflatten(2, plan.grid)


def from_channels(image: Tensor, heads: int) -> Tensor:
    """Return `[batch, heads x head_dim, height, width]` as `[batch, heads, tokens, head_dim]` in raster order."""
    # Fused attention kernels need contiguous heads.
    return image.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3).contiguous()
