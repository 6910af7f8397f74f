"""Undo `linearize` bit for bit, and tell whether a pipeline is linearized."""

from __future__ import annotations

import warnings
from typing import Any

from clear_attn.methods.records import record_as_text
from clear_attn.patching.state import State, apply, check_writable, entry_hook_of, original_state
from clear_attn.patching.target import PipelineOrTransformer, find_transformer
from clear_attn.weights.metadata import metadata_of, read_method


def restore(pipe: PipelineOrTransformer) -> PipelineOrTransformer:
    """Undo `linearize`, bit for bit: parameters, processors, hooks. A pipeline that is not linearized stays so.

    What others changed since then stays: other hooks, LoRAs, the attention backend.

    Warns of a pipeline that was saved whole while it was linearized and runs dense since it was loaded.

    Raises:
        TypeError: not a supported pipeline.
        RuntimeError: the original weights were discarded with `keep_original=False`, or cannot be put back:
            parameters on the meta device, a LoRA fused in.
    """
    transformer, adapter = find_transformer(pipe)
    _warn_if_left_dense(transformer)
    if entry_hook_of(transformer):
        layers, original = adapter.attention_layers(transformer), restored_state(pipe)
        check_writable(transformer, layers, original)
        apply(transformer, layers, original)
    return pipe


def restored_state(pipe: Any) -> State:
    """Return the state with the original weights.

    Raises:
        RuntimeError: they were discarded, or the pipeline was loaded without them.
    """
    transformer, adapter = find_transformer(pipe)
    original = original_state(transformer, adapter.attention_layers(transformer))
    if original.metadata and original.metadata["weights"]:
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
    metadata = metadata_of(transformer)
    if metadata and not entry_hook_of(transformer):
        record = metadata.get("method")  # which need not be known here
        settings = f"method={record_as_text(record)}" if record else read_method(metadata).as_arguments()
        warnings.warn(
            f"this pipeline was saved while it was linearized ({settings}, weights {metadata['weights']}), "
            "and now runs with dense attention; call clear_attn.linearize(pipe)",
            stacklevel=3,
        )
