"""Numbers as text in the units that fit them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Units(NamedTuple):
    """The names of a unit and its multiples, each `base` times the one before."""

    names: tuple[str, ...]
    base: int


FLOPS = Units(("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs", "EFLOPs"), 1000)
BYTES = Units(("B", "KiB", "MiB", "GiB", "TiB"), 1024)


def in_units(values: Sequence[float], units: Units, digits: int) -> tuple[list[str], str]:
    """Return numbers as text in one unit that fits the largest, and the unit.

    Args:
        values: at least 0, in the first unit.
        units: to choose from.
        digits: significant digits of the largest number; the others have as many decimals.

    Examples:
        >>> in_units([52_776_558_133_248, 605_250_256_896], FLOPS, 4)
        (['52.78', '0.61'], 'TFLOPs')
    """
    largest, power = max(values), 0
    # What would be rounded up to the base is written in the next unit.
    while round(largest / units.base**power, 1) >= units.base and power < len(units.names) - 1:
        power += 1
    scaled = [value / units.base**power for value in values]
    decimals = max(0, digits - len(str(int(max(scaled))))) if power else 0
    return [f"{value:,.{decimals}f}" for value in scaled], units.names[power]


def format_bytes(*sizes: float) -> str:
    """Return bytes as text, several as a range.

    Examples:
        >>> format_bytes(2 * 2**30, 7.6 * 2**30)
        '2.00 to 7.60 GiB'
    """
    numbers, unit = in_units(sizes, BYTES, 3)
    return f"{' to '.join(numbers)} {unit}"
