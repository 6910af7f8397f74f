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
    """Undo `linearize`, bit for bit: parameters, processors, hooks. A pipeline that is not linearized stays so.

    What others changed since then stays: other hooks, LoRAs, the attention backend.

    Values come back as they were before `linearize`, in the dtype that the model has now. Those of a model that was
    moved to a smaller dtype and back are the unrounded ones.

    Warns of a pipeline that was saved whole while it was linearized and runs dense since it was loaded, and of
    attention parameters whose values were changed since `linearize`, which are lost.

    Raises:
        TypeError: not a supported pipeline.
        RuntimeError: the original weights were discarded with `keep_original=False`, or cannot be put back:
            parameters on the meta device, a LoRA fused in.
    """
    target = find_target(pipe)
    _warn_if_left_dense(target.transformer)
    if target.hook:
        original = restored_state(target)
        check_writable(target, original)
        warn_if_changed(target)
        apply(target, original)
    return pipe


def restored_state(target: Target) -> State:
    """Return the state that `restore` applies; errors as there."""
    original = original_state(target)
    if target.hook and original.metadata and original.metadata["weights"]:
        raise RuntimeError(
            f"this pipeline was loaded with distilled weights in it ({original.metadata['weights']}), saved whole "
            "while it was linearized; for the original load the original pipeline"
        )
    return original


def is_linearized(pipe: Any) -> bool:
    """Return whether a pipeline's transformer has been linearized.

    Warns of a pipeline that was saved whole while it was linearized and runs dense since it was loaded.

    Raises:
        TypeError: not a supported pipeline.
    """
    transformer, _ = find_transformer(pipe)
    _warn_if_left_dense(transformer)
    return entry_hook_of(transformer) is not None


def _warn_if_left_dense(transformer: Any) -> None:
    if entry_hook_of(transformer):
        return
    try:
        metadata = metadata_of(transformer)
        record = metadata and metadata.get("method")  # which need not be known here
        settings = f"method={record_as_text(record)}" if record else metadata and read_method(metadata).as_arguments()
    except ValueError as error:
        warnings.warn(f"this pipeline runs with dense attention, and {error}", stacklevel=3)
        return
    if metadata:
        warnings.warn(
            f"this pipeline was saved while it was linearized ({settings}, weights {metadata['weights']}), "
            "and now runs with dense attention; call clear_attn.linearize(pipe)",
            stacklevel=3,
        )
