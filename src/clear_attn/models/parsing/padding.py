"""Padded text: the score bias that hides it, and the check of its mask."""

from __future__ import annotations

from torch import Tensor

# The score bias of a hidden key: its weight e^-1000 is 0 in every floating-point dtype.
HIDDEN = -1000.0


def check_mask(name: str, mask: Tensor, shape: tuple[int, int]) -> None:
    """Raise ValueError if a mask does not have this shape."""
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(mask.shape)}; pass it as the pipeline does")
