"""The baseline of the benchmark: FlexAttention over tokens in raster order, text queries included.

The code released with the paper (arXiv 2412.16112) does it this way, with blocks of 128.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from clear_attn.backends import flex
from clear_attn.core.coordinates import Grid
from clear_attn.core.plan import pooled_count
from clear_attn.core.window_mask import BLOCK, BlockIndices, to_block_indices

INFINITE = float("inf")


def raster_attention(
    grid: Grid, text: int, window: int, down_factor: int, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """Return the attention of all queries, text first and image in raster order, to all keys, the pooled ones last."""
    height, width = grid
    cells = pooled_count(grid, down_factor)
    image = torch.arange(height * width, device=device)
    y, x = (F.pad(axis.float(), (text, cells)) for axis in (image // width, image % width))
    radius_sq = F.pad(torch.full_like(image, window**2, dtype=torch.float32), (text, cells), value=INFINITE)
    is_text = torch.arange(len(radius_sq), device=device) < text
    is_pooled = torch.arange(len(radius_sq), device=device) >= text + height * width

    def rule(y: Tensor, x: Tensor, radius_sq: Tensor, is_text: Tensor, is_pooled: Tensor) -> Callable[..., Tensor]:
        def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            dy, dx = y[query] - y[key], x[query] - x[key]
            return torch.where(is_text[query], ~is_pooled[key], dy * dy + dx * dx < radius_sq[key])

        return mask

    tables = [y, x, radius_sq, is_text, is_pooled]
    blocks = _exact_block_indices(rule(*tables), text + height * width, len(radius_sq), device)
    # On a CPU, FlexAttention needs tables of constant length, in the library as well.
    mask = rule(*([flex.of_constant_length(table) for table in tables] if device.type == "cpu" else tables))
    return lambda query, key, value, scale: flex.attend_blocks(query, key, value, blocks, mask, scale)[0]


def _exact_block_indices(mask: Callable[..., Tensor], queries: int, keys: int, device: torch.device) -> BlockIndices:
    """Return the block indices of a mask, from all pairs of tokens, one block of queries at a time."""
    key, none = torch.arange(keys, device=device), torch.zeros((), device=device)
    some, every = [], []
    for start in range(0, queries, BLOCK):
        query = torch.arange(start, min(start + BLOCK, queries), device=device)[:, None]
        pairs = mask(none, none, query, key)
        some.append(F.pad(pairs.any(dim=0), (0, -keys % BLOCK)).view(-1, BLOCK).any(dim=1))
        every.append(F.pad(pairs.all(dim=0), (0, -keys % BLOCK)).view(-1, BLOCK).all(dim=1))
    full = torch.stack(every)
    return BlockIndices(*to_block_indices(torch.stack(some) & ~full), *to_block_indices(full))
