"""What a call's tensor says, read once.

Reading waits for the device, and a pipeline passes the same tensor at every step.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

from clear_attn.utils._torch import version_of

Said = TypeVar("Said")


class ReadOnce(Generic[Said]):
    """A function of a tensor, remembered for the last 16.

    An entry counts for the very tensor it was made from, while that lives and is not written to; addresses alone are
    reused.
    """

    def __init__(self, read: Callable[[Tensor], Said]) -> None:
        self.read = read
        self.recent: deque[tuple[weakref.ref[Tensor], object, Said]] = deque(maxlen=16)

    def __call__(self, tensor: Tensor) -> Said:
        if tensor.is_inference():
            return self.read(tensor)
        for reference, version, said in tuple(self.recent):
            if reference() is tensor and version == version_of(tensor):
                return said
        said = self.read(tensor)
        self.recent.append((weakref.ref(tensor), version_of(tensor), said))
        return said
