"""Methods whose groups partition the image tokens: an image query attends to text and to its own group."""

from __future__ import annotations

import abc
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clear_attn.backends import tiled
from clear_attn.core.coordinates import Grid, invert_permutation
from clear_attn.core.layout import TokenLayout
from clear_attn.core.plan import Plan
from clear_attn.core.region import expand_to_sequence
from clear_attn.core.tiles import TileGroup, Tiles
from clear_attn.methods.method import ImageMethod, Options

# Larger groups are computed in parts of so many queries, each with a list of all keys of its group.
QUERIES_AT_A_TIME = 1024


class GroupPlan(Plan):
    """Groups as the tiled backend takes them.

    Args:
        layout: of one grid.
        label: whole numbers `[image tokens]` in raster order; tokens with the same label are a group.

    Attributes:
        tiles: each group, or a part of its queries, with all of the group's keys.
    """

    def __init__(self, layout: TokenLayout, label: np.ndarray) -> None:
        super().__init__(layout)
        rank = invert_permutation(layout.token_set.raster)
        _, sizes = np.unique(label, return_counts=True)
        alike: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
        for group in np.split(rank[np.argsort(label, kind="stable")], np.cumsum(sizes)[:-1]):
            for part in np.split(group, range(QUERIES_AT_A_TIME, len(group), QUERIES_AT_A_TIME)):
                alike[len(part), len(group)].append((part, group))
        tiles = []
        with torch.inference_mode(False):  # it must serve training too
            for shape, parts in alike.items():
                queries, keys = (torch.from_numpy(np.stack(each)).to(self.device) for each in zip(*parts, strict=True))
                tiles.append(TileGroup(queries, keys, torch.ones(shape, dtype=torch.bool, device=self.device)))
            self.tiles = Tiles.join(tiles, layout.image_tokens)


class GroupedMethod(ImageMethod):
    """Softmax attention to text and to the query's group."""

    @abc.abstractmethod
    def labels(self, grid: Grid) -> np.ndarray:
        """Return the number of each token's group, whole numbers `[image tokens]` in raster order."""

    def plan(self, layout: TokenLayout) -> GroupPlan:
        self.validate_layout(layout)
        return GroupPlan(layout, self.labels(layout.grids[0]))

    def attend_image(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Any, parameters: Sequence[Tensor], options: Options
    ) -> Tensor:
        joint = expand_to_sequence(query, plan.tokens, plan.image)
        bias = options.bias.keys if options.bias else None
        output, _ = tiled.attend(joint, key, value, plan, bias, options.scale, return_lse=False)
        return output[:, :, plan.image]


def pairs(*sizes: Sequence[int]) -> int:
    """Return the number of pairs of image tokens in groups that are rectangles, from their sizes along either axis."""
    return math.prod(sum(size**2 for size in each) for each in sizes)
