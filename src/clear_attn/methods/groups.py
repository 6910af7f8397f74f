"""Methods that partition the image tokens into groups: an image query attends to text and to its own group."""

from __future__ import annotations

import abc
import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clear_attn.backends import tiled, triton
from clear_attn.backends.derivatives import needs_grad
from clear_attn.backends.selection import select_backend
from clear_attn.core.coordinates import Grid, invert_permutation
from clear_attn.core.key_lists import KeyLists, SharedKeys, partition_lists
from clear_attn.core.layout import TokenLayout
from clear_attn.core.plan import Plan
from clear_attn.core.region import expand_to_sequence
from clear_attn.core.tiles import TileGroup, Tiles
from clear_attn.methods.method import ImageMethod, Options

# Larger groups are split into parts of this many queries, each with all keys of its group.
QUERIES_AT_A_TIME = 1024


class GroupPlan(Plan):
    """The plan of a grouped method.

    Args:
        layout: a layout of one grid.
        label: integers `[image tokens]` in raster order; tokens with the same label form a group.

    Attributes:
        tiles: the queries of each group, or a part of them, with all of the group's keys.
    """

    def __init__(self, layout: TokenLayout, label: np.ndarray) -> None:
        super().__init__(layout)
        self._label = label[layout.token_set.raster]
        self.shared_keys = SharedKeys(self.image_keys.start, self.image_tokens, layout.tokens - self.image_keys.stop)
        rank = invert_permutation(layout.token_set.raster)
        _, sizes = np.unique(label, return_counts=True)
        by_shape: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
        for group in np.split(rank[np.argsort(label, kind="stable")], np.cumsum(sizes)[:-1]):
            for part in np.split(group, range(QUERIES_AT_A_TIME, len(group), QUERIES_AT_A_TIME)):
                by_shape[len(part), len(group)].append((part, group))
        tiles = []
        with torch.inference_mode(False):  # a cached plan may be used in training later
            for shape, parts in by_shape.items():
                queries, keys = (torch.from_numpy(np.stack(each)).to(self.device) for each in zip(*parts, strict=True))
                tiles.append(TileGroup(queries, keys, torch.ones(shape, dtype=torch.bool, device=self.device)))
            self.tiles = Tiles.join(tiles, layout.image_tokens)

    @functools.cached_property
    def key_lists(self) -> KeyLists:
        """The keys that a fused kernel visits for each tile of queries."""
        with torch.inference_mode(False):
            return partition_lists(self._label, self.image.start, self.shared_keys, self.device)

    @property
    def query_lists(self) -> KeyLists:
        """The queries that attend to each tile of keys: equal to `key_lists` where the rule is symmetric."""
        return self.key_lists if self.image == self.image_keys else self._transposed_lists

    @functools.cached_property
    def _transposed_lists(self) -> KeyLists:
        with torch.inference_mode(False):
            queries = SharedKeys(self.image.start, self.image_tokens, 0)
            return partition_lists(self._label, self.shared_keys.before, queries, self.device)

    def prepare(self, backend: str) -> None:
        if self.device.type == "cuda":  # where the fused kernels may be selected
            _ = self.key_lists


class GroupedMethod(ImageMethod):
    """Softmax attention to text and to the query's group."""

    @abc.abstractmethod
    def labels(self, grid: Grid) -> np.ndarray:
        """Return the number of each token's group, integers `[image tokens]` in raster order."""

    def plan(self, layout: TokenLayout) -> GroupPlan:
        self.validate_layout(layout)
        return GroupPlan(layout, self.labels(layout.grids[0]))

    def attend_image(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Any, parameters: Sequence[Tensor], options: Options
    ) -> Tensor:
        joint = expand_to_sequence(query, plan.tokens, plan.image)
        bias = options.bias.keys if options.bias else None
        output = _attend(joint, key, value, plan, bias, options.scale)
        return output[:, :, plan.image]


def _attend(query: Tensor, key: Tensor, value: Tensor, plan: GroupPlan, bias: Tensor | None, scale: float) -> Tensor:
    recorded = needs_grad(query, key, value)
    if select_backend(query.device, query.dtype, query.shape[-1], recorded).backend == "triton":
        return triton.attend(query, key, value, plan, bias, scale, return_lse=False)[0]
    return tiled.attend(query, key, value, plan, bias, scale, return_lse=False)[0]


def pairs(*sizes: Sequence[int]) -> int:
    """Return the number of pairs of image tokens in rectangular groups, given the group sizes along each axis."""
    return math.prod(sum(size**2 for size in each) for each in sizes)
