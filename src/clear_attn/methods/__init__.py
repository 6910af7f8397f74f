"""Other ways to attend than CLEAR's, one file each: `clear_attn.linearize(pipe, method=...)`."""

from clear_attn.methods.agent import Agent
from clear_attn.methods.base import Method, MethodProcessor, as_text, named, parse
from clear_attn.methods.kv_compression import KVCompression
from clear_attn.methods.lit import LiT
from clear_attn.methods.sigmoid import Sigmoid
from clear_attn.methods.strided import Strided
from clear_attn.methods.swin import Swin

__all__ = [
    "Agent",
    "KVCompression",
    "LiT",
    "Method",
    "MethodProcessor",
    "Sigmoid",
    "Strided",
    "Swin",
    "as_text",
    "named",
    "parse",
]
