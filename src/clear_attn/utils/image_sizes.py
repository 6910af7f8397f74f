"""Sizes of images in pixels, height first."""

from __future__ import annotations

import warnings

Size = tuple[int, int]


def format_size(size: Size) -> str:
    """Return a size as text."""
    return f"{size[0]} x {size[1]} px"


def round_down(size: Size, token: int, stacklevel: int) -> Size:
    """Return a size rounded down to whole tokens, as diffusers does; warn if that changes it.

    Args:
        size: height and width in pixels.
        token: the side of a token in pixels.
        stacklevel: of the warning, 1 for the caller.

    Raises:
        ValueError: it is less than a token.

    Examples:
        >>> round_down((1024, 512), 16, stacklevel=1)
        (1024, 512)
    """
    if min(size) < token:
        raise ValueError(f"{format_size(size)} is less than one token of {token} px; give the size in pixels")
    whole = size[0] // token * token, size[1] // token * token
    if whole != size:
        message = f"{format_size(size)} is not a multiple of {token} px; it is rounded down to {format_size(whole)}"
        warnings.warn(message, stacklevel=stacklevel + 1)
    return whole
