"""Fix two bugs of Triton's interpreter, which runs the kernels on a CPU with NumPy.

Triton uses the interpreter if the environment has `TRITON_INTERPRET=1` when triton is first imported.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from clear_attn.utils._torch import convert_interpreted_scalars

VARIABLE = "TRITON_INTERPRET"


def is_requested() -> bool:
    """Return whether the environment asks for the interpreter."""
    return os.environ.get(VARIABLE) == "1"


@functools.cache
def mend() -> None:
    """Fix the bugs, which are in Triton 3.6 and 3.9; without them this changes no result."""
    import numpy as np
    from triton.runtime import interpreter

    tl = interpreter.tl

    def widen(handle: Any) -> Any:
        # NumPy has no bfloat16. Triton stores it as uint16, and a product would multiply the bit patterns as integers.
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data.astype(np.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        product = np.matmul(widen(a), widen(b), dtype=np.float32) + d.data
        return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
    convert_interpreted_scalars(interpreter)
