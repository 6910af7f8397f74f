"""The verbs of the library for the length of a `with` block."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from clear_attn.linearize import PipelineOrTransformer, find_transformer, linearize, restore
from clear_attn.state import apply, capture, door_of, original_state


@contextlib.contextmanager
def linearized(
    pipe: PipelineOrTransformer,
    window: int | None = None,
    down_factor: int | None = None,
    *,
    weights: str | os.PathLike[str] | None = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    backend: str = "auto",
) -> Iterator[PipelineOrTransformer]:
    """`linearize` for the length of a `with` block; then the state before, whatever it was.

    Arguments and errors are those of `linearize`.
    """
    back = _way_back(pipe)
    linearize(pipe, window, down_factor, weights=weights, revision=revision, token=token, backend=backend)
    try:
        yield pipe
    finally:
        back()


@contextlib.contextmanager
def restored(pipe: PipelineOrTransformer) -> Iterator[PipelineOrTransformer]:
    """`restore` for the length of a `with` block; then the state before, whatever it was.

    Errors are those of `restore`.
    """
    back = _way_back(pipe)
    hooks = [(each, dict(each)) for each in _hooks_in(find_transformer(pipe)[0])]
    restore(pipe)
    try:
        yield pipe
    finally:
        new = [{key: hook for key, hook in each.items() if key not in before} for each, before in hooks]
        back()
        # The doors would stand behind the hooks of others.
        for (each, before), added in zip(hooks, new, strict=True):
            each.clear()
            each.update({**before, **added})


def _hooks_in(transformer: nn.Module) -> list[dict[int, Any]]:
    """The tables in which torch keeps a model's hooks."""
    names = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")
    return [getattr(module, name) for module in transformer.modules() for name in names]


def _way_back(pipe: Any) -> Callable[[], None]:
    """What puts the present state back in place of any other that the verbs of this library lead to."""
    transformer, family = find_transformer(pipe)
    layers = family.attention_layers(transformer)
    door = door_of(transformer)
    before = capture(transformer, layers, door.original.values if door else ())

    def back() -> None:
        stock = original_state(transformer, layers)
        values = {**stock.values, **before.values}
        apply(transformer, layers, before._replace(values=values) if before.door else stock)

    return back
