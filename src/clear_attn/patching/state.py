"""The state that `linearize` changes in a transformer, as one value that is captured and applied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from clear_attn.models._diffusers import offload_streamed_groups, replace_config
from clear_attn.models.processors.processor import ClearAttnProcessor
from clear_attn.patching.hooks import EntryHook, ExitHook, unwrap_forward
from clear_attn.patching.target import Target, entry_hook_of
from clear_attn.utils._torch import forward_hooks, forward_pre_hooks, remove_forward_hooks
from clear_attn.weights.metadata import CONFIG_ENTRY, metadata_of
from clear_attn.weights.parameters import (
    DTYPES,
    check_in_memory,
    check_replaceable,
    copy_values,
    replaced_parameters,
)

Processor = TypeVar("Processor")


class State(NamedTuple):
    """The hook of a transformer, its processors, and the values of the parameters that are replaced.

    Attributes:
        hook: the entry hook, or None.
        processors: the attention processors by layer.
        values: the values on the CPU, by name in a checkpoint.
        metadata: the entry in the transformer's config, or None.
    """

    hook: EntryHook | None
    processors: dict[str, Any]
    values: dict[str, Tensor]
    metadata: dict[str, Any] | None


def capture(target: Target, names: Iterable[str]) -> State:
    """Return the present state, with copies of the named parameters' values."""
    offload_streamed_groups(target.transformer)
    parameters = replaced_parameters(target.layers)
    values = {name: parameters[name].detach().to("cpu", copy=True) for name in names}
    return State(target.hook, target.processors, values, metadata_of(target.transformer))


def original_state(target: Target) -> State:
    """Return the state that `restore` applies. Processors that others installed since then stay.

    Raises:
        RuntimeError: the original weights were discarded.
    """
    hook, processors = target.hook, target.processors
    if hook is None:
        return State(None, processors, {}, metadata_of(target.transformer))
    if hook.originals_discarded:
        raise RuntimeError(
            "the original weights of this pipeline were discarded by linearize(..., keep_original=False); load the "
            "pipeline again"
        )
    for layer, processor in processors.items():
        if isinstance(processor, ClearAttnProcessor):
            processors[layer] = hook.original.processors[layer]
    return State(None, processors, hook.original.values, hook.original.metadata)


def check_writable(target: Target, state: State) -> None:
    """Raise RuntimeError if the values of a state cannot be copied in."""
    if state.values:
        check_in_memory(target.transformer, target.layers)
        check_replaceable(target.layers)


def apply(target: Target, state: State) -> None:
    """Replace the present state. After an interrupt it can be called again.

    Install the hook first and remove it last, so that a partial state is always detectable.
    """
    transformer = target.transformer
    _free_kept_processors(transformer)  # while the hook that has their originals is installed
    if state.hook:
        install_hooks(transformer, state.hook)
    offload_streamed_groups(transformer)
    copy_values(state.values, target.layers)
    for layer, attn in target.layers.items():
        processor, present = state.processors[layer], attn.get_processor()
        if processor is not present:
            # Settings of set_attention_backend(), enable_parallelism() and set_ip_adapter_scale().
            ours = processor if isinstance(processor, ClearAttnProcessor) else present
            for name in getattr(ours, "layer_settings", ClearAttnProcessor.layer_settings):
                if (value := getattr(present, name, None)) is not None or hasattr(processor, name):
                    setattr(processor, name, value)
            attn.set_processor(match_device_and_dtype(processor, attn))
    offload_streamed_groups(transformer)  # the processors' parameters, too
    _set_metadata(transformer, state.metadata)
    if not state.hook:
        _remove_hooks_of_ours(transformer)


def apply_or_fall_back(target: Target, state: State, fallback: State) -> None:
    """Replace the present state. After an error or an interrupt, apply the fallback in full, then raise."""
    try:
        apply(target, state)
    except BaseException:
        apply(target, fallback)
        raise


def _free_kept_processors(transformer: Any) -> None:
    """Replace the library's processors in the copy that SD3 keeps while its projections are fused."""
    hook, kept = entry_hook_of(transformer), getattr(transformer, "original_attn_processors", None) or {}
    for key, processor in kept.items():
        if hook and isinstance(processor, ClearAttnProcessor):
            kept[key] = hook.original.processors[key.removesuffix(".processor")]


def match_device_and_dtype(processor: Processor, attn: Any) -> Processor:
    """Move a processor's own parameters to the device and dtype of its layer."""
    if isinstance(processor, ClearAttnProcessor):
        reference = next(attn.parameters())
        for weight in processor.parameters(recurse=False):
            weight.data = weight.data.to(reference.device, reference.dtype if reference.dtype in DTYPES else None)
    return processor


def _set_metadata(transformer: Any, metadata: dict[str, Any] | None) -> None:
    others = {name: value for name, value in transformer.config.items() if name != CONFIG_ENTRY}
    replace_config(transformer, {**others, **({CONFIG_ENTRY: metadata} if metadata else {})})


def install_hooks(transformer: Any, hook: EntryHook) -> None:
    """Install an entry hook. It takes the place of an old one, so that others' hooks keep their order."""
    present = [key for key, each in forward_pre_hooks(transformer).items() if isinstance(each, EntryHook)]
    # The entry hook first: it finds the others if an interrupt leaves some out.
    if present:
        wanted = hook.inner_hooks(transformer)
        for inner in forward_pre_hooks(transformer)[present[0]].inner_hooks(transformer):
            if inner not in wanted:
                inner.remove()
        forward_pre_hooks(transformer)[present[0]] = hook
    else:
        transformer.register_forward_pre_hook(hook, with_kwargs=True)
    if not any(isinstance(each, ExitHook) for each in forward_hooks(transformer).values()):
        transformer.register_forward_hook(ExitHook(hook.adapter), with_kwargs=True, prepend=True)
    for inner in hook.inner_hooks(transformer):
        if not inner.installed():
            inner.install()


def _remove_hooks_of_ours(transformer: Any) -> None:
    """Remove our hooks by class: torch's own handles do not survive a deep copy of the transformer."""
    hook = entry_hook_of(transformer)
    if hook:
        hook.adapter.release(transformer)
        unwrap_forward(transformer)
    for inner in hook.inner_hooks(transformer) if hook else ():
        inner.remove()
    remove_forward_hooks(transformer, lambda each: isinstance(each, (EntryHook, ExitHook)))
