"""Refer to objects by number, because custom operators in a compiled graph take only tensors."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

_known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def remember(thing: object) -> Tensor:
    """Return a handle of an object, int64 `[]` on the CPU. `recall` returns the object as long as it lives."""
    number = next(_numbers)
    _known[number] = thing
    with torch.inference_mode(False):
        return torch.tensor(number, device="cpu")


def recall(handle: Tensor) -> Any:
    """Return the object of a handle."""
    return _known[int(handle)]
