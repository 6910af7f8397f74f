"""The sizes of a cascade, in pixels: what a model can draw, what comes first, what lies between."""

from __future__ import annotations

import math
import warnings

from clear_attn.cascade.stages import LARGEST_STEP

Size = tuple[int, int]

# As much of its height or width as a picture may lose by being enlarged to another size.
LARGEST_DISTORTION = 0.05


def name(size: Size) -> str:
    return f"{size[0]} x {size[1]} px"


def rounded(size: Size, token: int) -> Size:
    """A size in whole tokens, rounded down as diffusers does, with a warning where that changes it.

    Raises:
        ValueError: less than a token.
    """
    if min(size) < token:
        raise ValueError(f"{name(size)} is less than one token of {token} px; give the size in pixels")
    whole = size[0] // token * token, size[1] // token * token
    if whole != size:
        warnings.warn(f"{name(size)} is no multiple of {token} px; drawing {name(whole)}", stacklevel=4)
    return whole


def base_size(size: Size, native: int, token: int) -> Size:
    """The size with the native length as its longer side, in whole tokens."""
    height, width = (max(1, round(side * native / max(size) / token)) * token for side in size)
    return height, width


def between(first: Size, last: Size, token: int) -> list[Size]:
    """The sizes of the fewest stages that each grow by the same factor, of about four at most, the last included."""
    growth = max(last[0] / first[0], last[1] / first[1])
    # A base image that was rounded down is not what a further stage is for.
    count = max(1, math.ceil(math.log(growth, LARGEST_STEP) - 0.05))
    sizes = [
        (
            round(first[0] * (last[0] / first[0]) ** (number / count) / token) * token,
            round(first[1] * (last[1] / first[1]) ** (number / count) / token) * token,
        )
        for number in range(1, count)
    ]
    return [*sizes, last]


def check_grows(before: Size, after: Size) -> None:
    """Raises ValueError where a size is smaller than the one before it."""
    if after[0] < before[0] or after[1] < before[1]:
        raise ValueError(
            f"a stage of {name(after)} is smaller than the {name(before)} before it; let stages grow, or start from a "
            "smaller image"
        )


def check_aspect_ratio(before: Size, after: Size, token: int) -> None:
    """Raises ValueError where a size is of another aspect ratio than the one before it.

    Where the longer sides agree, the shorter ones may be less than a token of the smaller size apart, and less than
    5 %.
    """
    sides = before[0] * after[1], before[1] * after[0]
    apart = abs(sides[0] - sides[1])
    if apart >= token * max(after) or apart >= LARGEST_DISTORTION * max(sides):
        share = min(before[0] / after[0], before[1] / after[1])
        wanted = round(after[0] * share), round(after[1] * share)
        raise ValueError(
            f"{name(before)} has another aspect ratio than {name(after)}; crop it to {name(wanted)}, or ask for "
            "another size"
        )
