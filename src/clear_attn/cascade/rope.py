"""`ntk_scaling`: rotary positions beyond those that a model was trained on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

from clear_attn.patching.target import PipelineOrTransformer, find_transformer


@contextlib.contextmanager
def ntk_scaling(pipe: PipelineOrTransformer, factor: float) -> Iterator[PipelineOrTransformer]:
    """Multiply theta of the rotary embedding by a factor for the length of a `with` block: NTK-aware scaling.

    Low frequencies become lower, so that far positions look like near ones in training. High frequencies hardly change,
    so that neighbors stay distinguishable. CLEAR's published high-resolution run multiplies theta 10,000 by 10. Blocks
    can be nested; their factors multiply.

    Args:
        pipe: a pipeline or transformer with a rotary embedding computed from theta (not Stable Diffusion 3 or DiT),
            linearized or not.
        factor (`float`): factor of theta; 1 changes nothing.

    Raises:
        TypeError: the pipeline is not supported.
        ValueError: the factor is not a finite number above 0; the model has no rotary embedding.

    Examples:
        >>> from clear_attn import demo
        >>> pipe = demo.pipeline()
        >>> with ntk_scaling(pipe, 10):
        ...     print(pipe.transformer.pos_embed.theta)
        100000
    """
    transformer, adapter = find_transformer(pipe)
    validate_ntk_factor(transformer, adapter.rotary_embedding(transformer), factor)
    with adapter.scaled_theta(transformer, factor):
        yield pipe


def validate_ntk_factor(transformer: object, embedding: object | None, factor: object) -> None:
    """Raise ValueError for a factor that is not a number above 0, or a transformer without rotary embedding."""
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not 0 < factor < math.inf:
        raise ValueError(f"ntk_factor must be a finite number above 0, got {factor!r}; 10 is usual, 1 changes nothing")
    if embedding is None:
        raise ValueError(
            f"ntk_factor={factor} needs a rotary embedding, and a {type(transformer).__name__} has none that it would "
            "change; leave it out"
        )
