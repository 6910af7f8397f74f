"""Image queries and their keys: the part of a plan that backends read."""

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
    """Image queries, and the keys that the rule lets them attend to.

    Args:
        queries: the image tokens of the queries.
        keys: the image tokens of the keys.
        before, after: the number of shared keys, to which all queries attend, before and after the image keys.
        tokens: the length of query and output, image tokens and others.
        image: the positions of the image tokens in query and output.
        window: the radius in tokens of the first grid.
        device: the device of the tensors.

    Attributes:
        image_tokens, key_tokens (`int`): the number of image queries, and of all keys.
        block_masks: a cache of FlexAttention's block masks, by whether they support gradients.
        is_symmetric (`bool`): whether each image token is a query and a key, at the same position.
        shared_keys (`SharedKeys`): the positions of the shared keys.
        query (`Coordinates`): the coordinates of the image queries in tile order, float32 `[image tokens]`.
        key (`Coordinates`): the coordinates of all keys, float32 `[key tokens]`.
        radius_sq: the squared radius of each key, float32 `[key tokens]`; infinity for shared keys.
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
        self.is_symmetric = queries is keys and before == image.start
        self.block_masks: dict[bool, Any] = {}
        self.tokens, self.image, self.device = tokens, image, device
        self.image_tokens = len(queries.y)
        self.key_tokens = before + len(keys.y) + after
        self.shared_keys = SharedKeys(before, len(keys.y), after)

        def pad_keys(image: np.ndarray, shared: float) -> Tensor:
            return to_tensor(np.pad(image, (before, after), constant_values=shared), device)

        # A plan that is made in inference mode may be used in training later.
        with torch.inference_mode(False):
            self.query = Coordinates(to_tensor(queries.y, device), to_tensor(queries.x, device))
            self.key = Coordinates(pad_keys(keys.y, 0.0), pad_keys(keys.x, 0.0))
            self.radius_sq = pad_keys(np.full(len(keys.y), float(window) ** 2, np.float32), float("inf"))

    def expand_to_sequence(self, image: Tensor) -> Tensor:
        """Return image rows inside an uninitialized tensor of all tokens, `[batch, heads, tokens, ...]`.

        Its memory layout is `[batch, tokens, heads, ...]`, as the output projection needs it.
        """
        return expand_to_sequence(image, self.tokens, self.image)

    @functools.cached_property
    def block_indices(self) -> BlockIndices:
        """The blocks of keys that FlexAttention visits for each block of image queries."""
        with torch.inference_mode(False):
            indices = block_indices(self.query, self.key, self.radius_sq)
        for tensor in indices:
            for dim, length in enumerate(tensor.shape):
                if length > 1:  # torch specializes length 1, and without the mark recompiles for each new length
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
        """The image queries that a fused kernel visits for each tile of image keys."""
        return self.key_lists if self.is_symmetric else self._transposed_lists

    @functools.cached_property
    def _transposed_lists(self) -> KeyLists:
        with torch.inference_mode(False):
            first, queries = self.shared_keys.before, SharedKeys(self.image.start, self.image_tokens, 0)
            return window_lists(self._keys, self._queries, self.window, first, queries, self.device)

    @functools.cached_property
    def tiles(self) -> Tiles:
        """The image keys that the tiled backend gathers for each tile of image queries."""
        with torch.inference_mode(False):
            return build_tiles(self._queries, self._keys, self.window, self.device)


def expand_to_sequence(image: Tensor, tokens: int, where: slice) -> Tensor:
    """Return image rows `[batch, heads, image tokens, ...]` inside an uninitialized tensor of `tokens` rows."""
    batch, heads, _, *rest = image.shape
    sequence = image.new_empty(batch, tokens, heads, *rest).transpose(1, 2)
    sequence[:, :, where] = image
    return sequence
