"""Cache results of reading a call's tensors.

Reading waits for the device, and a pipeline passes the same tensor at every step.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from clear_attn.utils._torch import is_transformed, outside_transforms, version_of

Result = TypeVar("Result")


class Entry(NamedTuple, Generic[Result]):
    """The cached result of reading a tensor.

    Attributes:
        tensor: a weak reference to the tensor.
        version: the tensor's version when it was read.
        values: a copy of a CPU tensor, because NumPy can write to it without changing its version; else None.
        options: the other arguments with which it was read.
        result: the cached result.
    """

    tensor: weakref.ref[Tensor]
    version: object
    values: Tensor | None
    options: tuple[object, ...]
    result: Result

    def holds(self, tensor: Tensor, options: tuple[object, ...]) -> bool:
        """Return whether this is the same tensor with the same values, read with the same options."""
        if self.tensor() is not tensor or self.version != version_of(tensor) or self.options != options:
            return False
        return self.values is None or torch.equal(self.values, tensor)


class ReadOnce(Generic[Result]):
    """Wrap a function of a tensor, and of options, and cache its last 16 results, each while its tensor lives.

    A result is valid for the same tensor object until it is written to. Writes to GPU memory by libraries other than
    torch are not detected.
    """

    def __init__(self, read: Callable[..., Result]) -> None:
        self.read = read
        self.recent: deque[Entry[Result]] = deque(maxlen=16)

    def __call__(self, tensor: Tensor, *options: object) -> Result:
        if tensor.is_inference() or is_transformed(tensor):
            return self.read(tensor, *options)
        with outside_transforms():
            return self._read_once(tensor, *options)

    def _read_once(self, tensor: Tensor, *options: object) -> Result:
        for entry in tuple(self.recent):
            if entry.holds(tensor, options):
                return entry.result
        values = tensor.detach().clone() if tensor.device.type == "cpu" else None
        entry = Entry(weakref.ref(tensor), version_of(tensor), values, options, self.read(tensor, *options))
        alive = [entry for entry in tuple(self.recent) if entry.tensor() is not None]
        self.recent = deque([*alive, entry], maxlen=16)
        return entry.result
