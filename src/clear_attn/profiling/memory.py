"""Memory of weights (exact) and activations (bounds), and the memory of a device."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from accelerate.hooks import CpuOffload
from torch import nn

from clear_attn.utils._torch import stored_tensors
from clear_attn.utils.units import format_bytes


class Bytes(NamedTuple):
    """Bounds of memory: at least `least`, and usually at most `likely`."""

    least: int
    likely: int


@dataclass(frozen=True)
class Memory:
    """The memory in bytes of one forward pass of a transformer, and of decoding its image.

    Attributes:
        weights: the exact bytes of each model, as stored.
        activations (`Bytes`): activations of a forward pass without gradients. Least: query, key, value, output and
            residual stream of an attention layer, 5 x tokens x (heads x head_dim) elements. Likely: 20 times such a
            tensor; diffusers' blocks held 14 to 20 on a CPU, dense and linearized, uncompiled. FLUX.2's: 24, measured
            22.
        decode (`Bytes`, *optional*): memory of a decoder like AutoencoderKL's, if one is given. Least: a residual block
            at full size holds its input and its normed input, with the channels of the last but one level. Likely: 4
            such tensors; 3.4 to 3.9 were measured.
        decode_tiled (`Bytes`, *optional*): memory of decoding tile by tile, image included.
    """

    weights: dict[str, int]
    activations: Bytes
    decode: Bytes | None
    decode_tiled: Bytes | None

    @property
    def all_weights(self) -> int:
        return sum(self.weights.values())

    def to_dict(self) -> dict[str, Any]:
        bounds = {name: part and part._asdict() for name, part in vars(self).items() if name != "weights"}
        return {**asdict(self), **bounds}

    def __str__(self) -> str:
        whole = len(self.weights) > 1  # a pipeline, not a transformer alone
        name = "weights" if whole else f"{next(iter(self.weights))} weights"
        known = [f"{name} {format_bytes(self.all_weights)}", f"activations {format_bytes(*self.activations)}"]
        if self.decode and self.decode_tiled:
            known.append(f"decoding {format_bytes(*self.decode)}, in tiles {format_bytes(*self.decode_tiled)}")
        lines = [f"Memory: {', '.join(known)}."]
        if whole:
            models = (f"{name} {format_bytes(size)}" for name, size in self.weights.items())
            lines.append(f"Weights by model: {', '.join(models)}.")
        if not self.decode:
            others = "other models and of decoding; clear_attn.cost(pipe, ...) of a loaded one counts them"
            lines.append(f"Not known: memory of {'decoding' if whole else others}.")
        return "\n".join(lines)


def models_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the models of a pipeline by name; an empty dict for a transformer."""
    return {name: part for name, part in getattr(pipe, "components", {}).items() if isinstance(part, nn.Module)}


def activation_bytes(transformer: Any, elements: int, factor: int) -> Bytes:
    """Return the activations of a forward pass without gradients.

    Args:
        transformer: the model, for its dtype.
        elements: the size of the residual stream, images x tokens x channels.
        factor: `activation_factor` of its adapter.
    """
    stream = elements * _element(transformer)
    return Bytes(5 * stream, factor * stream)


def decode_bytes(vae: Any, height: int, width: int) -> Bytes | None:
    """Return the memory of decoding an image of this size in pixels; None without a decoder like AutoencoderKL's."""
    channels = getattr(getattr(vae, "config", None), "block_out_channels", None)
    if not channels or not hasattr(vae, "decoder"):
        return None
    block = channels[min(1, len(channels) - 1)] * height * width * _element(vae)
    return Bytes(2 * block, 4 * block)


def tiled_decode_bytes(vae: Any, height: int, width: int, side: int | None = None) -> Bytes | None:
    """Return the memory of decoding an image tile by tile; None without a decoder like AutoencoderKL's.

    Args:
        vae: the autoencoder.
        height, width: the size of the image in pixels.
        side: the side of a tile in pixels; by default diffusers' own.
    """
    side = side or getattr(vae, "tile_sample_min_size", None)
    tile = side and decode_bytes(vae, min(side, height), min(side, width))
    image = 3 * height * width * _element(vae) if tile else 0
    return Bytes(tile.least + image, tile.likely + 2 * image) if tile else None


def weight_bytes(model: nn.Module, device: torch.device | str | None = None) -> int:
    """Return the bytes of a model's parameters and buffers as stored; given a device, of those on it.

    A device without an index means all devices of its type.
    """
    wanted = None if device is None else torch.device(device)
    stored = [part for tensor in [*model.parameters(), *model.buffers()] for part in stored_tensors(tensor)]
    return sum(
        x.nbytes
        for x in stored
        if wanted is None or (x.device.type == wanted.type and wanted.index in (None, x.device.index))
    )


def _element(model: Any) -> int:
    # Values that are stored in one byte are computed in two.
    return max(2, model.dtype.itemsize)


def pipeline_bytes(pipe: Any, device: torch.device | None = None) -> int:
    """Return the bytes of a pipeline's weights; given a device, of those on it now."""
    return sum(weight_bytes(model, device) for model in models_of(pipe).values())


def offloaded_models(pipe: Any) -> set[str]:
    """Return the names of the models that accelerate's model offload moves to the device when they run."""
    return {name for name, model in models_of(pipe).items() if isinstance(getattr(model, "_hf_hook", None), CpuOffload)}


def peak_memory(pipe: Any, device: torch.device, work: Mapping[str, Bytes]) -> Bytes:
    """Return the most that a device holds at once: weights on it, those of the running model, and its activations.

    Args:
        pipe: a pipeline; with model offload, a model is on the device only while it runs.
        device: the device.
        work: activations by model; the models run one after the other.
    """
    models, offloaded = models_of(pipe), offloaded_models(pipe)
    resident = sum(weight_bytes(model, device) for name, model in models.items() if name not in offloaded)
    held = {name: resident + (weight_bytes(model) if name in offloaded else 0) for name, model in models.items()}
    idle = Bytes(0, 0)
    return Bytes(
        max(size + work.get(name, idle).least for name, size in held.items()),
        max(size + work.get(name, idle).likely for name, size in held.items()),
    )


def available_memory(device: torch.device) -> tuple[float, float]:
    """Return the total and the free bytes of a device; infinity if they are not known."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return total, total - torch.mps.driver_allocated_memory()
    if device.type == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total  # free memory cannot be told from the system's caches
    return math.inf, math.inf
