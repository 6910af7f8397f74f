"""Rotary positions beyond what a model was trained on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, TypeVar

from clear_attn.patching.target import find_transformer

PipelineOrTransformer = TypeVar("PipelineOrTransformer")


@contextlib.contextmanager
def ntk_scaling(pipe: PipelineOrTransformer, factor: float) -> Iterator[PipelineOrTransformer]:
    """NTK-aware scaling for the length of a `with` block: the base theta of the rotary embedding times a factor.

    Slow rotations become slower, so that far positions look as near ones did in training, and fast ones hardly
    change, so that neighbours are still told apart. With theta 10,000 and factor 10 it is what CLEAR's published
    high-resolution run does. Blocks may be nested; their factors multiply.

    Args:
        pipe: a supported pipeline or transformer with a rotary embedding computed from theta, FLUX.1, FLUX.2 or Chroma,
            linearized or not.
        factor (`float`): of theta; 1 changes nothing.

    Raises:
        TypeError: not a supported pipeline.
        ValueError: a factor that is not a finite number above 0; a model without rotary embedding.
    """
    transformer, adapter = find_transformer(pipe)
    check_ntk_factor(transformer, factor)
    embedding: Any = adapter.rotary_embedding(transformer)
    before = embedding.theta
    embedding.theta = before * factor
    try:
        yield pipe
    finally:
        embedding.theta = before


def has_rotary_embedding(transformer: object) -> bool:
    """Return whether a supported transformer computes a rotary embedding from theta in each call."""
    _, adapter = find_transformer(transformer)
    return adapter.rotary_embedding(transformer) is not None


def check_ntk_factor(transformer: object, factor: object) -> None:
    """Raises ValueError where a factor is no number above 0 or the model has no rotary embedding."""
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not 0 < factor < math.inf:
        raise ValueError(f"ntk_factor must be a finite number above 0, got {factor!r}; 10 is usual, 1 changes nothing")
    if not has_rotary_embedding(transformer):
        raise ValueError(
            f"ntk_factor={factor} needs a rotary embedding, and a {type(transformer).__name__} has none that it would "
            "change; leave it out"
        )
