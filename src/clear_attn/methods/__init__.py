"""Attention methods for `clear_attn.linearize(pipe, method=...)`, one file each.

Examples:
    >>> import clear_attn as clear
    >>> from clear_attn import demo
    >>> report = clear.cost(demo.pipeline(), 1024, 1024, method=clear.methods.Swin(side=16))
    >>> report.ratio > 1
    True
"""

from clear_attn.methods.agent import Agent
from clear_attn.methods.clear import Clear
from clear_attn.methods.dense import Dense
from clear_attn.methods.kv_compression import KVCompression
from clear_attn.methods.lit import LiT
from clear_attn.methods.method import ImageMethod, Layer, Method, Options, ScoreBias
from clear_attn.methods.records import parse
from clear_attn.methods.sigmoid import Sigmoid
from clear_attn.methods.strided import Strided
from clear_attn.methods.swin import Swin

__all__ = [
    "Agent",
    "Clear",
    "Dense",
    "ImageMethod",
    "KVCompression",
    "Layer",
    "LiT",
    "Method",
    "Options",
    "ScoreBias",
    "Sigmoid",
    "Strided",
    "Swin",
    "parse",
]
