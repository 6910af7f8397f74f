"""Objects by number: custom operators of a compiled graph take tensors alone."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

_known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def remember(thing: object) -> Tensor:
    """Return the handle of an object, int64 `[]` on the CPU, which `recall` takes as long as the object lives."""
    number = next(_numbers)
    _known[number] = thing
    with torch.inference_mode(False):
        return torch.tensor(number, device="cpu")


def recall(handle: Tensor) -> Any:
    """Return the object of a handle."""
    return _known[int(handle)]
