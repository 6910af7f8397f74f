"""Attention within groups that share out a picture's tokens: an image query sees text and its own group."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clear_attn.backends import tiled
from clear_attn.core.coordinates import inverse_of, tile_order_of
from clear_attn.core.layout import TokenLayout
from clear_attn.core.tiles import TileGroup, Tiles
from clear_attn.methods.base import Method, MethodProcessor

# Larger groups are computed in parts of so many queries, each with a list of all keys of its group.
QUERIES_AT_A_TIME = 1024


class Groups(NamedTuple):
    """Groups as the tiled backend takes them.

    Attributes:
        tiles: each group, or a part of its queries, with all of the group's keys.
        image: where the image tokens are in the joint sequence.
    """

    tiles: Tiles
    image: slice


def make_groups(layout: TokenLayout, label: np.ndarray) -> Groups:
    """The groups of tokens with the same label.

    Args:
        layout: of one grid.
        label: whole numbers `[image tokens]` in raster order.
    """
    rank = inverse_of(tile_order_of(layout.grids[0]))
    _, sizes = np.unique(label, return_counts=True)
    alike: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for group in np.split(rank[np.argsort(label, kind="stable")], np.cumsum(sizes)[:-1]):
        for part in np.split(group, range(QUERIES_AT_A_TIME, len(group), QUERIES_AT_A_TIME)):
            alike[len(part), len(group)].append((part, group))
    tiles = []
    with torch.inference_mode(False):  # it must serve training too
        for shape, parts in alike.items():
            queries, keys = (torch.from_numpy(np.stack(each)).to(layout.device) for each in zip(*parts, strict=True))
            tiles.append(TileGroup(queries, keys, torch.ones(shape, dtype=torch.bool, device=layout.device)))
        return Groups(Tiles.join(tiles, layout.image_tokens), layout.image)


def pairs(*sizes: Sequence[int]) -> int:
    """Visible pairs of image tokens, for groups that are rectangles: the sizes of each along either axis."""
    return math.prod(sum(size**2 for size in each) for each in sizes)


class GroupedAttnProcessor(MethodProcessor):
    """Softmax attention to text and to the query's group, for one layer.

    Args:
        method: the settings, whose `prepare` leaves `Groups` in the layout.
        kind: which of these are the layer's.
        layer: its name, for errors.
    """

    def __init__(self, method: Method, kind: int = 0, layer: str = "") -> None:
        super().__init__(method, layer)
        self.kind = kind

    def forward(self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, scale: float) -> Tensor:
        joint = layout.among_tokens(query)
        output, _ = tiled.attend(joint, key, value, layout.prepared[self.kind], scale, return_lse=False)
        return output[:, :, layout.image]
