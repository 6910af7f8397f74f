"""What a picture costs in memory: the weights exactly, and what they compute on between bounds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clear_attn.utils._torch import inner_tensors_of

GIB = 2**30


class Bytes(NamedTuple):
    """Of memory: no less than `least`, as a rule not above `likely`."""

    least: int
    likely: int


@dataclass(frozen=True)
class Memory:
    """What one forward pass of a transformer and the decoding of its picture hold, in bytes.

    Attributes:
        weights: of each model given, exactly, as they are stored.
        activations (`Bytes`): of a forward pass without gradients. Least: in an attention layer, query, key, value,
            the output and the residual stream, 5 x tokens x (heads x head_dim) elements; nothing can do without
            them. Likely: 20 such, for 14 to 20 were measured on a CPU with diffusers' blocks, dense and linearized,
            uncompiled; of FLUX.2's 24, for 22 were measured.
        decode (`Bytes`): of the decoder of an autoencoder like AutoencoderKL. Least: a residual block at full size
            holds its input and the same normed, each of the channels of the last but one level. Likely: 4 such, for
            3.4 to 3.9 were measured. Both 0 where no such decoder is given.
        decode_tiled (`Bytes`): the same tile by tile, with the picture.
    """

    weights: dict[str, int]
    activations: Bytes
    decode: Bytes
    decode_tiled: Bytes

    @property
    def all_weights(self) -> int:
        return sum(self.weights.values())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), **{name: part._asdict() for name, part in vars(self).items() if name != "weights"}}

    def __str__(self) -> str:
        parts = [f"weights {gib(self.all_weights)} GiB", f"activations {_range(self.activations)}"]
        if self.decode.least:
            parts.append(f"decoding {_range(self.decode)}, in tiles {_range(self.decode_tiled)}")
        return f"Memory: {', '.join(parts)}."


def gib(size: float) -> str:
    """Bytes in GiB, as text."""
    return f"{size / GIB:.1f}" if size > 0.1 * GIB else f"{size / GIB:.2g}"


def _range(size: Bytes) -> str:
    return f"{gib(size.least)} to {gib(size.likely)} GiB"


def memory_of(
    models: dict[str, nn.Module],
    transformer: Any,
    channels: int,
    tokens: int,
    batch: int,
    height: int,
    width: int,
    activation_factor: int,
) -> Memory:
    """Counts the memory of a picture.

    Args:
        models: by name; the autoencoder as `vae`.
        transformer: that runs.
        channels: of its tokens, heads x head_dim.
        tokens: text and image.
        batch: pictures at a time.
        height, width: of the picture in pixels.
        activation_factor: what a forward pass likely holds, in tokens x channels elements.
    """
    stream = batch * tokens * channels * _element(transformer)
    vae = models.get("vae")
    whole = _decode(vae, height, width)
    tile = int(getattr(vae, "tile_sample_min_size", 0))
    picture = 3 * height * width * _element(vae) if whole.least else 0
    tiled = _decode(vae, min(tile, height), min(tile, width))
    return Memory(
        weights={name: weight_bytes(model) for name, model in models.items()},
        activations=Bytes(5 * stream, activation_factor * stream),
        decode=whole,
        decode_tiled=Bytes(tiled.least + picture, tiled.likely + 2 * picture),
    )


def weight_bytes(model: nn.Module, device: torch.device | str | None = None) -> int:
    """Of a model's parameters and buffers as they are stored, or of those on a device; cuda alone is any of them."""
    wanted = None if device is None else torch.device(device)
    stored = [part for tensor in [*model.parameters(), *model.buffers()] for part in _stored(tensor)]
    return sum(x.numel() * x.element_size() for x in stored if wanted is None or _is_on(x, wanted))


def _stored(tensor: Tensor) -> list[Tensor]:
    """What a tensor is made of: itself, or, as in quantized models, others that stand for it."""
    inner = inner_tensors_of(tensor)
    return [tensor] if inner is None else [part for each in inner for part in _stored(each)]


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def _decode(vae: Any, height: int, width: int) -> Bytes:
    channels = getattr(getattr(vae, "config", None), "block_out_channels", None)
    if vae is None or not channels or not hasattr(vae, "decoder"):
        return Bytes(0, 0)
    block = channels[min(1, len(channels) - 1)] * height * width * _element(vae)
    return Bytes(2 * block, 4 * block)


def _element(model: Any) -> int:
    # What is stored in a byte is computed in two.
    return max(2, model.dtype.itemsize)
