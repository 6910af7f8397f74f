"""The private names of diffusers that clear_attn uses, each behind one function. No other file names one.

Docstrings say in which versions a name was read. A name that is gone raises an error that says so, or gives a safe
answer where there is one. `_attention_backend` and `_parallel_config` are declared on processors as well, where
diffusers looks for them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.attention_dispatch import AttentionBackendName

READ_IN = "0.36 to 0.42"

try:
    from diffusers.hooks.first_block_cache import FBCHeadBlockHook
    from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
    from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceHook
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry
except ImportError as error:
    raise ImportError(
        f"diffusers {diffusers.__version__} has changed a private name that clear_attn uses ({error}); install "
        f"diffusers {READ_IN}"
    ) from error


def _private(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        raise RuntimeError(
            f"diffusers {diffusers.__version__} has no {name} on a {type(owner).__name__}, which clear_attn uses; "
            f"install diffusers {READ_IN}"
        ) from None


def diffusers_version() -> tuple[int, int]:
    """The first two numbers of the version that is installed (diffusers 0.36 to 0.42)."""
    major, minor = diffusers.__version__.split(".")[:2]
    return int(major), int(minor)


def load_pretrained(loader: Any, name: str | os.PathLike[str], *, dtype: torch.dtype, **options: Any) -> Any:
    """Load a pipeline or model of a class of diffusers in a dtype (diffusers 0.36 to 0.42).

    Before 0.40, diffusers calls the dtype `torch_dtype`, and ignores `dtype` without a warning.
    """
    keyword = "dtype" if diffusers_version() >= (0, 40) else "torch_dtype"
    return loader.from_pretrained(name, **{keyword: dtype}, **options)


def active_attention_backend() -> AttentionBackendName:
    """The attention backend of layers that were given none of their own (diffusers 0.36 to 0.42)."""
    return _AttentionBackendRegistry.get_active_backend()[0]


def attention_backend_of(processor: Any) -> AttentionBackendName | None:
    """What `set_attention_backend` gave an attention processor, or None (diffusers 0.36 to 0.42)."""
    backend: AttentionBackendName | None = getattr(processor, "_attention_backend", None)
    return backend


def parallel_config_of(processor: Any) -> Any:
    """The settings of context parallelism of an attention processor, or None (diffusers 0.36 to 0.42)."""
    return getattr(processor, "_parallel_config", None)


def hooks_in(module: Any) -> Iterator[Any]:
    """The hooks that diffusers has put on a module and on all inside it (diffusers 0.36 to 0.42)."""
    for inner in module.modules():
        yield from getattr(getattr(inner, "_diffusers_hook", None), "hooks", {}).values()


def remove_hook(module: Any, name: str) -> None:
    """Remove a hook by its name in the registry of diffusers, where the module has one (diffusers 0.36 to 0.42)."""
    if (registry := getattr(module, "_diffusers_hook", None)) is not None:
        registry.remove_hook(name, recurse=False)


def innermost_forward(module: Any) -> Any:
    """The `forward` of a module inside all hooks that diffusers has put on it (diffusers 0.36 to 0.42)."""
    references = getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ())
    return (references[0].original_forward or references[0].forward) if references else module.forward


def set_innermost_forward(module: Any, forward: Any) -> None:
    """Replace the `forward` of a module inside all hooks that diffusers has put on it (diffusers 0.36 to 0.42)."""
    references = getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ())
    owner = references[0] if references else module
    name = "original_forward" if references and owner.original_forward else "forward"
    setattr(owner, name, forward)


def is_hooked(module: Any) -> bool:
    """Whether diffusers has put hooks on a module itself, around its `forward` (diffusers 0.36 to 0.42)."""
    return bool(getattr(getattr(module, "_diffusers_hook", None), "hooks", {}))


def is_first_block_cache(hook: Any) -> bool:
    """Whether a hook is that of `apply_first_block_cache` which decides on skipping a step (diffusers 0.36 to 0.42)."""
    return isinstance(hook, FBCHeadBlockHook)


def skips_attention(hook: Any) -> bool:
    """Whether a hook skips attention, or its scores, inside a layer (diffusers 0.36 to 0.42)."""
    return type(hook) is AttentionProcessorSkipHook


def smooths_queries(hook: Any) -> bool:
    """Whether a hook is that of smoothed energy guidance (diffusers 0.36 to 0.42)."""
    return type(hook) is SmoothedEnergyGuidanceHook


def replace_config(model: Any, values: Mapping[str, Any]) -> None:
    """Set all entries of a model's config: the public way can add entries and not remove one (diffusers 0.36 to 0.42).

    Attributes that others set on the config, as diffusers does for a LoRA that widens a layer, stay.
    """
    before, after = _private(model, "_internal_dict"), FrozenDict(values)
    for name, value in vars(before).items():
        if name not in before or value is not before[name]:
            setattr(after, name, value)
    model._internal_dict = after


def name_or_path_of(config: Mapping[str, Any]) -> str:
    """The Hub id or folder that a model or pipeline was loaded from, "" if it has none (diffusers 0.36 to 0.42)."""
    return str(config.get("_name_or_path") or "")


def execution_device_of(pipe: Any) -> torch.device:
    """The device that a pipeline computes on; under offload, `pipe.device` is another (diffusers 0.36 to 0.42)."""
    return torch.device(_private(pipe, "_execution_device"))


def progress_bar_config_of(pipe: Any) -> dict[str, Any]:
    """What `set_progress_bar_config` was given; empty where that was not called (diffusers 0.36 to 0.42)."""
    config: dict[str, Any] = getattr(pipe, "_progress_bar_config", {})
    return config


def reset_interrupt(pipe: Any) -> None:
    """Forget an interrupt of an earlier call, as a call of a pipeline does when it begins (diffusers 0.36 to 0.42)."""
    pipe._interrupt = False


def checkpointing_function(model: Any) -> Any:
    """The function by which a model checkpoints its blocks, None where that is not enabled (diffusers 0.36 to 0.42)."""
    return getattr(model, "_gradient_checkpointing_func", None) if model.gradient_checkpointing else None


def set_checkpointing_function(model: Any, function: Any) -> None:
    """Replace the function by which a model checkpoints its blocks (diffusers 0.36 to 0.42)."""
    model._gradient_checkpointing_func = function
