"""The consistency check of each call: all ranks must get the same arguments and hold the same weights."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clear_attn.parallel.communicator import Communicator
from clear_attn.utils._torch import named_leaves_of

# Tensors of up to this size are compared value by value, others by projections on random signs.
FEW = 64
PROJECTIONS = 16
# Relative to a tensor's norm. Two kinds of GPU may differ this much for one prompt in bfloat16; another word among 512,
# or another seed, differs more in one of the projections.
TOLERANCE = 0.01

REMEDY = "give all ranks the same arguments, and generators of the same seed"


def check_same(communicator: Communicator, call: dict[str, Any], settings: str, weights: Sequence[str] = ()) -> None:
    """Raise ValueError on every rank if one got another call or holds other weights.

    Args:
        communicator: the communicator of the ranks.
        call: the keywords of the call, tensors included.
        settings: a text that must be the same on all ranks.
        weights: the lines of `WeightsDigest`.
    """
    leaves = named_leaves_of(call)
    tensors = [(name, leaf) for name, leaf in leaves if isinstance(leaf, Tensor)]
    others = [(name, leaf) for name, leaf in leaves if isinstance(leaf, (str, int, float, bool))]
    shapes = [f"{name} is {list(tensor.shape)} of {tensor.dtype}" for name, tensor in tensors]
    plain = [f"{name} is {value!r}" for name, value in others]
    texts = _differing_texts(communicator, ["\n".join([settings, *plain, *shapes]), "\n".join(weights)])
    for rank, (theirs, their_weights) in enumerate(texts):
        _raise_if_calls_differ(communicator, rank, texts[0][0].split("\n"), theirs.split("\n"))
        _raise_if_weights_differ(communicator, rank, texts[0][1], their_weights)
    _check_values(communicator, tensors)


def _differing_texts(communicator: Communicator, own: Sequence[str]) -> list[list[str]]:
    """Return the texts of each rank, or an empty list if their digests are equal."""
    text = "\0".join(own).encode()
    digest = torch.tensor(list(hashlib.sha256(text).digest()), dtype=torch.uint8, device="cpu")
    if (communicator.compare(digest) == digest).all():
        return []
    length = int(communicator.compare(torch.tensor(len(text), device="cpu")).max())
    padded = torch.tensor(list(text.ljust(length)), dtype=torch.uint8, device="cpu")
    return [bytes(each.tolist()).decode().rstrip(" ").split("\0") for each in communicator.compare(padded)]


def _raise_if_calls_differ(communicator: Communicator, rank: int, first: list[str], other: list[str]) -> None:
    if other != first:
        differing = [side for side in zip(first, other, strict=False) if side[0] != side[1]]
        ours, theirs = differing[0] if differing else (f"{len(first)} inputs", f"{len(other)}")
        names = communicator.names[0], communicator.names[rank]
        raise ValueError(
            f"ranks were given different calls: rank {names[0]}'s {ours}, rank {names[1]}'s {theirs}; {REMEDY}"
        )


def _raise_if_weights_differ(communicator: Communicator, rank: int, first: str, other: str) -> None:
    """Compare digests by name. Empty digests are equal to all others, because their values cannot be read."""
    ours, theirs = (dict(line.rsplit(": ", 1) for line in text.split("\n") if line) for text in (first, other))
    for name in [*ours, *theirs]:
        digests = ours.get(name), theirs.get(name)
        if digests[0] != digests[1] and "" not in digests:
            raise ValueError(
                f"ranks hold different weights: {name} of rank {communicator.names[rank]} is not that of rank "
                f"{communicator.names[0]}; load the same model, distilled weights and LoRAs on every rank"
            )


def _check_values(communicator: Communicator, tensors: list[tuple[str, Tensor]]) -> None:
    if not tensors:
        return
    summaries = [_summary(tensor) for _, tensor in tensors]
    gathered = communicator.compare(torch.cat(summaries))
    for (name, tensor), part in zip(tensors, gathered.split([len(each) for each in summaries], dim=1), strict=True):
        tolerance = TOLERANCE * part[:, -1:].max() if tensor.numel() > FEW else 0.0
        for rank, differs in enumerate(~((part - part[0]).abs() <= tolerance).all(dim=1) & ~_same(part)):
            if differs:
                names = communicator.names[rank], communicator.names[0]
                raise ValueError(
                    f"ranks were given different calls: {name} of rank {names[0]} is not rank {names[1]}'s; {REMEDY}"
                )


def _same(part: Tensor) -> Tensor:
    """Return which ranks' values equal rank 0's bit for bit, also if they are NaN."""
    return (part.view(torch.int64) == part[0].view(torch.int64)).all(dim=1)


def _summary(tensor: Tensor) -> Tensor:
    """Return the values of a small tensor, or projections and norm of a large one, in float64 on the CPU."""
    if tensor.numel() <= FEW:
        return tensor.detach().flatten().to("cpu", torch.float64)
    rows = tensor.detach().reshape(-1, tensor.shape[-1]).float()
    left, right = (_signs(length, seed, rows.device) for seed, length in enumerate(rows.shape))
    projected = (left * (rows @ right)).sum(dim=0)
    return torch.cat([projected, rows.norm()[None]]).to("cpu", torch.float64)


@functools.lru_cache(maxsize=16)
def _signs(length: int, seed: int, device: torch.device) -> Tensor:
    """Return random signs, cached: they are the slowest part of the check, and calls of an image have equal shapes."""
    rng = torch.Generator("cpu").manual_seed(seed)
    with torch.inference_mode(False):
        signs = torch.randint(0, 2, (length, PROJECTIONS), generator=rng, device="cpu").float() * 2 - 1
        return signs.to(device)
