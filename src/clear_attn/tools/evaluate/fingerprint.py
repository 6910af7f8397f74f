"""What the images of an evaluation depend on of its model and weights, as JSON."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clear_attn.cascade.plan import describe
from clear_attn.weights.metadata import WEIGHTS_FILE
from clear_attn.weights.parameters import read_checkpoint
from clear_attn.weights.published import base_model_of
from clear_attn.weights.recognition import path_of
from clear_attn.weights.sources import with_absolute_path

# Values that are read of each tensor.
SAMPLE = 4096


def describe_sources(pipe: Any, transformer: Any, weights: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Return the model with its Hub id or absolute path, and the distilled weights, each with a fingerprint."""
    described, path = describe(pipe), path_of(pipe, transformer)
    return {
        "model": base_model_of(pipe, transformer) or (path and str(Path(path).resolve())),
        **{name: described[name] for name in ("pipeline", "dtype", "scheduler", "adapters")},
        "adapter_scales": _adapter_scales(transformer),
        "transformer": fingerprint(dict(transformer.named_parameters())),
        "weights": with_absolute_path(weights),
        "weights_file": _local_weights(weights),
    }


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of the names, shapes, dtypes and a sample of the values of tensors, on any device.

    A tensor with no readable values, such as an offloaded one, counts without them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(_sample(tensor))
    return digest.hexdigest()[:16]


def _sample(tensor: Tensor) -> bytes:
    if hasattr(tensor, "__tensor_flatten__"):  # a quantized class of torchao
        return b"".join(_sample(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    try:
        flat = tensor.detach().reshape(-1)
        # With an odd stride the values are from all columns.
        part = flat[:: flat.numel() // SAMPLE | 1].cpu().contiguous()
        return part.view(torch.uint8).numpy().tobytes()
    # On the meta device, or of another class.
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError):
        return b""


def _adapter_scales(transformer: Any) -> list[str]:
    """Return the active LoRAs of the transformer's layers with their scales."""
    layers = [each for each in transformer.modules() if hasattr(each, "scaling") and hasattr(each, "active_adapters")]
    return sorted(
        {
            f"{adapter} * {layer.scaling[adapter]}"
            for layer in layers
            for adapter in layer.active_adapters
            if adapter in layer.scaling and not layer.disable_adapters
        }
    )


def _local_weights(weights: str | os.PathLike[str] | None) -> str | None:
    """Return the fingerprint of local weights; None for others, and for files that `linearize` will refuse."""
    if weights is None:
        return None
    path = Path(weights).expanduser()
    file = path / WEIGHTS_FILE if path.is_dir() else path
    try:
        return fingerprint(read_checkpoint(file)[0]) if file.is_file() else None
    except (OSError, ValueError):
        return None
