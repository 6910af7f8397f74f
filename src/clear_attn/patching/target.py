"""Find the transformer of what a user gives."""

from __future__ import annotations

from typing import Any, TypeVar

from clear_attn.models import ADAPTERS, ModelAdapter, adapter_for
from clear_attn.utils._torch import unwrap_compiled

PipelineOrTransformer = TypeVar("PipelineOrTransformer")


def find_transformer(pipe: Any) -> tuple[Any, ModelAdapter]:
    """Return the transformer of a pipeline, or the transformer given, with its adapter.

    Raises:
        TypeError: neither is supported.
    """
    transformer = unwrap_compiled(getattr(pipe, "transformer", pipe))
    adapter = adapter_for(transformer)
    if adapter is None:
        supported = ", ".join(adapter.transformer_class for adapter in ADAPTERS)
        given = " with a ".join(dict.fromkeys([type(pipe).__name__, type(transformer).__name__]))
        if hasattr(transformer, "nets"):
            raise TypeError(f"a {given} is not supported; give its ControlNets one by one: for net in controlnet.nets")
        raise TypeError(f"a {given} is not supported; give a diffusers pipeline or transformer of: {supported}")
    return transformer, adapter
