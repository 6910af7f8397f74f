"""The small FLUX in this package, and its distilled weights, which `weights="auto"` takes for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clear_attn.models.class_names import is_exactly
from clear_attn.utils.json_records import read_json
from clear_attn.utils.tensor_files import read_tensors

# The name for it where a model is named.
NAME = "demo"
MODEL = Path(__file__).parents[1] / "demo" / "small_flux"
WEIGHTS = Path(__file__).parents[1] / "demo" / "small_flux_clear"


def resolve_name(model: str) -> str:
    """Return the folder of the small FLUX for its name, and any other folder or Hub id as it is."""
    return str(MODEL) if model == NAME else model


def is_packaged(transformer: Any, originals: Mapping[str, Tensor]) -> bool:
    """Return whether a transformer is that of the small FLUX, wherever it was loaded from and in whatever dtype.

    Its config and all its values must be the same, so that a fine-tune is another model.

    Args:
        transformer: with the model's own weights or others in its attention.
        originals: the model's own values of parameters that were replaced, by name.
    """
    own = read_json(MODEL / "transformer" / "config.json")
    config = {name: transformer.config.get(name) for name in own if not name.startswith("_")}
    expected = {name: value for name, value in own.items() if not name.startswith("_")}
    # The text of a tuple in a config is that of a list.
    if not is_exactly(transformer, [own["_class_name"]]) or json.dumps(config) != json.dumps(expected):
        return False
    # A LoRA wraps a layer and keeps it as its base layer.
    parameters = {name.replace(".base_layer.", "."): value for name, value in transformer.named_parameters()}
    values, _ = read_tensors(MODEL / "transformer" / "diffusion_pytorch_model.safetensors")
    return all(_same({**parameters, **originals}.get(name), value) for name, value in values.items())


def _same(value: Tensor | None, expected: Tensor) -> bool:
    """Return whether a value is the expected one in its own dtype; a sharded one or one on meta is not."""
    if value is None or type(value.data) is not Tensor or value.is_meta:
        return False
    return torch.equal(value.detach().cpu().float(), expected.to(value.dtype).float())
