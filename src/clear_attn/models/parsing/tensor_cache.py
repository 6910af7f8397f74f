"""Results of reading a call's tensors, kept for the next step of a pipeline.

Reading waits for the device, and a pipeline passes the same tensor at every step.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from clear_attn.utils._torch import version_of

Result = TypeVar("Result")


class Entry(NamedTuple, Generic[Result]):
    """What was read from a tensor.

    Attributes:
        tensor: that was read.
        version: of the tensor.
        values: a copy on the CPU, where numpy may write to a tensor without a change of version; else None.
        result: of reading it.
    """

    tensor: weakref.ref[Tensor]
    version: object
    values: Tensor | None
    result: Result

    def holds(self, tensor: Tensor) -> bool:
        """Return whether reading this tensor would give the same result."""
        if self.tensor() is not tensor or self.version != version_of(tensor):
            return False
        return self.values is None or torch.equal(self.values, tensor)


class ReadOnce(Generic[Result]):
    """A function of a tensor that keeps its last 16 results, each for as long as the tensor lives.

    A result holds for the tensor itself, until it is written to. Writes to memory on a GPU by other libraries than
    torch go unnoticed.
    """

    def __init__(self, read: Callable[[Tensor], Result]) -> None:
        self.read = read
        self.recent: deque[Entry[Result]] = deque(maxlen=16)

    def __call__(self, tensor: Tensor) -> Result:
        if tensor.is_inference():
            return self.read(tensor)
        for entry in tuple(self.recent):
            if entry.holds(tensor):
                return entry.result
        values = tensor.detach().clone() if tensor.device.type == "cpu" else None
        entry = Entry(weakref.ref(tensor), version_of(tensor), values, self.read(tensor))
        alive = [entry for entry in tuple(self.recent) if entry.tensor() is not None]
        self.recent = deque([*alive, entry], maxlen=16)
        return entry.result
