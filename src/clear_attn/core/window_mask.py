"""The rule of CLEAR on coordinates: which query sees which key, as a predicate, a mask and lists of blocks.

Every token has a position (y, x). Every key also has a reach, the squared distance from which on it is out
of sight: the squared window for an image token, infinity for a token that all image queries see (text, pooled).
Coordinates are float32 multiples of 1/16, so squared distances up to 2^16 are exact in float32 and all
backends agree to the last key, whether they fuse the multiplication with the addition or not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Tokens in one block of FlexAttention's lists, for queries and for keys.
BLOCK = 128


class Points(NamedTuple):
    """Positions in tokens of the first grid: two float32 tensors of one shape."""

    y: Tensor
    x: Tensor


def visible(query: Points, key: Points, reach: Tensor) -> Tensor:
    """The rule: dy^2 + dx^2 < reach. All arguments broadcast; returns bool."""
    dy, dx = query.y - key.y, query.x - key.x
    return dy * dy + dx * dx < reach


def dense_mask(query: Points, key: Points, reach: Tensor) -> Tensor:
    """The rule for all pairs: bool `[queries, keys]`."""
    return visible(Points(query.y[:, None], query.x[:, None]), key, reach)


class BlockLists(NamedTuple):
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


def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many of a row `[query blocks, key blocks]` are chosen, and their indices, then the others'."""
    count = chosen.sum(dim=1, dtype=torch.int32)
    index = torch.argsort((~chosen).to(torch.uint8), dim=1, stable=True).to(torch.int32)
    return count[None, None], index[None, None].contiguous()


def block_lists(query: Points, key: Points, reach: Tensor) -> BlockLists:
    """Block lists from the bounding boxes of the blocks' tokens, never from pairs of tokens.

    Never leaves out a visible pair, whatever the order of the tokens; the better the order keeps neighbours
    together, the shorter the lists. Takes (query blocks) x (key blocks) memory.
    """
    nearest = farthest = torch.zeros((), device=reach.device)
    for query_axis, key_axis in zip(query, key, strict=True):
        query_low, query_high = _by_block(query_axis, query_axis[-1])[:, :, None].aminmax(dim=1)
        key_low, key_high = _by_block(key_axis, key_axis[-1])[None].aminmax(dim=2)
        nearest = nearest + torch.maximum(key_low - query_high, query_low - key_high).clamp(min=0).square()
        farthest = farthest + torch.maximum(key_high - query_low, query_high - key_low).square()
    # What is not there has no reach, so that a block cut short is never full.
    reach_low, reach_high = _by_block(reach, torch.zeros_like(reach[-1])).aminmax(dim=1)
    full = farthest < reach_low
    return BlockLists(*listed((nearest < reach_high) & ~full), *listed(full))
