"""The rule of CLEAR on coordinates: which query attends to which key, as a predicate, a mask and block indices.

Every token has coordinates (y, x). Every key also has a squared radius: the squared window for an image token,
infinity for a token that all image queries attend to (text, pooled keys). Coordinates are float32 multiples of 1/16, so
squared distances up to 2^16 are exact in float32 and all backends agree to the last key, whether they fuse the
multiplication with the addition or not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Tokens in one block of FlexAttention's lists, for queries and for keys.
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
    """For each block of queries the blocks of keys to visit, as FlexAttention's `BlockMask` takes them.

    Counts are int32 `[1, 1, query blocks]`, indices int32 `[1, 1, query blocks, key blocks]`. Pairs in a full
    block are all visible; those in a partial block are for the rule to decide; the rest are not visited.
    """

    partial_count: Tensor
    partial_index: Tensor
    full_count: Tensor
    full_index: Tensor


def _by_block(values: Tensor, fill: Tensor) -> Tensor:
    """`[tokens]` as `[blocks, BLOCK]`, the last block filled up with a value."""
    return torch.cat([values, fill.expand(-len(values) % BLOCK)]).view(-1, BLOCK)


def to_block_indices(selected: Tensor) -> tuple[Tensor, Tensor]:
    """Return per row of `[query blocks, key blocks]` the number of True entries, and their indices first."""
    count = selected.sum(dim=1, dtype=torch.int32)
    index = torch.argsort((~selected).to(torch.uint8), dim=1, stable=True).to(torch.int32)
    return count[None, None], index[None, None].contiguous()


def block_indices(query: Coordinates, key: Coordinates, radius_sq: Tensor) -> BlockIndices:
    """Block lists from the bounding boxes of the blocks' tokens, never from pairs of tokens.

    Never leaves out a visible pair, whatever the order of the tokens; the better the order keeps neighbours
    together, the shorter the lists. Takes (query blocks) x (key blocks) memory.
    """
    nearest = farthest = torch.zeros((), device=radius_sq.device)
    for query_axis, key_axis in zip(query, key, strict=True):
        query_low, query_high = _by_block(query_axis, query_axis[-1])[:, :, None].aminmax(dim=1)
        key_low, key_high = _by_block(key_axis, key_axis[-1])[None].aminmax(dim=2)
        nearest = nearest + torch.maximum(key_low - query_high, query_low - key_high).clamp(min=0).square()
        farthest = farthest + torch.maximum(key_high - query_low, query_high - key_low).square()
    # What is not there has no radius_sq, so that a block cut short is never full.
    radius_low, radius_high = _by_block(radius_sq, torch.zeros_like(radius_sq[-1])).aminmax(dim=1)
    full = farthest < radius_low
    return BlockIndices(*to_block_indices((nearest < radius_high) & ~full), *to_block_indices(full))
