"""The published checkpoints, and which models they are for."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

# https://huggingface.co/Huage001/CLEAR, by (window, down_factor).
REPO = "Huage001/CLEAR"
FILES = {
    (32, 1): "clear_local_32.safetensors",
    (16, 1): "clear_local_16.safetensors",
    (8, 1): "clear_local_8.safetensors",
    (16, 4): "clear_local_16_down_4.safetensors",
    (8, 4): "clear_local_8_down_4.safetensors",
}
BASE = "black-forest-labs/FLUX.1-dev"
SERVED = (BASE, "black-forest-labs/FLUX.1-schnell")
LICENCE = (
    "derived from FLUX.1-dev and under its non-commercial licence, "
    "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
)
# What tells FLUX.1 from smaller models and from Fill, Control and Redux variants, whose input is wider.
CLASS = "FluxTransformer2DModel"
ARCHITECTURE = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
}


def published_file(window: int, down_factor: int) -> str:
    """The published file for a pair of settings.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if (window, down_factor) not in FILES:
        pairs = ", ".join(f"({window}, {down_factor})" for window, down_factor in sorted(FILES))
        raise ValueError(
            f"no weights are published for window={window}, down_factor={down_factor}; there are some for "
            f"(window, down_factor) = {pairs}; or give weights=None to keep the model's own (training-free)"
        )
    return FILES[window, down_factor]


def settings_of(repo: str, file: str) -> tuple[int, int] | None:
    """The (window, down_factor) of a published file, or None where it is no such file."""
    return next((pair for pair, name in FILES.items() if (repo, file) == (REPO, name)), None)


def names_of(pipe: Any, transformer: Any) -> list[str]:
    """The Hub ids, or else the folders, that a pipeline and its transformer were loaded from."""
    configs = (getattr(part, "config", {}) for part in (pipe, transformer))
    paths = [str(config.get("_name_or_path") or "") for config in configs]
    return [_hub_id(path) for path in paths if path]


def _hub_id(path: str) -> str:
    """Of a snapshot in the Hub's cache, the id of its repository; any other path as it is."""
    cached = re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots", path)
    return "/".join(cached.groups()) if cached else path


def base_model_of(pipe: Any, transformer: Any) -> str | None:
    """The Hub id of a pipeline, or None where it was not loaded from the Hub."""
    ids = (name for name in names_of(pipe, transformer) if re.fullmatch(r"[\w.-]+/[\w.-]+", name))
    return next((name for name in ids if not os.path.exists(name)), None)


def check_served(pipe: Any, transformer: Any) -> str | None:
    """Whether the published weights suit a model unasked.

    Returns:
        None for a model they are known to suit, else the name of a fine-tune whose own weights they replace.

    Raises:
        ValueError: not the architecture they were distilled for, or a variant of it with another task.
    """
    kind, names = type(transformer).__name__, names_of(pipe, transformer)
    kontext = "Kontext" in type(pipe).__name__ or any("kontext" in name.lower() for name in names)
    other = {name: transformer.config.get(name) for name in ARCHITECTURE if kind == CLASS}
    other = {name: value for name, value in other.items() if value != ARCHITECTURE[name]}
    if kind != CLASS or other or kontext:
        listed = ", ".join(f"{name}={value}" for name, value in other.items())
        what = "FLUX.1 Kontext" if kontext else f"a {kind}{' with ' if other else ''}{listed}"
        raise ValueError(
            f"weights='auto' takes the weights published for {BASE}, and this is {what}; name a checkpoint "
            f"(weights='{REPO}/{FILES[16, 1]}' is the published one for window 16) or give weights=None to keep the "
            "model's own (training-free)"
        )
    served = {Path(name).name for name in SERVED}
    if any(Path(name).name in served for name in names):
        return None
    return names[0] if names else "an unnamed FLUX.1 transformer"
