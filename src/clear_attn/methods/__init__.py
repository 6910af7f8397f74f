"""Other ways to attend than CLEAR's, one file each: `clear_attn.linearize(pipe, method=...)`."""

from clear_attn.methods.base import Method, MethodProcessor, named, parse
from clear_attn.methods.lit import LiT
from clear_attn.methods.strided import Strided
from clear_attn.methods.swin import Swin

__all__ = ["LiT", "Method", "MethodProcessor", "Strided", "Swin", "named", "parse"]
