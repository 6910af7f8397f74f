"""Recognize classes of diffusers by name, so that none is imported before it is used."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def is_instance(value: Any, names: Collection[str]) -> bool:
    """Return whether a value is an instance of a diffusers class with one of these names, or of a subclass."""
    return any(_is_named(cls, names) for cls in type(value).__mro__)


def is_exactly(value: Any, names: Collection[str]) -> bool:
    """Return whether a value's own class is a diffusers class with one of these names."""
    return _is_named(type(value), names)


def _is_named(cls: type, names: Collection[str]) -> bool:
    return cls.__name__ in names and cls.__module__.partition(".")[0] == "diffusers"
