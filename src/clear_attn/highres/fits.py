"""Whether memory can suffice, before anything is drawn."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any

import torch
from accelerate.hooks import CpuOffload
from torch import nn

from clear_attn.cost import cost
from clear_attn.highres import sizes
from clear_attn.highres.pipelines import kind_of
from clear_attn.highres.plan import HighresPlan
from clear_attn.highres.stages import Base, Stage
from clear_attn.linearize import find_transformer
from clear_attn.memory import GIB, Bytes, Memory, weight_bytes


def check_fits(pipe: Any, plan: HighresPlan) -> None:
    """Refuses a plan that cannot fit on the pipeline's device, and warns of one that likely does not.

    Raises:
        ValueError: even the least that some image needs is more than the device has.
    """
    device = torch.device(pipe._execution_device)
    total, free = room(device)
    weights = on_device(pipe, device)
    images: list[Base | Stage] = [*([plan.base] if plan.base else []), *plan.stages]
    for each in images:
        height, width = each.height or 0, each.width or 0
        batch = 2 if kind_of(pipe).batched_guidance and (each.guidance or 0) > 1 else 1
        memory = cost(pipe, height, width, text_tokens=0, batch=batch).memory
        assert memory
        need = working(memory, max(height, width) > pipe.vae.tile_sample_min_size and each is not plan.base)
        if weights + need.least > total:
            raise ValueError(
                f"{sizes.name((height, width))} needs at least {_gib(weights + need.least)} GiB ({_gib(weights)} of "
                f"weights), and {device} has {_gib(total)}; {_remedy(pipe, device, need.least, total)}"
            )
        waiting = weights - weight_on(pipe, device)
        if waiting + need.likely > free:
            warnings.warn(
                f"{sizes.name((height, width))} will likely need {_gib(waiting + need.likely)} GiB beyond what "
                f"{device} holds, and {_gib(free)} are free; should memory run out, "
                f"{_remedy(pipe, device, need.likely, total)}",
                stacklevel=3,
            )


def working(memory: Memory, tiled: bool) -> Bytes:
    """What drawing holds beside the weights: a forward pass, and later the decoder."""
    decode = memory.decode_tiled if tiled else memory.decode
    return Bytes(*(max(pair) for pair in zip(memory.activations, decode, strict=True)))


def on_device(pipe: Any, device: torch.device) -> int:
    """Bytes of weights that are on a device while the transformer runs there, no fewer."""
    waits = isinstance(getattr(pipe.transformer, "_hf_hook", None), CpuOffload)
    absent = weight_bytes(pipe.transformer) - weight_bytes(pipe.transformer, device.type)
    return weight_on(pipe, device) + (absent if waits else 0)


def weight_on(pipe: Any, device: torch.device) -> int:
    """Bytes of weights that are on a device now."""
    return sum(weight_bytes(part, device.type) for part in pipe.components.values() if isinstance(part, nn.Module))


def room(device: torch.device) -> tuple[float, float]:
    """Bytes that a device has and that are free; endless where that cannot be told."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return total, free + kept
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return total, total - torch.mps.driver_allocated_memory()
    if device.type == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
        return total, total  # what is free is hard to tell from what the system caches
    return math.inf, math.inf


def _remedy(pipe: Any, device: torch.device, need: float, total: float) -> str:
    """What would fit, as far as the same bound can tell."""
    if device.type != "cpu":
        transformer, _ = find_transformer(pipe)
        if weight_bytes(transformer) + need <= total < weight_on(pipe, device) + need:
            return "pipe.enable_model_cpu_offload() would make room, or a smaller stage"
        if need <= total:
            return "pipe.transformer.enable_group_offload(...) would make room, or a smaller stage"
    return "draw a smaller picture or stage"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"
