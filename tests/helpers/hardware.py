"""What this machine can run: compiling for the CPU needs a C++ compiler."""

import pytest
import torch

from clear_attn.backends import flex, selection

_obstacle = flex.unsupported_device(torch.device("cpu"))

BACKENDS = [name for name in selection.BACKENDS if name != "triton" and (name != "flex" or _obstacle is None)]
needs_compiler = pytest.mark.skipif(_obstacle is not None, reason=f"nothing can be compiled here: {_obstacle}")
