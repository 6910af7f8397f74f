"""What linearizing changes in a transformer, taken down and put in place as one value."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from clear_attn.models.processors import AttnProcessor
from clear_attn.patching.hooks import DoorIn, DoorOut
from clear_attn.weights.metadata import MARK, mark_of
from clear_attn.weights.parameters import (
    DTYPES,
    check_in_memory,
    check_replaceable,
    copy_values,
    replaced_parameters,
)

Processor = TypeVar("Processor")


class State(NamedTuple):
    """The door of a transformer, its processors, and the values of those parameters that are at stake.

    Attributes:
        door: the entrance hook, or None where there is none.
        processors: by layer.
        values: by name in a checkpoint, on the CPU.
        mark: the entry in the transformer's config, or None where there is none.
    """

    door: DoorIn | None
    processors: dict[str, Any]
    values: dict[str, Tensor]
    mark: dict[str, Any] | None


def door_of(transformer: Any) -> DoorIn | None:
    """The door that `linearize` put in, or None."""
    return next((hook for hook in transformer._forward_pre_hooks.values() if isinstance(hook, DoorIn)), None)


def processors_of(layers: Mapping[str, Any]) -> dict[str, Any]:
    return {layer: attn.get_processor() for layer, attn in layers.items()}


def capture(transformer: Any, layers: Mapping[str, Any], names: Iterable[str]) -> State:
    """The present state, with copies of the named parameters' values.

    Raises:
        RuntimeError: a value is not in memory.
    """
    if names:
        check_in_memory(transformer, layers)
    parameters = replaced_parameters(layers)
    values = {name: parameters[name].detach().to("cpu", copy=True) for name in names}
    return State(door_of(transformer), processors_of(layers), values, mark_of(transformer))


def original_state(transformer: Any, layers: Mapping[str, Any]) -> State:
    """The state that restoring leads to. What others have put in place since stays as it is.

    Raises:
        RuntimeError: the original weights were given up.
    """
    door, processors = door_of(transformer), processors_of(layers)
    if door is None:
        return State(None, processors, {}, mark_of(transformer))
    if door.given_up:
        raise RuntimeError(
            "the original weights of this pipeline were given up by linearize(..., keep_original=False); load the "
            "pipeline anew"
        )
    for layer, processor in processors.items():
        if isinstance(processor, AttnProcessor):
            processors[layer] = door.original.processors[layer]
    return State(None, processors, door.original.values, door.original.mark)


def apply(transformer: Any, layers: Mapping[str, Any], state: State) -> None:
    """Puts a state in place of the present one. Interrupted, it can be called again.

    The door comes first and goes last, so that one stands as long as anything behind it is not the original.

    Raises:
        RuntimeError: values cannot be copied in; nothing has been changed then.
    """
    if state.values:
        check_in_memory(transformer, layers)
        check_replaceable(layers)
    _free_kept_processors(transformer)  # by the door that knows what they stand for, while it is there
    if state.door:
        set_door(transformer, state.door)
    copy_values(state.values, layers)
    for layer, attn in layers.items():
        processor, present = state.processors[layer], attn.get_processor()
        if processor is not present:
            # What the user set with set_attention_backend(), enable_parallelism() or set_ip_adapter_scale().
            ours = processor if isinstance(processor, AttnProcessor) else present
            for name in getattr(ours, "of_the_layer", AttnProcessor.of_the_layer):
                if (value := getattr(present, name, None)) is not None or hasattr(processor, name):
                    setattr(processor, name, value)
            attn.set_processor(stand_beside(processor, attn))
    _set_mark(transformer, state.mark)
    if not state.door:
        _remove_doors(transformer)


def _free_kept_processors(transformer: Any) -> None:
    """Takes the library's processors out of what SD3 keeps of its processors while its projections are fused."""
    door, kept = door_of(transformer), getattr(transformer, "original_attn_processors", None) or {}
    for key, processor in kept.items():
        if door and isinstance(processor, AttnProcessor):
            kept[key] = door.original.processors[key.removesuffix(".processor")]


def stand_beside(processor: Processor, attn: Any) -> Processor:
    """Puts a processor's own parameters where the layer's are, and in their dtype."""
    if isinstance(processor, AttnProcessor):
        reference = next(attn.parameters())
        for weight in processor.parameters(recurse=False):
            weight.data = weight.data.to(reference.device, reference.dtype if reference.dtype in DTYPES else None)
    return processor


def _set_mark(transformer: Any, mark: dict[str, Any] | None) -> None:
    others = {name: value for name, value in transformer.config.items() if name != MARK}
    # diffusers offers a way to add to a config, and none to take away.
    transformer._internal_dict = FrozenDict({**others, **({MARK: mark} if mark else {})})


def set_door(transformer: Any, door: DoorIn) -> None:
    """In the old one's place where there is one, so that the order among others' hooks stays."""
    present = [key for key, hook in transformer._forward_pre_hooks.items() if isinstance(hook, DoorIn)]
    # The entrance first: by it the others are found, should one fail to be put in.
    if present:
        wanted = [(inner.module, inner.hook) for inner in door.inner_hooks(transformer)]
        for inner in transformer._forward_pre_hooks[present[0]].inner_hooks(transformer):
            if (inner.module, inner.hook) not in wanted:
                _remove_hooks(inner.module, functools.partial(operator.is_, inner.hook))
        transformer._forward_pre_hooks[present[0]] = door
    else:
        transformer.register_forward_pre_hook(door, with_kwargs=True)
    if not any(isinstance(hook, DoorOut) for hook in transformer._forward_hooks.values()):
        transformer.register_forward_hook(DoorOut(door.family), with_kwargs=True, prepend=True)
    for inner in door.inner_hooks(transformer):
        if inner.installed():
            continue
        if inner.before:
            inner.module.register_forward_pre_hook(inner.hook, with_kwargs=True)
        else:
            inner.module.register_forward_hook(inner.hook)


def _remove_doors(transformer: Any) -> None:
    """By kind, for torch's own handles do not survive a deep copy of the transformer."""
    door = door_of(transformer)
    for inner in door.inner_hooks(transformer) if door else ():
        _remove_hooks(inner.module, functools.partial(operator.is_, inner.hook))
    _remove_hooks(transformer, lambda hook: isinstance(hook, (DoorIn, DoorOut)))


def _remove_hooks(module: Any, unwanted: Callable[[Any], bool]) -> None:
    # The entrance last, as it came first.
    for hooks, marks in (
        (module._forward_hooks, module._forward_hooks_with_kwargs),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if unwanted(hook)]:
            marks.pop(key, None)
            del hooks[key]
