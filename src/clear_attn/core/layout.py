"""The tokens of one call: which grids, how much text, and the permutation into tile order. It knows no window."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clear_attn.core.coordinates import (
    Grid,
    invert_permutation,
    segments_of,
    select_rows,
    tile_permutation,
    to_tensor,
)
from clear_attn.utils._torch import outside_transforms
from clear_attn.utils.validation import check_whole_number


@functools.lru_cache(maxsize=16)
def grid_permutation(grid: Grid, device: torch.device) -> Tensor:
    """Return int64 `[tokens]`: `x[grid_permutation]` puts the tokens of one image from raster into tile order."""
    with torch.inference_mode(False), outside_transforms():
        return to_tensor(tile_permutation(grid), device)


class TokenLayout:
    """Everything about the tokens of one call that depends neither on their values nor on how they attend.

    Image tokens are in tile order. Text and image are joined as the model joins them, text first or image first.

    Args:
        grids: (height, width) in tokens of each segment; usually one.
        text_tokens: number of tokens off the grid, 0 or more.
        text_first (`bool`, defaults to `True`): whether the joint sequence is [text, image] or [image, text].
        device (`torch.device` or `str`, defaults to `"cpu"`): where the tensors are.

    Attributes:
        image_tokens, tokens (`int`): the number of image tokens, and of all.
        image, text (`slice`): where they are in the joint sequence.
        permutation, inverse_permutation: int64 `[image_tokens]`; `x[permutation]` puts raster order into tile order,
            `x[inverse_permutation]` undoes it.
        segments, token_set: coordinates on the CPU.
        shards: the parts of it that ranks have, by (rank, number of ranks), each made when it is first needed.

    Raises:
        TypeError: a number that is not whole.
        ValueError: no grid, an empty grid, or a negative number of text tokens.

    Example:
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
        self.text_first, self.device = text_first, torch.device(device)
        self._elsewhere: dict[torch.device, TokenLayout] = {}
        self.segments = segments_of(self.grids)
        self.shards: dict[tuple[int, int], Any] = {}
        self.token_set = select_rows(self.segments, [slice(0, height) for height, _ in self.grids])
        self.image_tokens = len(self.token_set.raster)
        self.tokens = self.text_tokens + self.image_tokens
        first = self.text_tokens if text_first else 0
        self.image = slice(first, first + self.image_tokens)
        first = 0 if text_first else self.image_tokens
        self.text = slice(first, first + self.text_tokens)
        # A layout made under inference mode must serve training too.
        with torch.inference_mode(False):
            self.permutation = to_tensor(self.token_set.raster, self.device)
            self.inverse_permutation = to_tensor(invert_permutation(self.token_set.raster), self.device)

    def on(self, device: torch.device) -> TokenLayout:
        """Return the layout with its tensors on a device, the same one for each call."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = TokenLayout(
                self.grids, self.text_tokens, text_first=self.text_first, device=device
            )
        return self._elsewhere[device]

    @functools.cached_property
    def without_text(self) -> TokenLayout:
        """The layout of a layer that attends among image tokens alone."""
        if not self.text_tokens:
            return self
        return TokenLayout(self.grids, 0, text_first=self.text_first, device=self.device)
