"""Resolve the method and the layers from arguments, checkpoint metadata and saved state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clear_attn.methods import Clear, Method
from clear_attn.methods.records import validate_method
from clear_attn.weights.metadata import read_method
from clear_attn.weights.sources import Checkpoint


def resolve_method(
    window: int | None, down_factor: int | None, method: Method | None, source: Checkpoint | None = None
) -> Method:
    """Return the method from the arguments, else from the weights, else CLEAR with window 16.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: window or down_factor is below 1, given together with a method, or differs from the weights'.
    """
    own = source.method if source else None
    asked = override_method(own or Clear(down_factor=source.down_factor if source else 1), window, down_factor, method)
    factor = source.down_factor if source and method is None and own is None else None
    if own is not None and asked != own:
        raise ValueError(
            f"{asked.as_arguments()} does not fit weights that were distilled for {own.as_arguments()}; leave it out, "
            "or give other weights (weights=None for the model's own)"
        )
    if factor is not None and down_factor not in (None, factor):
        raise ValueError(
            f"down_factor={down_factor} does not fit weights that were distilled for down_factor={factor}; leave it "
            "out, or give other weights"
        )
    return asked


def fits_arguments(window: int | None, down_factor: int | None, method: Method | None, own: Method) -> bool:
    """Return whether the arguments name a method, or leave open what it differs in."""
    given = {"window": window, "down_factor": down_factor}
    return method in (None, own) and all(value in (None, getattr(own, name, None)) for name, value in given.items())


def override_method(own: Method, window: int | None, down_factor: int | None, method: Method | None) -> Method:
    """Return a model's own method with the given arguments applied."""
    if method is None:
        return own.with_settings(window, down_factor)
    validate_method(method)
    if window is not None or down_factor is not None:
        given = ("window", window) if window is not None else ("down_factor", down_factor)
        raise ValueError(f"{given[0]}={given[1]} and method={method} are both given; leave one out")
    return method


def resolve_saved(
    window: int | None, down_factor: int | None, method: Method | None, metadata: Mapping[str, Any]
) -> Method:
    """Return the method of a pipeline that was saved while it was linearized.

    Raises:
        ValueError: the arguments ask for another.
    """
    own = read_method(metadata)
    asked = override_method(own, window, down_factor, method)
    if asked != own:
        raise ValueError(
            f"{asked.as_arguments()} does not fit this pipeline, which was saved while it was linearized with "
            f"{own.as_arguments()}; leave it out, or give weights=None for those in the pipeline"
        )
    return own


def parameters_lost(metadata: Mapping[str, Any]) -> ValueError:
    """Return the error for a pipeline saved with learned processor parameters, which diffusers does not load."""
    had = metadata["weights"]
    origin = f"weights={had!r}, which it had" if had else "weights=None, which initializes them again"
    return ValueError(
        "this pipeline was saved while its attention processors had trained weights (of pooled keys, for instance), "
        "which diffusers does not load; give weights= a directory that clear_attn.save_pretrained() wrote; or, if "
        f"nothing was trained since, {origin}"
    )
