"""Find the transformer of a pipeline, once per call of a public function."""

from __future__ import annotations

import os
from typing import Any, NamedTuple, TypeVar

from clear_attn.models import ADAPTERS, ModelAdapter, adapter_for
from clear_attn.models.class_names import is_instance
from clear_attn.patching.hooks import EntryHook
from clear_attn.utils._torch import forward_pre_hooks, unwrap_compiled

PipelineOrTransformer = TypeVar("PipelineOrTransformer")


class Target(NamedTuple):
    """The transformer that a public function changes, with its adapter and layers.

    Attributes:
        pipe: the pipeline or transformer as given.
        transformer, adapter: the transformer of `pipe` and its adapter.
        layers: the attention modules by name.
    """

    pipe: Any
    transformer: Any
    adapter: ModelAdapter
    layers: dict[str, Any]

    @property
    def model(self) -> str:
        """The class of the transformer."""
        return type(self.transformer).__name__

    @property
    def hook(self) -> EntryHook | None:
        """The hook that `linearize` installed, or None."""
        return entry_hook_of(self.transformer)

    @property
    def processors(self) -> dict[str, Any]:
        """The attention processors by layer."""
        return processors_of(self.layers)


def find_target(pipe: Any) -> Target:
    """Return the transformer of a pipeline, or the transformer given, with its adapter and attention layers.

    Raises:
        TypeError: neither is supported.
        RuntimeError: the pipeline has no transformer yet.
    """
    transformer, adapter = find_transformer(pipe)
    return Target(pipe, transformer, adapter, adapter.attention_layers(transformer))


def find_transformer(pipe: Any) -> tuple[Any, ModelAdapter]:
    """Return the transformer of a pipeline, or the transformer given, with its adapter.

    Raises:
        TypeError: neither is supported, or not with the installed version of diffusers.
        RuntimeError: the pipeline has no transformer yet.
    """
    if isinstance(pipe, (str, os.PathLike)):
        raise TypeError(
            f"{os.fspath(pipe)!r} is a name, not a pipeline; load it first: "
            f"pipe = diffusers.DiffusionPipeline.from_pretrained({os.fspath(pipe)!r})"
        )
    transformer = unwrap_compiled(getattr(pipe, "transformer", pipe))
    if transformer is None and pipe is not None:
        raise RuntimeError(f"this {type(pipe).__name__} has no transformer yet; {_how_to_load(pipe)}")
    adapter = adapter_for(transformer)
    if adapter is None:
        supported = ", ".join(adapter.transformer_class for adapter in ADAPTERS)
        given = " with a ".join(dict.fromkeys([type(pipe).__name__, type(transformer).__name__]))
        if hasattr(transformer, "nets"):
            raise TypeError(f"a {given} is not supported; give its ControlNets one by one: for net in controlnet.nets")
        raise TypeError(f"a {given} is not supported; give a diffusers pipeline or transformer of: {supported}")
    adapter.check_version()
    return transformer, adapter


def _how_to_load(pipe: Any) -> str:
    if is_instance(pipe, ("ModularPipeline",)):
        return (
            'call pipe.load_components("transformer") first, or pipe.update_components(transformer=...) with one of '
            "your own"
        )
    return "load it without transformer=None"


def entry_hook_of(transformer: Any) -> EntryHook | None:
    """Return the hook that `linearize` installed, or None."""
    return next((hook for hook in forward_pre_hooks(transformer).values() if isinstance(hook, EntryHook)), None)


def processors_of(layers: Any) -> dict[str, Any]:
    """Return the attention processors by layer."""
    return {layer: attn.get_processor() for layer, attn in layers.items()}
