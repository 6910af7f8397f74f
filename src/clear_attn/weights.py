"""Distilled weights: which parameters they replace, and a checkpoint's file, checked in full before use.

The format is that of the published checkpoints (Hugging Face `Huage001/CLEAR`): a safetensors file with
`<layer>.to_q`, `to_k`, `to_v` of every attention layer, `<layer>.to_out.0` where the layer has one, each with
`.weight` and `.bias`, and `<layer>.processor.spatial_weight` where keys are pooled.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
POOLED = ".processor.spatial_weight"


def _submodule(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    # A LoRA wraps the projection and keeps it as its base layer.
    return getattr(module, "base_layer", module)


def replaced_parameters(layers: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """The parameters that distilled weights replace, by their name in a checkpoint."""
    return {
        f"{layer}.{projection}.{name}": parameter
        for layer, attn in layers.items()
        for projection in PROJECTIONS
        if (linear := _submodule(attn, projection)) is not None
        for name, parameter in linear.named_parameters(recurse=False)
    }


@torch.no_grad()
def copy_values(values: Mapping[str, Tensor], layers: Mapping[str, Any]) -> None:
    """Copies values into the parameters that stand, and into the fused projections made from them."""
    parameters = replaced_parameters(layers)
    for name, value in values.items():
        parameters[name].copy_(value)
    for attn in layers.values() if values else ():
        if attn.fused_projections:
            parts = [_submodule(attn, name) for name in ("to_q", "to_k", "to_v")]
            for name, fused in attn.to_qkv.named_parameters(recurse=False):
                fused.copy_(torch.cat([getattr(part, name) for part in parts]))


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads a `.safetensors` file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or not whole.
    """
    file = Path(path)
    if not file.is_file():
        kind = "is a directory" if file.is_dir() else "does not exist"
        raise FileNotFoundError(f"weights={str(path)!r} {kind}; give the path of a .safetensors file, or None")
    with file.open("rb") as stream:
        start = stream.read(2)
    # A torch.save archive is a zip file or a bare pickle; loading either can run code.
    if start == b"PK" or start[:1] == b"\x80" or file.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise ValueError(f"{file} is a pickle, which can run code when it is loaded; convert it to safetensors first")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is no whole safetensors file ({error}); fetch it again") from error


def pooled_factor(checkpoint: Mapping[str, Tensor]) -> int:
    """The down_factor that a checkpoint was distilled for: the side of its pooled cells, or 1."""
    shapes = {tuple(value.shape) for name, value in checkpoint.items() if name.endswith(POOLED)}
    if not shapes:
        return 1
    shape = min(shapes)
    if len(shapes) > 1 or len(shape) != 7 or shape != (1, 1, 1, shape[3], 1, shape[3], 1):
        raise ValueError(
            f"the checkpoint's spatial_weight must be (1, 1, 1, f, 1, f, 1) throughout, got {sorted(shapes)}"
        )
    return shape[3]


def check_checkpoint(checkpoint: Mapping[str, Tensor], layers: Mapping[str, Any], model: str) -> None:
    """Raises ValueError where a checkpoint does not fit a model in names, shapes or values."""
    shapes = {name: tuple(parameter.shape) for name, parameter in replaced_parameters(layers).items()}
    factor = pooled_factor(checkpoint)
    if factor > 1:
        shapes |= {layer + POOLED: (1, 1, 1, factor, 1, factor, 1) for layer in layers}
    _raise_if("misses", shapes.keys() - checkpoint.keys(), model)
    _raise_if("has unexpected", checkpoint.keys() - shapes.keys(), model)
    wrong = {
        f"{name} {list(value.shape)} instead of {list(shapes[name])}"
        for name, value in checkpoint.items()
        if tuple(value.shape) != shapes[name]
    }
    _raise_if("has wrong shapes:", wrong, model)
    _raise_if("has NaN or infinity in", {name for name, x in checkpoint.items() if not torch.isfinite(x).all()}, model)


def _raise_if(what: str, names: Iterable[str], model: str) -> None:
    names = sorted(names)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"the checkpoint does not fit this {model}: it {what} {', '.join(names[:3])}{more}; "
            "use weights distilled for this model, or weights=None"
        )
