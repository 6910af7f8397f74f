"""The transformers that can be linearized, one file each."""

from __future__ import annotations

from typing import Any

from clear_attn.models.adapter import Call, ModelAdapter
from clear_attn.models.chroma import Chroma
from clear_attn.models.controlnet import FluxControlNet, SD3ControlNet
from clear_attn.models.dit import DiT
from clear_attn.models.flux import Flux
from clear_attn.models.flux2 import Flux2
from clear_attn.models.qwen_image import QwenControlNet, QwenImage
from clear_attn.models.sd3 import SD3

ADAPTERS: tuple[ModelAdapter, ...] = (
    Flux(),
    Flux2(),
    Chroma(),
    QwenImage(),
    SD3(),
    DiT(),
    FluxControlNet(),
    QwenControlNet(),
    SD3ControlNet(),
)


def adapter_for(transformer: Any) -> ModelAdapter | None:
    """The family that a transformer belongs to, or None."""
    return next((family for family in ADAPTERS if isinstance(transformer, family.transformer_class)), None)


__all__ = ["ADAPTERS", "Call", "ModelAdapter", "adapter_for"]
