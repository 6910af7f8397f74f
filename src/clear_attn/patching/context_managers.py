"""Context-manager forms of the public functions."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from clear_attn.methods import Method
from clear_attn.methods.schedule import Schedule
from clear_attn.patching.linearization import Change, prepare
from clear_attn.patching.restoration import restored_state
from clear_attn.patching.state import apply, apply_or_fall_back, capture, check_writable, original_state
from clear_attn.patching.target import PipelineOrTransformer, find_target
from clear_attn.utils._torch import hook_tables
from clear_attn.weights.parameters import check_in_memory


@contextlib.contextmanager
def linearized(
    pipe: PipelineOrTransformer,
    window: int | None = None,
    down_factor: int | None = None,
    *,
    method: Method | None = None,
    schedule: Schedule | None = None,
    weights: str | os.PathLike[str] | None = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    backend: str = "auto",
) -> Iterator[PipelineOrTransformer]:
    """Linearize a pipeline inside a `with` block, and return to its earlier state after it.

    Arguments and errors are those of `linearize`.

    Examples:
        >>> import clear_attn as clear
        >>> from clear_attn import demo
        >>> pipe = demo.pipeline()
        >>> with clear.linearized(pipe, window=8, weights=None):
        ...     clear.is_linearized(pipe)
        True
        >>> clear.is_linearized(pipe)
        False
    """
    change = prepare(
        pipe,
        window,
        down_factor,
        method=method,
        schedule=schedule,
        weights=weights,
        revision=revision,
        token=token,
        backend=backend,
    )
    with applied(change):
        yield pipe


@contextlib.contextmanager
def applied(change: Change) -> Iterator[None]:
    """Apply a change for the length of a `with` block; then return to the state before, whatever it was."""
    back = _restore_point(change.target.pipe)
    try:
        change.apply()
        yield
    finally:
        back()


@contextlib.contextmanager
def restored(pipe: PipelineOrTransformer) -> Iterator[PipelineOrTransformer]:
    """Restore a pipeline inside a `with` block, and return to its earlier state after it.

    Errors are those of `restore`.
    """
    back = _restore_point(pipe)
    target = find_target(pipe)
    tables = _hooks_in(target.transformer)
    before, dense = [dict(table) for table in tables], [dict[int, Any]() for _ in tables]
    try:
        if target.hook:
            apply(target, restored_state(target))
        dense = [dict(table) for table in tables]
        yield pipe
    finally:
        inside = [dict(table) for table in tables]
        try:
            back()
        finally:
            # Our hooks would come after those of others. Hooks that others added or removed inside stay so.
            for table, *states in zip(tables, before, dense, inside, strict=True) if target.hook else ():
                _replace_hooks(table, *states)


def _replace_hooks(
    table: dict[int, Any], before: dict[int, Any], dense: dict[int, Any], inside: dict[int, Any]
) -> None:
    """Reset a table of hooks to what it was before, keeping what others added or removed since."""
    stay = {key: hook for key, hook in before.items() if key in inside or key not in dense}
    new = {key: hook for key, hook in inside.items() if key not in dense}
    table.clear()
    table.update({**stay, **new})


def _hooks_in(transformer: nn.Module) -> list[dict[int, Any]]:
    """Return the tables in which torch keeps a model's hooks."""
    return [table for module in transformer.modules() for table in hook_tables(module)]


def _restore_point(pipe: Any) -> Callable[[], None]:
    """Return a function that puts the present state back after any of the public functions."""
    target = find_target(pipe)
    hook = target.hook
    if hook and hook.original.values:
        check_in_memory(target.transformer, target.layers)
    before = capture(target, hook.original.values if hook else ())

    def back() -> None:
        original = original_state(target)
        wanted = before._replace(values={**original.values, **before.values}) if before.hook else original
        check_writable(target, wanted)
        apply_or_fall_back(target, wanted, wanted)

    return back
