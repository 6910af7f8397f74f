"""Functions that use private names of diffusers. No other file uses one.

Docstrings give the versions in which a name was read. If a name is missing, the function raises an error or returns a
safe default. Processors also declare `_attention_backend` and `_parallel_config`, because diffusers reads them there.
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
    """Return the major and minor version of the installed diffusers (diffusers 0.36 to 0.42)."""
    major, minor = diffusers.__version__.split(".")[:2]
    return int(major), int(minor)


def require_diffusers(what: str, first: tuple[int, int]) -> None:
    """Check that the installed diffusers is of this version or later (diffusers 0.36 to 0.42).

    Raises:
        TypeError: it is older.
    """
    if diffusers_version() < first:
        needed, installed = (".".join(map(str, each)) for each in (first, diffusers_version()))
        raise TypeError(
            f"{what} is supported with diffusers {needed} and later, not with {installed}, which is installed; call "
            f"pip install 'diffusers>={needed}'"
        )


def load_pretrained(loader: Any, name: str | os.PathLike[str], *, dtype: torch.dtype, **options: Any) -> Any:
    """Load a pipeline or model of a class of diffusers in a dtype (diffusers 0.36 to 0.42).

    Before 0.40, diffusers calls the dtype `torch_dtype`. A pipeline there ignores `dtype`, with a line in the log; a
    model raises a TypeError.
    """
    keyword = "dtype" if diffusers_version() >= (0, 40) else "torch_dtype"
    return loader.from_pretrained(name, **{keyword: dtype}, **options)


def load_modular(name: str | os.PathLike[str], *, dtype: torch.dtype, **options: Any) -> Any | None:
    """Load a modular pipeline with its components; None if there is none of this name (diffusers 0.36 to 0.42).

    Before 0.42, diffusers has no modular pipelines of the models here.
    """
    if diffusers_version() < (0, 42):
        return None
    try:
        pipe = diffusers.ModularPipeline.from_pretrained(name, **options)
    except OSError:
        return None
    pipe.load_components(dtype=dtype)
    return pipe


def active_attention_backend() -> AttentionBackendName:
    """Return the attention backend of layers without their own (diffusers 0.36 to 0.42)."""
    return _AttentionBackendRegistry.get_active_backend()[0]


def attention_backend_of(processor: Any) -> AttentionBackendName | None:
    """Return the backend that `set_attention_backend` set on a processor, or None (diffusers 0.36 to 0.42)."""
    backend: AttentionBackendName | None = getattr(processor, "_attention_backend", None)
    return backend


def parallel_config_of(processor: Any) -> Any:
    """Return the context-parallel settings of an attention processor, or None (diffusers 0.36 to 0.42)."""
    return getattr(processor, "_parallel_config", None)


def hooks_in(module: Any) -> Iterator[Any]:
    """Yield the hooks that diffusers has put on a module and its submodules (diffusers 0.36 to 0.42)."""
    for inner in module.modules():
        yield from getattr(getattr(inner, "_diffusers_hook", None), "hooks", {}).values()


def offload_streamed_groups(module: Any) -> None:
    """Move the groups of group offload with `use_stream=True` to RAM, and register parameters that were added later.

    Such a group keeps its values in RAM, and offloading drops its copy on the GPU. An interrupted call leaves groups on
    the GPU; values written to them there would be lost (diffusers 0.36 to 0.42).
    """
    for hook in hooks_in(module):
        group: Any = getattr(hook, "group", None)
        if getattr(group, "stream", None) is None or group.offload_to_disk_path:
            continue
        for parameter in (each for inner in group.modules for each in inner.parameters()):
            if parameter not in group.cpu_param_dict:
                group.cpu_param_dict[parameter] = parameter.data.cpu()
        group.offload_()
        # Pins the new parameters as the others, and forgets those of removed processors.
        group.cpu_param_dict = group._init_cpu_param_dict()
        group.offload_()


def remove_hook(module: Any, name: str) -> None:
    """Remove a hook by its name in the registry of diffusers, where the module has one (diffusers 0.36 to 0.42)."""
    if (registry := getattr(module, "_diffusers_hook", None)) is not None:
        registry.remove_hook(name, recurse=False)


def innermost_forward(module: Any) -> Any:
    """Return the `forward` of a module inside all of its diffusers hooks (diffusers 0.36 to 0.42)."""
    references = getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ())
    return (references[0].original_forward or references[0].forward) if references else module.forward


def set_innermost_forward(module: Any, forward: Any) -> None:
    """Replace the `forward` of a module inside all hooks that diffusers has put on it (diffusers 0.36 to 0.42)."""
    references = getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ())
    owner = references[0] if references else module
    name = "original_forward" if references and owner.original_forward else "forward"
    setattr(owner, name, forward)


def is_hooked(module: Any) -> bool:
    """Return whether diffusers has put hooks around the `forward` of a module itself (diffusers 0.36 to 0.42)."""
    return bool(getattr(getattr(module, "_diffusers_hook", None), "hooks", {}))


def is_first_block_cache(hook: Any) -> bool:
    """Return whether a hook of `apply_first_block_cache` decides on skipping a step (diffusers 0.36 to 0.42)."""
    return isinstance(hook, FBCHeadBlockHook)


def skips_attention(hook: Any) -> bool:
    """Return whether a hook skips attention, or its scores, inside a layer (diffusers 0.36 to 0.42)."""
    return type(hook) is AttentionProcessorSkipHook


def smooths_queries(hook: Any) -> bool:
    """Return whether a hook belongs to smoothed energy guidance (diffusers 0.36 to 0.42)."""
    return type(hook) is SmoothedEnergyGuidanceHook


def replace_config(model: Any, values: Mapping[str, Any]) -> None:
    """Set all entries of a model's config; the public function cannot remove one (diffusers 0.36 to 0.42).

    Attributes that others set on the config, as diffusers does for a LoRA that widens a layer, stay.
    """
    before, after = _private(model, "_internal_dict"), FrozenDict(values)
    for name, value in vars(before).items():
        if name not in before or value is not before[name]:
            setattr(after, name, value)
    model._internal_dict = after


def name_or_path_of(config: Mapping[str, Any]) -> str:
    """Return the Hub id or folder that a model or pipeline was loaded from, or "" (diffusers 0.36 to 0.42)."""
    return str(config.get("_name_or_path") or "")


def execution_device_of(pipe: Any) -> torch.device:
    """Return the device that a pipeline computes on, not `pipe.device` under offload (diffusers 0.36 to 0.42)."""
    return torch.device(_private(pipe, "_execution_device"))


def progress_bar_config_of(pipe: Any) -> dict[str, Any]:
    """Return the settings of `set_progress_bar_config`, empty if it was not called (diffusers 0.36 to 0.42)."""
    config: dict[str, Any] = getattr(pipe, "_progress_bar_config", {})
    return config


def reset_interrupt(pipe: Any) -> None:
    """Reset the interrupt of an earlier call, as a call of the pipeline does (diffusers 0.36 to 0.42)."""
    pipe._interrupt = False


def is_interrupted(pipe: Any) -> bool:
    """Return whether a callback or another thread stopped a call of the pipeline (diffusers 0.36 to 0.42)."""
    return bool(getattr(pipe, "_interrupt", False))


def skip_remaining_steps(pipe: Any) -> None:
    """Let the call that runs decode its latents as they are (diffusers 0.36 to 0.42)."""
    pipe._interrupt = True


def name_of_sequence_method(model: Any) -> str:
    """Return the method that makes the sequences of Z-Image, which 0.36 does not have (diffusers 0.36 to 0.42)."""
    _private(model, "_prepare_sequence")
    return "_prepare_sequence"


def checkpointing_function(model: Any) -> Any:
    """Return the function with which a model checkpoints its blocks, None if disabled (diffusers 0.36 to 0.42)."""
    return getattr(model, "_gradient_checkpointing_func", None) if model.gradient_checkpointing else None


def set_checkpointing_function(model: Any, function: Any) -> None:
    """Replace the function by which a model checkpoints its blocks (diffusers 0.36 to 0.42)."""
    model._gradient_checkpointing_func = function
