"""The tokens of one call: their grids, the text length, and the permutation into tile order."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clear_attn.core.coordinates import (
    Grid,
    invert_permutation,
    joint_slices,
    segments_of,
    select_rows,
    tile_permutation,
    to_tensor,
)
from clear_attn.utils._torch import outside_transforms
from clear_attn.utils.validation import check_whole_number


@functools.lru_cache(maxsize=8)
def grid_permutation(grid: Grid, device: torch.device) -> Tensor:
    """Return int64 `[tokens]`; indexing one image's tokens with it puts them from raster into tile order."""
    with torch.inference_mode(False), outside_transforms():
        return to_tensor(tile_permutation(grid), device)


class Images(NamedTuple):
    """Some of a sequence's images, `grids[first:last]`: by default all, the image and its references."""

    first: int = 0
    last: int | None = None


class TokenLayout:
    """Describe the tokens of one call: their grids, the text length and their order.

    A layout does not depend on the method. Image tokens are in tile order, in which tokens that are close in the image
    are close in the sequence. The model's joint sequence has the text first or the image first.

    Args:
        grids: (height, width) in tokens of each segment; usually one, more with reference images.
        text_tokens (`int`): the number of text tokens and of others off the grid, 0 or more.
        text_first (`bool`, defaults to `True`): whether the joint sequence is [text, image] or [image, text].
        device (`torch.device` or `str`, defaults to `"cpu"`): the device of the tensors.
        unit (*optional*, defaults to the first grid): the grid with the tokens in which distances are measured.
        padding_tokens (`int`, defaults to 0): how many of the text tokens next to the image are learned padding, which
            layers without text have too.
        text_queries (`bool`, defaults to `True`): whether text tokens are queries too. If not, query and output have
            image tokens alone.

    Attributes:
        image_tokens, tokens (`int`): the number of image tokens, and of all tokens.
        text_keys, image_keys (`slice`): the positions of text and image in the joint sequence, which keys and values
            have.
        text, image (`slice`): their positions in query and output; the same, unless text tokens are only keys, not
            queries.
        permutation, inverse_permutation: int64 `[image_tokens]`; `x[permutation]` puts tokens from raster into tile
            order, `x[inverse_permutation]` puts them back.
        segments, token_set: the coordinates, on the CPU.
        shards: the shards of the layout by (rank, number of ranks), each made on first use.

    Raises:
        TypeError: a number is not a whole number.
        ValueError: there is no grid, a grid is empty, or the number of text tokens is negative.

    Examples:
        >>> layout = TokenLayout([(16, 24)], text_tokens=7)
        >>> layout.image_tokens, layout.tokens
        (384, 391)
    """

    def __init__(
        self,
        grids: Sequence[Grid],
        text_tokens: int,
        *,
        text_first: bool = True,
        device: torch.device | str = "cpu",
        unit: Grid | None = None,
        padding_tokens: int = 0,
        text_queries: bool = True,
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
        self.text_tokens = check_whole_number("text_tokens", text_tokens, "it is the number of text tokens", least=0)
        self.text_first, self.device, self.padding_tokens = text_first, torch.device(device), padding_tokens
        self.text_queries = text_queries
        self._on_other_devices: dict[torch.device, TokenLayout] = {}
        self._of_images: dict[Images, TokenLayout] = {}
        self.unit = unit or self.grids[0]
        self.segments = segments_of(self.grids, self.unit)
        self.shards: dict[tuple[int, int], Any] = {}
        self.token_set = select_rows(self.segments, [slice(0, height) for height, _ in self.grids])
        self.image_tokens = len(self.token_set.raster)
        self.tokens = self.text_tokens + self.image_tokens
        self.text_keys, self.image_keys = joint_slices(self.text_tokens, self.image_tokens, text_first)
        text_in_query = self.text_tokens if text_queries else 0
        self.text, self.image = joint_slices(text_in_query, self.image_tokens, text_first)
        # A layout that is made in inference mode may be used in training later.
        with torch.inference_mode(False):
            self.permutation = to_tensor(self.token_set.raster, self.device)
            self.inverse_permutation = to_tensor(invert_permutation(self.token_set.raster), self.device)

    def on(self, device: torch.device) -> TokenLayout:
        """Return the layout with its tensors on a device; the same object each time."""
        if device == self.device:
            return self
        if device not in self._on_other_devices:
            self._on_other_devices[device] = self._like_this(self.grids, self.text_tokens, device)
        return self._on_other_devices[device]

    @functools.cached_property
    def without_text(self) -> TokenLayout:
        """The layout of a layer that attends among image tokens, and their padding, alone."""
        if self.text_tokens == self.padding_tokens:
            return self
        return self._like_this(self.grids, self.padding_tokens, self.device)

    def of_images(self, images: Images) -> TokenLayout | None:
        """Return the layout of a layer that attends among some of the images, or None if the call has none of them."""
        grids = self.grids[images.first : images.last]
        if not grids or grids == self.grids:
            return self if grids else None
        if images not in self._of_images:
            self._of_images[images] = self._like_this(grids, self.text_tokens, self.device)
        return self._of_images[images]

    def _like_this(self, grids: Sequence[Grid], text_tokens: int, device: torch.device) -> TokenLayout:
        return TokenLayout(
            grids,
            text_tokens,
            text_first=self.text_first,
            device=device,
            unit=self.unit,
            padding_tokens=self.padding_tokens,
            text_queries=self.text_queries,
        )
