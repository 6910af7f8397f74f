"""The parameters that distilled weights replace, and checkpoint files, which are validated before use.

The format is that of the published checkpoints (Hugging Face `Huage001/CLEAR`): a safetensors file with
`<layer>.to_q`, `to_k`, `to_v` of every attention layer, `<layer>.to_out.0` where the layer has one, each with
`.weight` and `.bias`, and `<layer>.processor.<name>` for the parameters of the method, such as `spatial_weight` for
pooled keys. FLUX.2's single blocks have one fused projection: `<layer>.to_qkv_mlp_proj` and `<layer>.to_out`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clear_attn.models._diffusers import hooks_in
from clear_attn.utils.json_records import parse_json
from clear_attn.utils.tensor_files import read_tensors

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "to_out")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PICKLE_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
POOLED = ".processor.spatial_weight"


def projections(layers: Mapping[str, Any], names: Iterable[str] = PROJECTIONS) -> dict[str, nn.Module]:
    """Return the named projections of each layer that has them, or the LoRA layers that wrap them."""
    found = {
        f"{layer}.{projection}": functools.reduce(
            lambda module, name: getattr(module, name, None), projection.split("."), attn
        )
        for layer, attn in layers.items()
        for projection in names
    }
    # In most layers "to_out" is a list, and its first item is the projection.
    return {name: module for name, module in found.items() if not isinstance(module, (type(None), nn.ModuleList))}


def _base(projection: Any) -> Any:
    # A LoRA wraps the projection and keeps it as its base layer.
    return getattr(projection, "base_layer", projection)


def replaced_parameters(layers: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """Return the parameters that distilled weights replace, by their names in a checkpoint."""
    return {
        f"{projection}.{name}": parameter
        for projection, module in projections(layers).items()
        for name, parameter in _base(module).named_parameters(recurse=False)
    }


def check_in_memory(transformer: Any, layers: Mapping[str, Any]) -> None:
    """Raise RuntimeError if parameters that could be replaced are not in memory."""
    for hook in hooks_in(transformer):
        if getattr(getattr(hook, "group", None), "offload_to_disk_path", None):
            raise RuntimeError(
                f"the transformer's parameters are offloaded to {hook.group.offload_to_disk_path}; linearize the "
                "pipeline first, then call enable_group_offload()"
            )
    absent = [name for name, parameter in replaced_parameters(layers).items() if parameter.is_meta]
    if absent:
        raise RuntimeError(
            f"{absent[0]} and {len(absent) - 1} more parameters are on the meta device, as under sequential offload; "
            "call pipe.remove_all_hooks() first, and pipe.enable_sequential_cpu_offload() again afterwards"
        )


def check_replaceable(layers: Mapping[str, Any]) -> None:
    """Raise RuntimeError if values cannot be copied in, or a fused LoRA or projection would be lost."""
    for projection, module in projections(layers, (*PROJECTIONS, "to_qkv")).items():
        fused: Any = getattr(module, "merged_adapters", None)
        if fused:
            raise RuntimeError(
                f"{projection} has the LoRA {', '.join(fused)} fused into the weights that would be "
                "replaced; call pipe.unfuse_lora() first, and pipe.fuse_lora() again afterwards"
            )
    for name, parameter in replaced_parameters(layers).items():
        if type(parameter) is not nn.Parameter or not parameter.dtype.is_floating_point:
            raise RuntimeError(
                f"{name} has the type {type(parameter).__name__} and {parameter.dtype}, as in a quantized model, and "
                "cannot take other values; load the model again in bfloat16, linearize it, then quantize it (after "
                "that it cannot be restored), or keep its own weights with weights=None"
            )
    for layer, attn in layers.items():
        if attn.fused_projections:
            for name, values in _fused_from_parts(attn).items():
                if not torch.equal(values, getattr(_base(attn.to_qkv), name)):
                    raise RuntimeError(
                        f"{layer}.to_qkv.{name} differs from the projections it was fused from, and would be lost; "
                        "call transformer.unfuse_qkv_projections() first (and set fused_projections = False on SD3's "
                        "attention layers, which diffusers does not do), or load the model again"
                    )


@torch.no_grad()
def copy_values(values: Mapping[str, Tensor], layers: Mapping[str, Any]) -> None:
    """Copy values into the parameters, and into the fused projections made from them."""
    parameters = replaced_parameters(layers)
    for name, value in values.items():
        parameters[name].copy_(value)
    for attn in layers.values() if values else ():
        if attn.fused_projections:
            for name, fused in _fused_from_parts(attn).items():
                getattr(_base(attn.to_qkv), name).copy_(fused)


def _fused_from_parts(attn: Any) -> dict[str, Tensor]:
    """Return the values that the fused projection of query, key and value must have, by name."""
    parts = [_base(getattr(attn, name)) for name in ("to_q", "to_k", "to_v")]
    names = [name for name, _ in parts[0].named_parameters(recurse=False)]
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in names}


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the tensors of a `.safetensors` file, and the record of the method that it was distilled for, if any.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a complete safetensors file, or empty; its record cannot be read.
    """
    file = Path(path)
    if not file.is_file():
        kind = "is a directory" if file.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"weights={str(path)!r} {kind}; give the path of a .safetensors file, a directory that save_pretrained "
            "wrote, a Hub id (owner/repo), or weights=None"
        )
    try:
        checkpoint, metadata = read_tensors(file)
    except ValueError:
        with file.open("rb") as stream:
            start = stream.read(2)
        # A torch.save archive is a zip file or a bare pickle.
        if start == b"PK" or start[:1] == b"\x80" or file.suffix in PICKLE_ENDINGS:
            raise ValueError(
                f"{file} is a pickle, which could run code when loaded; convert it to safetensors first"
            ) from None
        raise
    if not checkpoint:
        raise ValueError(f"{file} holds no tensors; give a file of distilled weights, or weights=None")
    text = metadata.get(METHOD)
    return checkpoint, parse_json(text, f"{file}, {METHOD}") if text else None


# The entry in a file's own metadata that records another method than CLEAR.
METHOD = "clear_method"


def pooled_factor(checkpoint: Mapping[str, Tensor]) -> int:
    """Return the down_factor that a checkpoint was distilled for: the side of its pooled cells, or 1."""
    shapes = {tuple(value.shape) for name, value in checkpoint.items() if name.endswith(POOLED)}
    if not shapes:
        return 1
    shape = min(shapes)
    if len(shapes) > 1 or len(shape) != 7 or shape != (1, 1, 1, shape[3], 1, shape[3], 1):
        raise ValueError(
            f"the checkpoint's spatial_weight must be (1, 1, 1, f, 1, f, 1) throughout, got {sorted(shapes)}"
        )
    return shape[3]


def own_parameters(processors: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the parameters of the library's processors, by their names in a checkpoint."""
    return {
        f"{layer}.processor.{name}": parameter
        for layer, processor in processors.items()
        for name, parameter in processor.named_parameters(recurse=False)
    }


def check_checkpoint(checkpoint: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], model: str) -> None:
    """Raise ValueError if the names, shapes or values of a checkpoint do not fit a model's parameters."""
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    _raise_if("misses", shapes.keys() - checkpoint.keys(), model)
    _raise_if("has unexpected", checkpoint.keys() - shapes.keys(), model)
    wrong = {
        f"{name} {list(value.shape)} instead of {list(shapes[name])}"
        for name, value in checkpoint.items()
        if tuple(value.shape) != shapes[name]
    }
    _raise_if("has wrong shapes:", wrong, model)
    other = {f"{name} {value.dtype}" for name, value in checkpoint.items() if value.dtype not in DTYPES}
    _raise_if("has other values than float32, bfloat16 or float16:", other, model)
    dtype = next(iter(parameters.values())).dtype
    # In the model's dtype: large values overflow in float16.
    unusable = {name for name, x in checkpoint.items() if not torch.isfinite(x.to(dtype).float()).all()}
    _raise_if(f"has NaN or infinity, as {dtype}, in", unusable, model)


def _raise_if(what: str, names: Iterable[str], model: str) -> None:
    names = sorted(names)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"the checkpoint does not fit this {model}: it {what} {', '.join(names[:3])}{more}; "
            "use weights distilled for this model, or weights=None"
        )
