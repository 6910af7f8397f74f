"""Checks of arguments."""

from __future__ import annotations

import numbers

from clear_attn.utils.json_records import shorten

# Above any size of an image in tokens or pixels, and small enough that its square is a 64-bit integer.
LARGEST = 2**20
# The largest seed of a generator in torch.
LARGEST_SEED = 2**64 - 1


def check_whole_number(name: str, value: object, remedy: str, least: int = 1, most: int = LARGEST) -> int:
    """Return a whole number from ``least`` to ``most`` as an int.

    Args:
        name: the name of the argument, for errors.
        value: the value to check; a bool is not a number.
        remedy: the meaning of the number, for errors.
        least, most: the smallest and the largest allowed number.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is out of range.

    Examples:
        >>> check_whole_number("window", 0, "it is a radius in tokens")
        Traceback (most recent call last):
        ValueError: window must be at least 1, got 0; it is a radius in tokens
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r} of type {type(value).__name__}; {remedy}")
    number = int(value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {shorten(number)}; {remedy}")
    if number > most:
        raise ValueError(f"{name} must be at most {most}, got {shorten(number)}; {remedy}")
    return number


def check_no_revision(revision: str | None, reason: str) -> None:
    """Raise ValueError for a revision of what is not on the Hub; the reason says so.

    Examples:
        >>> check_no_revision("v2", "my-weights is on this machine")
        Traceback (most recent call last):
        ValueError: revision='v2' is a version on the Hub, and my-weights is on this machine; leave revision out
    """
    if revision is not None:
        raise ValueError(f"revision={revision!r} is a version on the Hub, and {reason}; leave revision out")
