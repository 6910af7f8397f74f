"""The rule of CLEAR on coordinates: which query attends to which key, as a predicate, a mask and block indices.

Every token has coordinates (y, x). Every key also has a squared radius: the squared window for an image key, infinity
for a key that all image queries attend to (text, pooled keys). Coordinates are float32 multiples of 1/16, so squared
distances up to 2^16 are exact in float32. All backends therefore agree on every key, with or without fused
multiply-adds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The number of queries or keys in a block of FlexAttention.
BLOCK = 128


class Coordinates(NamedTuple):
    """Coordinates in tokens of the first grid: two float32 tensors of one shape."""

    y: Tensor
    x: Tensor


def in_window(query: Coordinates, key: Coordinates, radius_sq: Tensor) -> Tensor:
    """Return dy^2 + dx^2 < radius_sq as bool. All arguments broadcast."""
    dy, dx = query.y - key.y, query.x - key.x
    return dy * dy + dx * dx < radius_sq


def window_mask(query: Coordinates, key: Coordinates, radius_sq: Tensor) -> Tensor:
    """Return the rule for all pairs, bool `[queries, keys]`."""
    return in_window(Coordinates(query.y[:, None], query.x[:, None]), key, radius_sq)


class BlockIndices(NamedTuple):
    """The blocks of keys to visit for each block of queries, in the form of FlexAttention's `BlockMask`.

    Counts are int32 `[1, 1, query blocks]`, indices int32 `[1, 1, query blocks, key blocks]`. Every pair in a full
    block attends. The rule decides on each pair in a partial block. Other blocks are not visited.
    """

    partial_count: Tensor
    partial_index: Tensor
    full_count: Tensor
    full_index: Tensor


def _by_block(values: Tensor, fill: Tensor) -> Tensor:
    """Return `[tokens]` as `[blocks, BLOCK]`, with the last block padded."""
    return torch.cat([values, fill.expand(-len(values) % BLOCK)]).view(-1, BLOCK)


def to_block_indices(selected: Tensor) -> tuple[Tensor, Tensor]:
    """Return per row of `[query blocks, key blocks]` the number of True entries, and their indices first."""
    count = selected.sum(dim=1, dtype=torch.int32)
    index = torch.argsort((~selected).to(torch.uint8), dim=1, stable=True).to(torch.int32)
    return count[None, None], index[None, None].contiguous()


def block_indices(query: Coordinates, key: Coordinates, radius_sq: Tensor) -> BlockIndices:
    """Return block indices, computed from bounding boxes of the blocks in (query blocks) x (key blocks) memory.

    Every pair that attends is in a visited block, for any order of the tokens. An order that keeps neighbors together
    makes the lists shorter.
    """
    nearest = farthest = torch.zeros((), device=radius_sq.device)
    for query_axis, key_axis in zip(query, key, strict=True):
        query_low, query_high = _by_block(query_axis, query_axis[-1])[:, :, None].aminmax(dim=1)
        key_low, key_high = _by_block(key_axis, key_axis[-1])[None].aminmax(dim=2)
        nearest = nearest + torch.maximum(key_low - query_high, query_low - key_high).clamp(min=0).square()
        farthest = farthest + torch.maximum(key_high - query_low, query_high - key_low).square()
    # Padded keys have radius_sq 0, so an incomplete block is never full.
    radius_low, radius_high = _by_block(radius_sq, torch.zeros_like(radius_sq[-1])).aminmax(dim=1)
    full = farthest < radius_low
    return BlockIndices(*to_block_indices((nearest < radius_high) & ~full), *to_block_indices(full))
