"""Check the class of a value by name, without importing the class."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

DIFFUSERS = ("diffusers",)


def is_instance(value: Any, names: Collection[str], packages: Collection[str] = DIFFUSERS) -> bool:
    """Return whether a value is an instance of a class, or of a subclass, with one of these names and packages."""
    return class_of(value, names, packages) is not None


def class_of(value: Any, names: Collection[str], packages: Collection[str] = DIFFUSERS) -> type | None:
    """Return the class, among a value's class and its bases, that has one of these names, or None."""
    return next((cls for cls in type(value).__mro__ if _is_named(cls, names, packages)), None)


def is_exactly(value: Any, names: Collection[str], packages: Collection[str] = DIFFUSERS) -> bool:
    """Return whether a value's own class has one of these names and is defined in one of these packages."""
    return _is_named(type(value), names, packages)


def _is_named(cls: type, names: Collection[str], packages: Collection[str]) -> bool:
    return cls.__name__ in names and cls.__module__.partition(".")[0] in packages
