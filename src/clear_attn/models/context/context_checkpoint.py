"""Gradient checkpointing for models whose layers read their call's context from the context variable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from clear_attn.models._diffusers import checkpointing_function, set_checkpointing_function
from clear_attn.models.context.context_variable import current, published


class ContextCheckpoint:
    """A gradient checkpointing function whose recomputations read the context of their own call.

    It wraps the one that diffusers or the user set, reentrant or not. It has no state of a call: outside a call it is
    the function that it wraps.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    # Were it traced with the transformer, the context would be a constant of the graph, and the compiler would run
    # the operator again in the backward graph. The blocks inside are compiled all the same.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        context = current()
        if context is None:
            return self.function(block, *args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            with published(context):
                return block(*args, **kwargs)

        return self.function(run, *args, **kwargs)


def wrap_checkpointing(transformer: Any) -> None:
    """Make recomputations read their call's context; the entry hook does it, so it may be enabled at any time."""
    function = checkpointing_function(transformer)
    if function is not None and not isinstance(function, ContextCheckpoint):
        set_checkpointing_function(transformer, ContextCheckpoint(function))


def unwrap_checkpointing(transformer: Any) -> None:
    """Undo `wrap_checkpointing`."""
    function = checkpointing_function(transformer)
    if isinstance(function, ContextCheckpoint):
        set_checkpointing_function(transformer, function.function)
