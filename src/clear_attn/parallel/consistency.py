"""Consistency check at the entry: all ranks must get the same call."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import torch
from torch import Tensor

from clear_attn.parallel.communicator import Links
from clear_attn.utils._torch import named_leaves_of

# Tensors of so many values at most are compared value by value, others by projections on random signs.
FEW = 64
PROJECTIONS = 16
# Relative to a tensor's length: what one prompt makes of two kinds of GPU in bfloat16 may differ so much, while one
# other word among 512, or another seed, differs more in one of the projections.
TOLERANCE = 0.01

REMEDY = "give all ranks the same arguments, and generators of the same seed"


def check_same(links: Links, call: dict[str, Any], settings: str) -> None:
    """Raises ValueError on every rank where one was given another call.

    Args:
        links: to the others.
        call: keywords, tensors among them.
        settings: what else must be the same.
    """
    leaves = named_leaves_of(call)
    tensors = [(name, leaf) for name, leaf in leaves if isinstance(leaf, Tensor)]
    others = [(name, leaf) for name, leaf in leaves if isinstance(leaf, (str, int, float, bool))]
    shapes = [f"{name} is {list(tensor.shape)} of {tensor.dtype}" for name, tensor in tensors]
    plain = [f"{name} is {value!r}" for name, value in others]
    _check_text(links, [settings, *plain, *shapes])
    _check_values(links, tensors)


def _check_text(links: Links, lines: list[str]) -> None:
    text = "\n".join(lines).encode()
    digest = torch.tensor(list(hashlib.sha256(text).digest()), dtype=torch.uint8, device="cpu")
    if (links.compare(digest) == digest).all():
        return
    length = int(links.compare(torch.tensor(len(text), device="cpu")).max())
    padded = torch.tensor(list(text.ljust(length)), dtype=torch.uint8, device="cpu")
    said = [bytes(each.tolist()).decode().rstrip().split("\n") for each in links.compare(padded)]
    for rank, theirs in enumerate(said):
        if theirs != said[0]:
            differing = [side for side in zip(said[0], theirs, strict=False) if side[0] != side[1]]
            first, other = differing[0] if differing else (f"{len(said[0])} inputs", f"{len(theirs)}")
            names = links.names[0], links.names[rank]
            raise ValueError(
                f"ranks were given different calls: rank {names[0]}'s {first}, rank {names[1]}'s {other}; {REMEDY}"
            )


def _check_values(links: Links, tensors: list[tuple[str, Tensor]]) -> None:
    if not tensors:
        return
    seen = links.compare(torch.cat([_summary(tensor) for _, tensor in tensors]))
    sizes = [_size(tensor) for _, tensor in tensors]
    for (name, tensor), part in zip(tensors, seen.split(sizes, dim=1), strict=True):
        tolerance = TOLERANCE * part[:, -1:].max() if tensor.numel() > FEW else 0.0
        for rank, differs in enumerate(~((part - part[0]).abs() <= tolerance).all(dim=1) & ~_same(part)):
            if differs:
                names = links.names[rank], links.names[0]
                raise ValueError(
                    f"ranks were given different calls: {name} of rank {names[0]} is not rank {names[1]}'s; {REMEDY}"
                )


def _same(part: Tensor) -> Tensor:
    """Which ranks' values are rank 0's to the bit, also where they are no numbers."""
    return (part.view(torch.int64) == part[0].view(torch.int64)).all(dim=1)


def _size(tensor: Tensor) -> int:
    return tensor.numel() if tensor.numel() <= FEW else PROJECTIONS + 1


def _summary(tensor: Tensor) -> Tensor:
    """float64 on the CPU: few values as they are; of many the projections, and their length at the end."""
    if tensor.numel() <= FEW:
        return tensor.detach().flatten().to("cpu", torch.float64)
    rows = tensor.detach().reshape(-1, tensor.shape[-1]).float()
    left, right = (_signs(length, seed, rows.device) for seed, length in enumerate(rows.shape))
    projected = (left * (rows @ right)).sum(dim=0)
    return torch.cat([projected, rows.norm()[None]]).to("cpu", torch.float64)


@functools.lru_cache(maxsize=16)
def _signs(length: int, seed: int, device: torch.device) -> Tensor:
    """Drawn once, for that takes the host longer than all else here, and the calls of a picture are alike."""
    rng = torch.Generator("cpu").manual_seed(seed)
    with torch.inference_mode(False):
        signs = torch.randint(0, 2, (length, PROJECTIONS), generator=rng, device="cpu").float() * 2 - 1
        return signs.to(device)
