"""Undo `linearize` bit for bit, and tell whether a pipeline is linearized."""

from __future__ import annotations

import warnings
from typing import Any

from clear_attn.methods.records import record_as_text
from clear_attn.patching.changes import warn_if_changed
from clear_attn.patching.state import State, apply, check_writable, original_state
from clear_attn.patching.target import PipelineOrTransformer, Target, entry_hook_of, find_target, find_transformer
from clear_attn.weights.metadata import metadata_of, read_method


def restore(pipe: PipelineOrTransformer) -> PipelineOrTransformer:
    """Undo `linearize` bit for bit: parameters, processors and hooks. Other pipelines stay as they are.

    Changes by others stay: their hooks, LoRAs, the attention backend.

    Values come back as they were before `linearize`, in the dtype that the model has now. Those of a model that was
    moved to a smaller dtype and back are the unrounded ones.

    Warns about a pipeline that was saved while it was linearized and runs dense after loading, and about attention
    parameters that were changed since `linearize`: those changes are lost.

    Raises:
        TypeError: the pipeline is not supported.
        RuntimeError: the original weights were discarded with `keep_original=False`, or cannot be copied back because
            parameters are quantized, on the meta device, or have a fused LoRA.

    Examples:
        >>> import clear_attn as clear
        >>> from clear_attn import demo
        >>> pipe = clear.linearize(demo.pipeline(), window=8, weights=None)
        >>> clear.is_linearized(clear.restore(pipe))
        False
    """
    target = find_target(pipe)
    _warn_if_left_dense(target.transformer)
    if target.hook:
        original = restored_state(target)
        warn_if_changed(target, stacklevel=2)
        apply(target, original)
    return pipe


def restored_state(target: Target) -> State:
    """Return the state with the original weights, ready to be applied.

    Raises:
        RuntimeError: they were discarded, the pipeline was loaded without them, or they cannot be copied back.
    """
    original = original_state(target)
    if original.metadata and original.metadata["weights"]:
        raise RuntimeError(
            f"this pipeline was loaded with distilled weights in it ({original.metadata['weights']}), because it was "
            "saved while it was linearized; load the original pipeline instead"
        )
    check_writable(target, original)
    return original


def is_linearized(pipe: Any) -> bool:
    """Return whether a pipeline's transformer has been linearized.

    Warns about a pipeline that was saved while it was linearized and runs dense after loading.

    Raises:
        TypeError: the pipeline is not supported.

    Examples:
        >>> import clear_attn as clear
        >>> from clear_attn import demo
        >>> clear.is_linearized(clear.linearize(demo.pipeline(), window=8, weights=None))
        True
    """
    transformer, _ = find_transformer(pipe)
    _warn_if_left_dense(transformer)
    return entry_hook_of(transformer) is not None


def _warn_if_left_dense(transformer: Any) -> None:
    if reason := left_dense(transformer):
        warnings.warn(reason, stacklevel=3)


def left_dense(transformer: Any) -> str | None:
    """Return, for a model that was saved while it was linearized and runs dense, that this is so; else None."""
    if entry_hook_of(transformer):
        return None
    try:
        metadata = metadata_of(transformer)
        record = metadata and metadata.get("method")  # of a method that may be unknown here
        settings = f"method={record_as_text(record)}" if record else metadata and read_method(metadata).as_arguments()
    except ValueError as error:
        return f"this pipeline runs with dense attention, and {error}"
    if not metadata:
        return None
    return (
        f"this pipeline was saved while it was linearized ({settings}, weights {metadata['weights']}), and now runs "
        "with dense attention; call clear_attn.linearize(pipe)"
    )
