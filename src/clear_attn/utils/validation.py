"""What is asked of a model's attention; of CLEAR: the window, and the cells that pooled keys stand for."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Protocol


def check_whole_number(name: str, value: object, remedy: str, least: int = 1) -> int:
    """Returns ``value`` as an int where it is a whole number of at least ``least`` (a bool is none), else raises."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r} of type {type(value).__name__}; {remedy}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}; {remedy}")
    return int(value)


class Config(Protocol):
    """What a layout is made for: CLEAR's settings, or those of another method (`clear_attn.methods`)."""

    @property
    def window(self) -> float: ...

    @property
    def down_factor(self) -> int: ...


@dataclass(frozen=True)
class ClearConfig:
    """The two numbers of CLEAR (arXiv 2412.16112).

    Args:
        window (`int`, defaults to 16): radius r in tokens; an image query sees the image keys with
            dy^2 + dx^2 < r^2. One token is 16 x 16 pixels.
        down_factor (`int`, defaults to 1): side f of the cells, in tokens, whose weighted mean keys and
            values every image query sees as well; 1 means none.

    Raises:
        TypeError: a value is not a whole number.
        ValueError: a value is below 1.
    """

    window: int = 16
    down_factor: int = 1

    def __post_init__(self) -> None:
        remedies = {
            "window": "it is a radius in tokens, 8, 16 and 32 are usual",
            "down_factor": "it is the side of a pooled cell in tokens, 1 is none",
        }
        for name, remedy in remedies.items():
            # As Python's own int: another kind of integer, such as numpy's, may overflow.
            object.__setattr__(self, name, check_whole_number(name, getattr(self, name), remedy))
