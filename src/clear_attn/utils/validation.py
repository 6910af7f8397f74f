"""Checks of arguments."""

from __future__ import annotations

import numbers


def check_whole_number(name: str, value: object, remedy: str, least: int = 1) -> int:
    """Returns ``value`` as an int where it is a whole number of at least ``least`` (a bool is none), else raises."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r} of type {type(value).__name__}; {remedy}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}; {remedy}")
    return int(value)
