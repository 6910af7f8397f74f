"""Image queries and the keys that they may attend to: what a backend reads of a plan."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clear_attn.core.coordinates import TokenSet, to_tensor
from clear_attn.core.key_lists import KeyLists, SharedKeys, window_lists
from clear_attn.core.tiles import Tiles, build_tiles
from clear_attn.core.window_mask import BlockIndices, Coordinates, block_indices
from clear_attn.utils._torch import maybe_mark_dynamic


class AttentionRegion:
    """Image queries, and the keys among which the window decides.

    Args:
        queries: the image tokens of the queries.
        keys: the image tokens among the keys.
        before, after: how many keys that all queries attend to come before and after those.
        tokens: the length of query and output, image tokens and others.
        image: where the image tokens are among them.
        window: radius in tokens of the first grid.
        device: where the tensors are.

    Attributes:
        image_tokens, key_tokens (`int`): the number of image queries, and of all keys.
        block_masks: FlexAttention's, with and without what gradients need, kept here by that backend.
        is_symmetric (`bool`): whether each image token is a query and a key.
        shared_keys (`SharedKeys`): where the keys are that all queries attend to.
        query (`Coordinates`): of the image tokens in tile order, float32 `[image tokens]`.
        key (`Coordinates`), radius_sq: of all keys, float32 `[key tokens]`; infinity where all queries attend.
    """

    def __init__(
        self,
        queries: TokenSet,
        keys: TokenSet,
        before: int,
        after: int,
        tokens: int,
        image: slice,
        window: float,
        device: torch.device,
    ) -> None:
        self._queries, self._keys, self.window = queries, keys, window
        self.is_symmetric = queries is keys
        self.block_masks: dict[bool, Any] = {}
        self.tokens, self.image, self.device = tokens, image, device
        self.image_tokens = len(queries.y)
        self.key_tokens = before + len(keys.y) + after
        self.shared_keys = SharedKeys(before, len(keys.y), after)

        def pad_keys(image: np.ndarray, other: float) -> Tensor:
            return to_tensor(np.pad(image, (before, after), constant_values=other), device)

        # A plan made under inference mode must serve training too.
        with torch.inference_mode(False):
            self.query = Coordinates(to_tensor(queries.y, device), to_tensor(queries.x, device))
            self.key = Coordinates(pad_keys(keys.y, 0.0), pad_keys(keys.x, 0.0))
            self.radius_sq = pad_keys(np.full(len(keys.y), float(window) ** 2, np.float32), float("inf"))

    def expand_to_sequence(self, image: Tensor) -> Tensor:
        """Return a tensor of all tokens with the image's rows set, `[batch, heads, tokens, ...]`; others are not set.

        In memory it is `[batch, tokens, heads, ...]`, as the projection that follows attention takes it.
        """
        return expand_to_sequence(image, self.tokens, self.image)

    @functools.cached_property
    def block_indices(self) -> BlockIndices:
        """The blocks of keys that FlexAttention visits for each block of image queries."""
        with torch.inference_mode(False):
            indices = block_indices(self.query, self.key, self.radius_sq)
        for tensor in indices:
            for dim, length in enumerate(tensor.shape):
                if length > 1:  # else a compiled block would be recompiled for each dimension that changes
                    maybe_mark_dynamic(tensor, dim)
        return indices

    @functools.cached_property
    def key_lists(self) -> KeyLists:
        """The keys that a fused kernel visits for each tile of image queries."""
        with torch.inference_mode(False):
            first, shared = self.image.start, self.shared_keys
            return window_lists(self._queries, self._keys, self.window, first, shared, self.device)

    @property
    def query_lists(self) -> KeyLists:
        """The image queries that a fused kernel visits for each tile of image keys: the same rule, turned."""
        return self.key_lists if self.is_symmetric else self._turned_lists

    @functools.cached_property
    def _turned_lists(self) -> KeyLists:
        with torch.inference_mode(False):
            first, queries = self.shared_keys.before, SharedKeys(self.image.start, self.image_tokens, 0)
            return window_lists(self._keys, self._queries, self.window, first, queries, self.device)

    @functools.cached_property
    def tiles(self) -> Tiles:
        """The image keys that the tiled backend gathers for each tile of image queries."""
        with torch.inference_mode(False):
            return build_tiles(self._queries, self._keys, self.window, self.device)


def expand_to_sequence(image: Tensor, tokens: int, where: slice) -> Tensor:
    """Return image rows `[batch, heads, image tokens, ...]` inside a tensor of `tokens` rows, the others not set."""
    batch, heads, _, *rest = image.shape
    sequence = image.new_empty(batch, tokens, heads, *rest).transpose(1, 2)
    sequence[:, :, where] = image
    return sequence
