"""Padding in the text: what is added to the scores of its keys."""

from __future__ import annotations

from torch import Tensor

# Added to a score, it leaves a weight of e^-1000 next to what is attended to, 0 in every floating point.
HIDDEN = -1000.0


def check_mask(name: str, mask: Tensor, shape: tuple[int, int]) -> None:
    """Raise ValueError for a mask of another shape."""
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(mask.shape)}; pass it as the pipeline does")
