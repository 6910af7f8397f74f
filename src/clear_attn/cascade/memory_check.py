"""Check before anything is drawn whether memory suffices."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from clear_attn.cascade.pipelines import CascadeTarget
from clear_attn.cascade.plan import HighresPlan
from clear_attn.cascade.stages import Base, Stage
from clear_attn.cascade.tiling import tile_side
from clear_attn.models._diffusers import execution_device_of
from clear_attn.profiling.memory import (
    Bytes,
    activation_bytes,
    available_memory,
    decode_bytes,
    models_of,
    offloaded_models,
    peak_memory,
    pipeline_bytes,
    tiled_decode_bytes,
    weight_bytes,
)
from clear_attn.utils.image_sizes import format_size
from clear_attn.utils.units import format_bytes


def check_fits(target: CascadeTarget, plan: HighresPlan) -> None:
    """Refuse a plan that cannot fit on the pipeline's device; warn of one that likely does not.

    Raises:
        ValueError: the least memory that an image needs is more than the device has.
    """
    pipe = target.pipe
    device = execution_device_of(pipe)
    total, free = available_memory(device)
    held = pipeline_bytes(pipe, device)
    free = min(free, total - held)
    for each in plan.drawn:
        work = _work_of(target, plan, each, is_base=each is plan.base)
        need = peak_memory(pipe, device, work)
        if need.least > total:
            raise ValueError(
                f"{format_size(each.size)} needs at least {format_bytes(need.least)} with the weights, and {device} "
                f"has {format_bytes(total)}; {_remedy(pipe, device, work, total)}"
            )
        if need.likely - held > free:
            warnings.warn(
                f"{format_size(each.size)} will likely need {format_bytes(need.likely - held)} beyond what {device} "
                f"holds, and {format_bytes(free)} are free; if memory runs out, {_remedy(pipe, device, work, total)}",
                stacklevel=3,
            )


def _work_of(target: CascadeTarget, plan: HighresPlan, drawn: Base | Stage, *, is_base: bool) -> dict[str, Bytes]:
    """Return what the models allocate for one image. Ranks share stages alone, and tiles are for stages alone."""
    transformer, vae, (height, width) = target.transformer, target.pipe.vae, drawn.size
    tokens = (height // target.token) * (width // target.token)
    channels = next(iter(target.adapter.describe_layers(transformer).values())).channels
    elements = target.passes(drawn.guidance, plan.options).batch * tokens * channels
    activations = activation_bytes(transformer, elements, target.adapter.activation_factor)
    ranks = 1 if is_base else target.ranks
    side = None if is_base else tile_side(vae)
    tiled = side is not None and max(drawn.size) > side
    decode = tiled_decode_bytes(vae, height, width, side) if tiled else decode_bytes(vae, height, width)
    work = {"transformer": Bytes(*(size // ranks for size in activations))}
    return {**work, "vae": decode} if decode else work


def check_weights_fit(pipe: Any, device: torch.device) -> None:
    """Raise ValueError if a pipeline's weights, which are on the CPU, do not fit on a device."""
    _, free = available_memory(device)
    weights = pipeline_bytes(pipe)
    if device.type != "cpu" and weights > free:
        raise ValueError(
            f"the weights take {format_bytes(weights)}, and {device} has {format_bytes(free)} free; --offload keeps "
            "only the model at work there"
        )


def _remedy(pipe: Any, device: torch.device, work: dict[str, Bytes], total: float) -> str:
    """Return what would fit, by the lower bound."""
    if device.type != "cpu":
        most = max(weight_bytes(model) + work.get(name, Bytes(0, 0)).least for name, model in models_of(pipe).items())
        if most <= total and not offloaded_models(pipe):
            return "call pipe.enable_model_cpu_offload() (--offload), or draw a smaller stage"
        if max(size.least for size in work.values()) <= total:
            return "call pipe.transformer.enable_group_offload(...), or draw a smaller stage"
    return "draw a smaller image or stage"
