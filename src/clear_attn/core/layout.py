"""Where the tokens of one call stand: their order, their coordinates, their pooled cells. Index tensors only."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clear_attn.core.coordinates import Grid as Grid
from clear_attn.core.coordinates import Placed, axes_of, inverse_of, place, raster, tile_order_of
from clear_attn.core.tiles import Tiles, find_tiles
from clear_attn.core.window_mask import BlockLists, Points, block_lists
from clear_attn.utils._torch import maybe_mark_dynamic
from clear_attn.utils.validation import ClearConfig, Config, check_whole_number


@functools.lru_cache(maxsize=16)
def tile_order(grid: Grid, device: torch.device) -> Tensor:
    """int64 `[tokens]`: `x[tile_order]` puts the tokens of one picture from raster into tile order."""
    with torch.inference_mode(False):
        return torch.from_numpy(tile_order_of(grid)).to(device)


def _pooled_cells(grid: Grid, factor: int) -> tuple[np.ndarray, np.ndarray]:
    height, width = grid if factor > 1 else (0, 0)  # cells of one token are the tokens themselves
    corner_y, corner_x = raster((-(-height // factor), -(-width // factor)))
    inner_y, inner_x = raster((factor, factor))
    y, x = corner_y[:, None] * factor + inner_y, corner_x[:, None] * factor + inner_x
    inside = (y < height) & (x < width)
    weight = inside * (factor**2 / inside.sum(axis=1, keepdims=True))
    return np.where(inside, y * width + x, 0), weight.astype(np.float32)


def pooled_cells(grids: Sequence[Grid], factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Raster indices `[cells, factor^2]` of the tokens of each cell, and the weight of each.

    The weight is 0 where the grid's border cuts a token off, and factor^2 / (tokens of the cell) elsewhere,
    so that a cut cell still is a weighted mean.
    """
    parts, start = [], 0
    for grid in grids:
        index, weight = _pooled_cells(grid, factor)
        parts.append((start + index, weight))
        start += grid[0] * grid[1]
    cells, weights = (np.concatenate(each) for each in zip(*parts, strict=True))
    return cells, weights


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


class Neighbourhood:
    """Image queries and the keys that they may see: all that a backend reads of a layout.

    Args:
        queries: the image tokens of the queries.
        keys: the image tokens among the keys.
        before, after: how many keys that all see stand before and behind those.
        tokens: the length of query and output, where image tokens are `image` and the others the caller's.
        image: where they are.
        window: radius in tokens of the first grid.
        device: where the tensors are.

    Attributes:
        image_tokens, key_tokens (`int`): how many image queries there are, and how many keys in all.
        query (`Points`): positions of the image tokens in tile order, float32 `[image tokens]`.
        key (`Points`), reach: positions and squared reach of all keys, float32 `[key tokens]`.
    """

    def __init__(
        self,
        queries: Placed,
        keys: Placed,
        before: int,
        after: int,
        tokens: int,
        image: slice,
        window: float,
        device: torch.device,
    ) -> None:
        self._queries, self._keys, self.window = queries, keys, window
        self.tokens, self.image, self.device = tokens, image, device
        self.image_tokens = len(queries.y)
        self.key_tokens = before + len(keys.y) + after

        def among_keys(image: np.ndarray, other: float) -> Tensor:
            return on_device(np.pad(image, (before, after), constant_values=other), device)

        self.query = Points(on_device(queries.y, device), on_device(queries.x, device))
        self.key = Points(among_keys(keys.y, 0.0), among_keys(keys.x, 0.0))
        self.reach = among_keys(np.full(len(keys.y), float(window) ** 2, np.float32), float("inf"))

    def among_tokens(self, image: Tensor) -> Tensor:
        """The image tokens' rows `[batch, heads, image tokens, ...]` in a tensor of all tokens, the others not set.

        In memory it is `[batch, tokens, heads, ...]`, as the projection that follows attention takes it.
        """
        batch, heads, _, *rest = image.shape
        tokens = image.new_empty(batch, self.tokens, heads, *rest).transpose(1, 2)
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
                    maybe_mark_dynamic(tensor, dim)
        return lists

    @functools.cached_property
    def tiles(self) -> Tiles:
        """What the tiled backend gathers, for image queries against image keys."""
        with torch.inference_mode(False):
            return find_tiles(self._queries, self._keys, self.window, self.device)


class TokenLayout(Neighbourhood):
    """Everything about the tokens of one call that does not depend on their values.

    The image tokens stand in tile order. Keys stand as the model joins them, text first or image first, and
    pooled keys come last.

    Args:
        grids: (height, width) in tokens of each segment; usually one.
        text_tokens: number of tokens off the grid, 0 or more.
        config: window and down_factor, or another method's settings; None where every token sees every token.
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
        attention: what a layer with such a layout calls, where that is not `clear_attention`.
        prepared: what a method made of it for its layers, see `clear_attn.methods.Method.prepare`; None before.

    Raises:
        TypeError: a number that is not whole.
        ValueError: no grid, an empty grid, or a negative number of text tokens.

    Example:
        >>> layout = TokenLayout([(16, 24)], text_tokens=7, config=ClearConfig(window=4))
        >>> layout.image_tokens, layout.key_tokens
        (384, 391)
    """

    attention: Callable[..., Tensor] | None = None
    prepared: Any = None

    def __init__(
        self,
        grids: Sequence[Grid],
        text_tokens: int,
        config: Config | None,
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
        self._within: dict[float, TokenLayout] = {}
        # A layout made under inference mode must serve training too.
        with torch.inference_mode(False):
            self._build(torch.device(device))

    def _build(self, device: torch.device) -> None:
        self.axes = axes_of(self.grids)
        placed = place(self.axes, [slice(0, height) for height, _ in self.grids])
        rank = inverse_of(placed.raster)
        image_tokens = len(rank)
        self.order, self.inverse = on_device(placed.raster, device), on_device(rank, device)
        cells, weights = pooled_cells(self.grids, self.down_factor)
        self.pool_index, self.pool_weight = on_device(rank[cells], device), on_device(weights, device)
        self.pooled_tokens = len(cells)

        before = self.text_tokens if self.text_first else 0
        behind = self.text_tokens - before
        super().__init__(
            queries=placed,
            keys=placed,
            before=before,
            after=behind + self.pooled_tokens,
            tokens=self.text_tokens + image_tokens,
            image=slice(before, before + image_tokens),
            window=self.window,
            device=device,
        )
        first_text = 0 if self.text_first else self.image_tokens
        self.text = slice(first_text, first_text + self.text_tokens)

    def within(self, window: float | None) -> TokenLayout:
        """The layout of a layer with its own window (`math.inf`: sees all), if any; a dense layout stays dense."""
        if self.config is None or window is None or window == self.window < math.inf:
            return self
        if window not in self._within:
            config = None if window == math.inf else ClearConfig(int(window), self.down_factor)
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
