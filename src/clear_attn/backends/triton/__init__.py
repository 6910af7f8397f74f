"""The window in fused Triton kernels, forward and backward. Importing this package does not import triton."""

from clear_attn.backends.triton.operator import Sizes, attend, attend_lists
from clear_attn.backends.triton.support import architecture, unsupported_device, unsupported_reason

__all__ = ["Sizes", "architecture", "attend", "attend_lists", "unsupported_device", "unsupported_reason"]
