"""Checks of arguments."""

from __future__ import annotations

import numbers


def check_whole_number(name: str, value: object, remedy: str, least: int = 1) -> int:
    """Return a whole number as an int.

    Args:
        name: of the argument, for errors.
        value: what was given; a bool is not a number.
        remedy: what the number is, for errors.
        least: the smallest number that is allowed.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is less than ``least``.

    Examples:
        >>> check_whole_number("window", 8, "it is a radius in tokens")
        8
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r} of type {type(value).__name__}; {remedy}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}; {remedy}")
    return int(value)
