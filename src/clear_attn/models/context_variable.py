"""Models that do not pass attention keywords to their layers: the context waits in a variable while a call runs."""

from __future__ import annotations

import contextvars

from clear_attn.models.context import ClearContext

_context: contextvars.ContextVar[ClearContext | None] = contextvars.ContextVar("clear_attn", default=None)


class Publishes:
    """What adapters of such models share; a base before the adapter."""

    def publish(self, context: ClearContext | None) -> None:
        """Make a context readable by `published`, or none."""
        _context.set(context)


def published() -> ClearContext | None:
    """Return the context of the call that runs, or None."""
    return _context.get()
