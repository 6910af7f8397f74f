"""Models that keep a call's keywords from their layers: those wait in a context variable while the call runs."""

from __future__ import annotations

import contextvars
from typing import Any

_own_keywords: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("clear_attn", default=None)


class Untold:
    """What such families share; goes before the family."""

    def publish(self, own: dict[str, Any] | None) -> None:
        _own_keywords.set(own)


def announced() -> dict[str, Any] | None:
    """The keywords of the call that runs, or None."""
    return _own_keywords.get()
