"""The `triton` backend: fused kernels, forward and backward. Importing this package does not import triton."""

from clear_attn.backends.triton.operator import attend
from clear_attn.backends.triton.support import architecture, unsupported_device, unsupported_reason

__all__ = ["architecture", "attend", "unsupported_device", "unsupported_reason"]
