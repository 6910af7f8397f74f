"""What a model is linearized with: what was asked for, what weights were distilled for, what a saved one was."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from clear_attn.methods import Method
from clear_attn.methods.schedule import Schedule
from clear_attn.models import ModelAdapter
from clear_attn.models.class_names import is_instance
from clear_attn.models.processors import AttnProcessor
from clear_attn.utils.validation import ClearConfig
from clear_attn.weights.metadata import config_of
from clear_attn.weights.sources import Checkpoint


def config_of_mark(
    window: int | None, down_factor: int | None, method: Method | None, mark: Mapping[str, Any]
) -> ClearConfig | Method:
    """What a pipeline that was saved whole was linearized with.

    Raises:
        ValueError: something else is asked for.
    """
    own = config_of(mark)
    asked = config_beside(own, window, down_factor, method)
    if asked != own:
        raise ValueError(
            f"{described(asked)} does not fit this pipeline, which was saved while it was linearized with "
            f"{described(own)}; leave it out, or say what weights to take (None: those in the pipeline)"
        )
    return own


def described(config: ClearConfig | Method) -> str:
    """As arguments of `linearize`."""
    if isinstance(config, Method):
        return f"method={config.as_text()}"
    return f"window={config.window}, down_factor={config.down_factor}"


def lost(mark: Mapping[str, Any]) -> ValueError:
    origin = f"{mark['weights']!r}, which it had" if mark["weights"] else "None, which starts them anew"
    return ValueError(
        "this pipeline was saved whole while its attention layers had trained weights of their own (those of pooled "
        "keys, say), which diffusers does not load; give weights= a directory that clear_attn.save_pretrained() "
        f"wrote; or, if nothing was trained since, {origin}"
    )


def config_for(
    window: int | None, down_factor: int | None, method: Method | None, source: Checkpoint | None
) -> ClearConfig | Method:
    """The settings given, and those of the weights where none is; else CLEAR's 16 and 1."""
    if method is not None and not isinstance(method, Method):
        raise TypeError(f"method must be one of clear_attn.methods, as clear_attn.methods.LiT(), got {method!r}")
    if method is not None:
        method.check()
    if method and source and source.method != method and not source.unknown:
        raise ValueError(
            f"method={method} does not fit weights that were distilled for {source.method or 'CLEAR'}; leave it out, "
            "or give other weights"
        )
    method = method or (source.method if source else None)
    if not method:
        return _clear_config(window, down_factor, source)
    for name, given in (("window", window), ("down_factor", down_factor)):
        if given is not None:
            raise ValueError(f"{name}={given} is a setting of CLEAR, and this is {method}; leave it out")
    return method


def _clear_config(window: int | None, down_factor: int | None, source: Checkpoint | None) -> ClearConfig:
    own = (source.window, source.down_factor) if source else (None, None)
    usual = ClearConfig()
    config = ClearConfig(
        window if window is not None else own[0] or usual.window,
        down_factor if down_factor is not None else own[1] or usual.down_factor,
    )
    for name, distilled_for in zip(("window", "down_factor"), own, strict=True):
        if distilled_for not in (None, getattr(config, name)):
            raise ValueError(
                f"{name}={getattr(config, name)} does not fit weights that were distilled for {name}={distilled_for}; "
                "leave it out, or give other weights"
            )
    return config


def check_goes_with(method: Method, schedule: Schedule, backend: str) -> None:
    """Raises ValueError for what only CLEAR has."""
    if backend != "auto":
        raise ValueError(f"backend={backend!r} is one of CLEAR's, and this is {method}; leave it out")
    if schedule.windows:
        raise ValueError(f"layers with a window of their own are CLEAR's, and this is {method}; leave windows out")


def check_stands_in(method: Method, family: ModelAdapter, stock: Mapping[str, Any]) -> None:
    """Raises TypeError where layers do more than a method can stand in for."""
    for layer, processor in stock.items():
        if not family.only_attends or is_instance(processor, family.ip_adapter_processors):
            raise TypeError(
                f"{type(method).__name__} cannot stand in for the {type(processor).__name__} of {layer}, which does "
                "more than attend; other methods than CLEAR are for FLUX.1, Stable Diffusion 3 and 3.5 and DiT, "
                "without IP-Adapters"
            )


def check_saves(processor: AttnProcessor) -> None:
    """Raises TypeError where a processor has parameters that a checkpoint would leave out."""
    inside = [*dict(processor.named_children()), *dict(processor.named_buffers(recurse=False))]
    if inside:
        raise TypeError(
            f"{type(processor).__name__} has a module or buffer, {inside[0]}, which would not be saved; make what it "
            "learns an nn.Parameter of its own"
        )


def numbers_of(family: ModelAdapter, transformer: Any, layers: Iterable[str]) -> dict[str, int]:
    """Each layer's place among those of its kind, with text or without."""
    count = {True: itertools.count(), False: itertools.count()}
    return {layer: next(count[family.has_text(transformer, layer)]) for layer in layers}


def config_beside(
    own: ClearConfig | Method, window: int | None, down_factor: int | None, method: Method | None
) -> ClearConfig | Method:
    """What is given of the settings; the others are a model's own."""
    if window is None and down_factor is None and method is None:
        return own
    if isinstance(own, ClearConfig) and method is None:
        window, down_factor = (
            given if given is not None else usual
            for given, usual in ((window, own.window), (down_factor, own.down_factor))
        )
    return config_for(window, down_factor, method, None)
