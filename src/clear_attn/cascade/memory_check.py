"""Whether memory can suffice, before anything is drawn."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any

import torch
from accelerate.hooks import CpuOffload
from torch import nn

from clear_attn.cascade.pipelines import kind_of, ranks_of
from clear_attn.cascade.plan import HighresPlan
from clear_attn.cascade.stages import size_name
from clear_attn.models._diffusers import execution_device_of
from clear_attn.profiling.attention_cost import cost
from clear_attn.profiling.memory import Bytes, Memory, gib, weight_bytes


def check_fits(pipe: Any, plan: HighresPlan) -> None:
    """Refuses a plan that cannot fit on the pipeline's device, and warns of one that likely does not.

    Raises:
        ValueError: even the least that some image needs is more than the device has.
    """
    device = execution_device_of(pipe)
    total, free = room(device)
    held = weights_on(pipe, device)
    free = min(free, total - held)
    for each in plan.drawn:
        memory = cost(pipe, *each.size, text_tokens=0, batch=kind_of(pipe).batch(each.guidance)).memory
        assert memory
        ranks = 1 if each is plan.base else ranks_of(pipe)
        work = work_of(memory, ranks, max(each.size) > pipe.vae.tile_sample_min_size and each is not plan.base)
        need = peak(pipe, device, work)
        if need.least > total:
            raise ValueError(
                f"{size_name(each.size)} needs at least {gib(need.least)} GiB with the weights, and {device} has "
                f"{gib(total)}; {_remedy(pipe, device, work, total)}"
            )
        if need.likely - held > free:
            warnings.warn(
                f"{size_name(each.size)} will likely need {gib(need.likely - held)} GiB beyond what {device} holds, "
                f"and {gib(free)} are free; should memory run out, "
                f"{_remedy(pipe, device, work, total)}",
                stacklevel=3,
            )


def check_weights_fit(pipe: Any, device: torch.device) -> None:
    """Raises ValueError where a pipeline's weights, which are on the CPU, have no room on a device."""
    _, free = room(device)
    weights = weights_on(pipe)
    if device.type != "cpu" and weights > free:
        raise ValueError(
            f"the weights take {gib(weights)} GiB, and {device} has {gib(free)} free; --offload keeps only the model "
            "at work there"
        )


def work_of(memory: Memory, ranks: int, tiled: bool) -> dict[str, Bytes]:
    """What the models compute on, each at its turn: a rank's part of a forward pass, then the decoder."""
    part = Bytes(*(size // ranks for size in memory.activations))
    return {"transformer": part, "vae": memory.decode_tiled if tiled else memory.decode}


def peak(pipe: Any, device: torch.device, work: dict[str, Bytes]) -> Bytes:
    """What is on a device when most is: the weights there, those of the model at work, and what it computes on.

    Under accelerate's model offload a model is there at its turn only.
    """
    parts, waiting = _parts(pipe), _waiting(pipe)
    resident = sum(weight_bytes(part, device) for name, part in parts.items() if name not in waiting)
    turns = [
        [resident + (weight_bytes(part) if name in waiting else 0) + size for size in work.get(name, Bytes(0, 0))]
        for name, part in parts.items()
    ]
    return Bytes(*(max(bound) for bound in zip(*turns, strict=True)))


def weights_on(pipe: Any, device: torch.device | None = None) -> int:
    """Bytes of a pipeline's weights, or of those that are on a device now."""
    return sum(weight_bytes(part, device) for part in _parts(pipe).values())


def _parts(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _waiting(pipe: Any) -> set[str]:
    """The models that accelerate's model offload brings to the device at their turn."""
    return {name for name, part in _parts(pipe).items() if isinstance(getattr(part, "_hf_hook", None), CpuOffload)}


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


def _remedy(pipe: Any, device: torch.device, work: dict[str, Bytes], total: float) -> str:
    """What would fit, as far as the same bound can tell."""
    if device.type != "cpu":
        turns = [weight_bytes(part) + work.get(name, Bytes(0, 0)).least for name, part in _parts(pipe).items()]
        if max(turns) <= total and not _waiting(pipe):
            return "pipe.enable_model_cpu_offload() (--offload) would make room, or a smaller stage"
        if max(size.least for size in work.values()) <= total:
            return "pipe.transformer.enable_group_offload(...) would make room, or a smaller stage"
    return "draw a smaller picture or stage"
