"""The transformers that can be linearized, one file each."""

from __future__ import annotations

from typing import Any

from clear_attn.models.adapter import Call, Family, HighresPipelines
from clear_attn.models.chroma import Chroma
from clear_attn.models.class_names import is_instance
from clear_attn.models.controlnet import FluxControlNet, SD3ControlNet
from clear_attn.models.dit import DiT
from clear_attn.models.flux import Flux
from clear_attn.models.flux2 import Flux2
from clear_attn.models.qwen_image import QwenControlNet, QwenImage
from clear_attn.models.sd3 import SD3
from clear_attn.models.training import TrainingAdapter

FAMILIES: tuple[Family, ...] = (
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


def family_of(transformer: Any) -> Family | None:
    """The family that a transformer belongs to, or None."""
    return next((family for family in FAMILIES if is_instance(transformer, (family.transformer_class,))), None)


def training_adapter_for(transformer: Any) -> TrainingAdapter:
    """Return what distillation needs to know about a transformer.

    Raises:
        TypeError: it cannot be distilled.
    """
    family = family_of(transformer)
    if family is None or family.training is None:
        known = ", ".join(each.transformer_class for each in FAMILIES if each.training is not None)
        raise TypeError(f"a {type(transformer).__name__} cannot be distilled; give a pipeline with one of: {known}")
    return family.training


__all__ = ["FAMILIES", "Call", "Family", "HighresPipelines", "TrainingAdapter", "family_of", "training_adapter_for"]
