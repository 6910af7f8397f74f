"""Gradient checkpointing for models with layers that read the context from the context variable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from clear_attn.models._diffusers import checkpointing_function, set_checkpointing_function
from clear_attn.models.context.context_variable import current, published


class ContextCheckpoint:
    """Wrap a gradient checkpointing function so that recomputations read the context of their own call.

    The function may be reentrant or not. The wrapper holds no state of a call; outside a call it only calls the
    function.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    # Tracing this would make the context a constant of the graph, and run the operator again in the backward graph.
    # The blocks inside are still compiled.
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
    """Wrap the model's checkpointing function. The entry hook does it, so users may enable checkpointing any time."""
    function = checkpointing_function(transformer)
    if function is not None and not isinstance(function, ContextCheckpoint):
        set_checkpointing_function(transformer, ContextCheckpoint(function))


def unwrap_checkpointing(transformer: Any) -> None:
    """Undo `wrap_checkpointing`."""
    function = checkpointing_function(transformer)
    if isinstance(function, ContextCheckpoint):
        set_checkpointing_function(transformer, function.function)
