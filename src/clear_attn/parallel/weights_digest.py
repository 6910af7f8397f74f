"""Digests of the weights of a rank. If ranks had different weights, the image would be wrong without an error."""

from __future__ import annotations

import functools
import hashlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clear_attn.utils._torch import stored_tensors, version_of

# The number of 8-byte words in a sum, and the number of sums that a GPU computes at a time.
SPAN = 2**18
SPANS_ON_GPU = 64


class WeightsDigest:
    """Digests of transformers' parameters, buffers and LoRA settings. A tensor is read again only after a change."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Any, Any, str]]] = weakref.WeakKeyDictionary()

    def lines(self, transformer: nn.Module) -> list[str]:
        """Return a line `name: digest` for each tensor, and a line with the settings of each layer with a LoRA.

        The digest of a tensor on the meta device, as under sequential offload, is empty.
        """
        known, now = self._known.get(transformer, {}), dict[str, tuple[Any, Any, str]]()
        for name, tensor in _tensors(transformer):
            version = version_of(tensor), tensor.dtype, tensor.shape
            reference, before, digest = known.get(name, (None, None, ""))
            if not digest or reference() is not tensor or before != version:
                digest = "" if tensor.is_meta else f"{tensor.dtype} {list(tensor.shape)} {digest_of(tensor)}"
            now[name] = (weakref.ref(tensor), version, digest)
        self._known[transformer] = now
        return [*(f"{name}: {digest}" for name, (_, _, digest) in now.items()), *_lora_settings(transformer)]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _lora_settings(transformer: nn.Module) -> Iterator[str]:
    """Yield the LoRA settings of layers wrapped by peft, because fusing a LoRA does not change a weight's version."""
    for name, module in transformer.named_modules():
        if hasattr(module, "scaling") and hasattr(module, "merged_adapters"):
            settings: Any = module
            yield f"LoRA of {name}: {settings.active_adapters} {settings.scaling} {settings.merged_adapters}"


@torch.no_grad()
def digest_of(tensor: Tensor) -> str:
    """Return a digest of a tensor's bytes, the same on every device.

    Integer sums have no rounding errors, so their order does not matter.
    """
    sums = []
    for part in stored_tensors(tensor.detach()):
        words = _words(part)
        factors = _factors(words.device)
        for chunk in words.split(SPAN * (SPANS_ON_GPU if words.is_cuda else 1)):
            # Mix in shifted bits, because multiples of 2^63 would cancel out.
            mixed = F.pad((chunk >> 29).bitwise_xor_(chunk), (0, -len(chunk) % SPAN)).view(-1, SPAN)
            sums.append((mixed.mul_(factors)).sum(dim=1))
    total = torch.cat(sums).cpu() if sums else torch.empty(0)
    return hashlib.sha256(total.numpy().tobytes()).hexdigest()[:16]


def _words(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes as int64 `[words]`, padded with zeros."""
    data = tensor.contiguous().flatten().view(torch.uint8)
    if data.numel() % 8 or data.data_ptr() % 8:
        data = F.pad(data, (0, -data.numel() % 8))
    return data.view(torch.int64)


@functools.lru_cache(maxsize=8)
def _factors(device: torch.device) -> Tensor:
    rng = torch.Generator("cpu").manual_seed(0)
    with torch.inference_mode(False):
        return (torch.randint(-(2**62), 2**62, (SPAN,), generator=rng, device="cpu") | 1).to(device)
