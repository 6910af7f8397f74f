"""The published checkpoints, and which models they are for."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from clear_attn.methods import Clear, Method
from clear_attn.models._diffusers import name_or_path_of
from clear_attn.weights.hub import HUB_ID, in_cache

# https://huggingface.co/Huage001/CLEAR, by method.
REPO = "Huage001/CLEAR"
FILES: dict[Clear, str] = {
    Clear(32, 1): "clear_local_32.safetensors",
    Clear(16, 1): "clear_local_16.safetensors",
    Clear(8, 1): "clear_local_8.safetensors",
    Clear(16, 4): "clear_local_16_down_4.safetensors",
    Clear(8, 4): "clear_local_8_down_4.safetensors",
}
BASE = "black-forest-labs/FLUX.1-dev"
SERVED = (BASE, "black-forest-labs/FLUX.1-schnell")
LICENSE_TEXT = (
    "derived from FLUX.1-dev and under its non-commercial license, "
    "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
)
# Distinguishes FLUX.1 from smaller models, and from Fill, Control and Redux variants, which have wider inputs.
CLASS = "FluxTransformer2DModel"
ARCHITECTURE = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
}


def check_published(method: Method) -> None:
    """Raise ValueError for methods for which nothing is published."""
    if method.pooled_factor is None:
        raise ValueError(
            f"no weights are published for {method}, only for CLEAR; give weights= a folder or a Hub id of some that "
            "were distilled for it, or None for the model's own"
        )


def published_file(method: Method) -> str:
    """Return the published file for a method.

    Raises:
        ValueError: there is none; the message lists those that exist.
    """
    check_published(method)
    found = next((file for published, file in FILES.items() if published == method), None)
    if found is None:
        pairs = ", ".join(str(pair) for pair in sorted((each.window, each.down_factor) for each in FILES))
        raise ValueError(
            f"no weights are published for {method.as_arguments()}; there are some for "
            f"(window, down_factor) = {pairs}; or give weights=None to keep the model's own (training-free)"
        )
    return found


def published_method(file: str) -> Clear | None:
    """Return the method of a published file, or None for a file of another name."""
    return next((method for method, name in FILES.items() if name == file), None)


def name_of(pipe: Any, transformer: Any) -> str:
    """Return the Hub id or path that a transformer or its pipeline was loaded from, "" if neither has one."""
    path = _path_of(pipe, transformer)
    return _cached_id(path) or path


def base_model_of(pipe: Any, transformer: Any) -> str | None:
    """Return the Hub id of a pipeline, or None if it was not loaded from the Hub.

    A relative path looks like a Hub id, so an id counts if the Hub's cache holds the repository.
    """
    path = _path_of(pipe, transformer)
    return _cached_id(path) or (path if path in SERVED or (_looks_like_hub_id(path) and in_cache(path)) else None)


def shared_name_of(pipe: Any, transformer: Any) -> str:
    """Return the Hub id of a pipeline, or the name of its folder without the path, for files that are shared."""
    return base_model_of(pipe, transformer) or Path(_path_of(pipe, transformer)).name


def _path_of(pipe: Any, transformer: Any) -> str:
    configs = (getattr(part, "config", {}) for part in (transformer, pipe))
    return next(filter(None, map(name_or_path_of, configs)), "").removesuffix("/transformer")


def _cached_id(path: str) -> str | None:
    """Return the id of the repository whose snapshot in a cache of the Hub a path names, or None."""
    cached = re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots", path)
    return "/".join(cached.groups()) if cached else None


def _looks_like_hub_id(name: str) -> bool:
    return re.fullmatch(HUB_ID, name) is not None and not os.path.exists(name)


def fine_tune_served(pipe: Any, transformer: Any) -> str | None:
    """Check whether `weights="auto"` may use the published weights for a model.

    Returns:
        None for a model that they are known to fit, else the name of a fine-tune, which they would overwrite.

    Raises:
        ValueError: the model has another architecture than they were distilled for, or another task.
    """
    kind, name = type(transformer).__name__, name_of(pipe, transformer)
    if kind != CLASS:
        raise _no_weights(f"a {kind}")
    kontext = "Kontext" in type(pipe).__name__ or "kontext" in name.lower()
    own = {setting: transformer.config.get(setting) for setting in ARCHITECTURE}
    other = {setting: value for setting, value in own.items() if value != ARCHITECTURE[setting]}
    if other or kontext:
        listed = ", ".join(f"{setting}={value}" for setting, value in other.items())
        raise _no_weights("FLUX.1 Kontext" if kontext else f"a {kind} with {listed}")
    known = name in SERVED if _looks_like_hub_id(name) else Path(name).name in {Path(served).name for served in SERVED}
    return None if known else name or "an unnamed FLUX.1 transformer"


def _no_weights(model: str) -> ValueError:
    return ValueError(
        f"weights='auto' finds none for this model, {model}; give weights=None to keep its own (training-free), or "
        "weights that were distilled for it"
    )


def is_published(source: str | None) -> bool:
    """Return whether weights derive from the published ones, and so have the license of FLUX.1-dev."""
    return source is not None and source.startswith(REPO + "/")
