"""What reaches into attention from outside in a way that CLEAR cannot honour, found out and named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clear_attn.models._diffusers import hooks_in, parallel_config_of, skips_attention, smooths_queries
from clear_attn.models.adapter import ModelAdapter
from clear_attn.models.class_names import is_exactly, is_instance

# Hooks that diffusers' guiders and caches put on attention layers and projections, and what they take for granted.
_HOOKS = {
    smooths_queries: "smooths queries as if they stood row by row (smoothed energy guidance)",
    skips_attention: "skips attention, or its scores, inside a layer (perturbed attention guidance does)",
}


def check_pipeline(pipe: Any) -> None:
    """Raise RuntimeError for a pipeline that exchanges attention processors while it runs."""
    if is_instance(pipe, ("PAGMixin",)):
        raise RuntimeError(
            f"a {type(pipe).__name__} puts processors of perturbed attention guidance in the place of CLEAR's; use the "
            "pipeline without PAG, made from pipe.components"
        )


def check_processors(processors: Mapping[str, Any], adapter: ModelAdapter) -> None:
    """Raise RuntimeError for a processor that CLEAR's cannot replace."""
    for layer, processor in processors.items():
        if not is_exactly(processor, (*adapter.accepts, *adapter.ip_adapter_processors), adapter.packages):
            raise RuntimeError(
                f"{layer} has a {type(processor).__name__}, whose work CLEAR's processor would drop; take it off first "
                "(an IP-Adapter by pipe.unload_ip_adapter()), or load the pipeline again, then linearize"
            )


def check_parallelism(processors: Mapping[str, Any]) -> None:
    """Raise RuntimeError under diffusers' context parallelism."""
    for layer, processor in processors.items():
        if parallel_config_of(processor) is not None:
            raise RuntimeError(
                f"{layer} runs under diffusers' context parallelism, which splits the sequence without regard to "
                "windows; linearize a pipeline without it"
            )


def check_hooks(layers: Mapping[str, Any]) -> None:
    """Raise RuntimeError for a hook on a layer's attention that would not do its work."""
    for layer, attn in layers.items():
        for hook in hooks_in(attn):
            effect = next((effect for matches, effect in _HOOKS.items() if matches(hook)), None)
            if effect:
                raise RuntimeError(
                    f"{layer} has a {type(hook).__name__}, which {effect} and does not go with CLEAR; take it off, or "
                    "clear_attn.restore() the model"
                )
