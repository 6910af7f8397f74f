"""Where the tokens of one call stand: their order, their coordinates, their pooled cells. Index tensors only."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from clear_attn.config import ClearConfig, check_whole_number
from clear_attn.masks import BlockLists, Points, block_lists
from clear_attn.tiles import Axes, Tiles, find_tiles

Grid = tuple[int, int]


def _raster(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each token of a grid in raster order."""
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return y, x


def _tile_order(grid: Grid) -> np.ndarray:
    """Raster indices in tile order: 8 x 8 cells inside 8 x 16 inside 16 x 16, raster among and within them."""
    y, x = _raster(grid)
    return np.lexsort((x % 8, y % 8, x // 8 % 2, y // 8 % 2, x // 16, y // 16))


@functools.lru_cache(maxsize=16)
def tile_order(grid: Grid, device: torch.device) -> Tensor:
    """int64 `[tokens]`: `x[tile_order]` puts the tokens of one picture from raster into tile order."""
    with torch.inference_mode(False):
        return torch.from_numpy(_tile_order(grid)).to(device)


def _axis_coordinates(length: int, first: int) -> np.ndarray:
    """Centres of `length` tokens along an axis on which the first grid has `first`, to a sixteenth of a token."""
    centres = (np.arange(length) + 0.5) * (first / length) - 0.5
    return (np.round(centres * 16) / 16).astype(np.float32)


def _pooled_cells(grid: Grid, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Raster indices `[cells, factor^2]` of the tokens of each cell, and the weight of each.

    The weight is 0 where the grid's border cuts a token off, and factor^2 / (tokens of the cell) elsewhere,
    so that a cut cell still is a weighted mean.
    """
    height, width = grid if factor > 1 else (0, 0)  # cells of one token are the tokens themselves
    corner_y, corner_x = _raster((-(-height // factor), -(-width // factor)))
    inner_y, inner_x = _raster((factor, factor))
    y, x = corner_y[:, None] * factor + inner_y, corner_x[:, None] * factor + inner_x
    inside = (y < height) & (x < width)
    weight = inside * (factor**2 / inside.sum(axis=1, keepdims=True))
    return np.where(inside, y * width + x, 0), weight.astype(np.float32)


class TokenLayout:
    """Everything about the tokens of one call that does not depend on their values.

    The image tokens stand in tile order. Keys stand as the model joins them, text first or image first, and
    pooled keys come last.

    Args:
        grids: (height, width) in tokens of each segment; usually one.
        text_tokens: number of tokens off the grid, 0 or more.
        config: window and down_factor; None where every token sees every token.
        text_first (`bool`, defaults to `True`): whether the joint sequence is [text, image] or [image, text].
        device (`torch.device` or `str`, defaults to `"cpu"`): where the tensors are.

    Attributes:
        image_tokens, key_tokens, pooled_tokens (`int`): how many there are; key_tokens counts all keys.
        window (`float`), down_factor (`int`): of the config; `math.inf` and 1 without one.
        order, inverse: int64 `[image_tokens]`; `x[order]` puts raster order into tile order, `x[inverse]` undoes it.
        query (`Points`): positions of the image tokens in tile order, float32 `[image_tokens]`.
        key (`Points`), reach: positions and squared reach of all keys, float32 `[key_tokens]`.
        pool_index, pool_weight: int64 and float32 `[pooled_tokens, down_factor^2]`: positions among the image
            tokens in tile order of each cell's tokens, and their weights without the learned part.

    Raises:
        TypeError: a number that is not whole.
        ValueError: no grid, an empty grid, or a negative number of text tokens.

    Example:
        >>> layout = TokenLayout([(16, 24)], text_tokens=7, config=ClearConfig(window=4))
        >>> layout.image_tokens, layout.key_tokens
        (384, 391)
    """

    def __init__(
        self,
        grids: Sequence[Grid],
        text_tokens: int,
        config: ClearConfig | None,
        *,
        text_first: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        if not grids:
            raise ValueError("a layout needs at least one grid, got none")
        remedy = "grids are (height, width) in tokens"
        self.grids = tuple(
            (
                check_whole_number("the height of a grid", height, remedy),
                check_whole_number("the width of a grid", width, remedy),
            )
            for height, width in grids
        )
        self.text_tokens = check_whole_number(
            "text_tokens", text_tokens, "it is the number of tokens off the grid", least=0
        )
        self.config = config
        self.window = config.window if config else math.inf
        self.down_factor = config.down_factor if config else 1
        self.text_first = text_first
        self.device = torch.device(device)
        self._starts = [0, *itertools.accumulate(height * width for height, width in self.grids)]
        self.image_tokens = self._starts[-1]
        self._within: dict[float, TokenLayout] = {}
        # A layout made under inference mode must serve training too.
        with torch.inference_mode(False):
            self._build()

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def _build(self) -> None:
        factor, reach = self.down_factor, float(self.window) ** 2
        self._axes = [
            Axes(start, *(_axis_coordinates(length, first) for length, first in zip(grid, self.grids[0], strict=True)))
            for start, grid in zip(self._starts, self.grids, strict=False)
        ]
        orders, ys, xs, cells, weights = [], [], [], [], []
        for (start, *axes), grid in zip(self._axes, self.grids, strict=True):
            order = _tile_order(grid)
            y, x = (axis[index] for axis, index in zip(axes, _raster(grid), strict=True))
            orders.append(start + order)
            ys.append(y[order])
            xs.append(x[order])
            index, weight = _pooled_cells(grid, factor)
            cells.append(start + index)
            weights.append(weight)
        order = np.concatenate(orders)
        self._rank = np.empty_like(order)
        self._rank[order] = np.arange(len(order))
        self.order, self.inverse = self._on_device(order), self._on_device(self._rank)
        y, x = np.concatenate(ys), np.concatenate(xs)
        self.query = Points(self._on_device(y), self._on_device(x))
        self.pool_index = self._on_device(self._rank[np.concatenate(cells)])
        self.pool_weight = self._on_device(np.concatenate(weights))
        self.pooled_tokens = len(self.pool_index)

        before = self.text_tokens if self.text_first else 0
        after = self.text_tokens - before + self.pooled_tokens
        self.key_tokens = before + self.image_tokens + after

        def among_keys(image: np.ndarray, other: float) -> Tensor:
            return self._on_device(np.pad(image.astype(np.float32), (before, after), constant_values=other))

        self.key = Points(among_keys(y, 0.0), among_keys(x, 0.0))
        self.reach = among_keys(np.full(self.image_tokens, reach), float("inf"))
        self.image = slice(before, before + self.image_tokens)
        first_text = 0 if self.text_first else self.image_tokens
        self.text = slice(first_text, first_text + self.text_tokens)

    def among_tokens(self, image: Tensor) -> Tensor:
        """The image tokens' rows `[batch, heads, image tokens, ...]` in a tensor of all tokens, the others not set.

        In memory it is `[batch, tokens, heads, ...]`, as the projection that follows attention takes it.
        """
        batch, heads, _, *rest = image.shape
        tokens = image.new_empty(batch, self.text_tokens + self.image_tokens, heads, *rest).transpose(1, 2)
        tokens[:, :, self.image] = image
        return tokens

    @functools.cached_property
    def block_lists(self) -> BlockLists:
        """What FlexAttention visits, for image queries against all keys."""
        with torch.inference_mode(False):
            lists = block_lists(self.query, self.key, self.reach)
        for tensor in lists:
            for dim, length in enumerate(tensor.shape):
                if length > 1:  # or a compiled block would be compiled anew for each dimension that it sees change
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)
        return lists

    def within(self, window: float | None) -> TokenLayout:
        """The layout of a layer with its own window (`math.inf`: sees all), if any; a dense layout stays dense."""
        if self.config is None or window is None or window == self.window:
            return self
        if window not in self._within:
            config = None if window == math.inf else dataclasses.replace(self.config, window=int(window))
            self._within[window] = TokenLayout(
                self.grids, self.text_tokens, config, text_first=self.text_first, device=self.device
            )
        return self._within[window]

    @functools.cached_property
    def without_text(self) -> TokenLayout:
        """The layout of a layer in which the image tokens stand alone."""
        if not self.text_tokens:
            return self
        return TokenLayout(self.grids, 0, self.config, text_first=self.text_first, device=self.device)

    @functools.cached_property
    def tiles(self) -> Tiles:
        """What the tiled backend gathers, for image queries against image keys."""
        with torch.inference_mode(False):
            return find_tiles(self._axes, self._rank, self.query, self.window)
