"""What a benchmark compares with: FlexAttention over tokens in raster order, text queries among them.

So works the code that was released with the paper (arXiv 2412.16112), with blocks of 128.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from clear_attn.backends import flex
from clear_attn.core.coordinates import Grid
from clear_attn.core.window_mask import BLOCK, BlockIndices, to_block_indices

INFINITE = float("inf")


def raster_attention(
    grid: Grid, text: int, window: int, down_factor: int, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """The attention of all queries, text first and image in raster order, to their keys and then the pooled keys."""
    height, width = grid
    cells = -(-height // down_factor) * -(-width // down_factor) if down_factor > 1 else 0
    image = torch.arange(height * width, device=device)
    y, x = (F.pad(axis.float(), (text, cells)) for axis in (image // width, image % width))
    reach = F.pad(torch.full_like(image, window**2, dtype=torch.float32), (text, cells), value=INFINITE)
    is_text = torch.arange(len(reach), device=device) < text
    is_pooled = torch.arange(len(reach), device=device) >= text + height * width

    def rule(y: Tensor, x: Tensor, reach: Tensor, is_text: Tensor, is_pooled: Tensor) -> Callable[..., Tensor]:
        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            dy, dx = y[query] - y[key], x[query] - x[key]
            return torch.where(is_text[query], ~is_pooled[key], dy * dy + dx * dx < reach[key])

        return seen

    tables = [y, x, reach, is_text, is_pooled]
    lists = _exact_block_lists(rule(*tables), text + height * width, len(reach), device)
    # As the library's own use of FlexAttention has to do on a CPU.
    seen = rule(*([flex.of_constant_length(table) for table in tables] if device.type == "cpu" else tables))
    return lambda query, key, value, scale: flex.attend_blocks(query, key, value, lists, seen, scale)[0]


def _exact_block_lists(seen: Callable[..., Tensor], queries: int, keys: int, device: torch.device) -> BlockIndices:
    """Looks at all pairs of tokens, one block of queries at a time."""
    key, none = torch.arange(keys, device=device), torch.zeros((), device=device)
    some, every = [], []
    for start in range(0, queries, BLOCK):
        query = torch.arange(start, min(start + BLOCK, queries), device=device)[:, None]
        pairs = seen(none, none, query, key)
        some.append(F.pad(pairs.any(dim=0), (0, -keys % BLOCK)).view(-1, BLOCK).any(dim=1))
        every.append(F.pad(pairs.all(dim=0), (0, -keys % BLOCK)).view(-1, BLOCK).all(dim=1))
    full = torch.stack(every)
    return BlockIndices(*to_block_indices(torch.stack(some) & ~full), *to_block_indices(full))
