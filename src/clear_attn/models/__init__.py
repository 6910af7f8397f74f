"""Adapters of the transformers that can be linearized, one file each."""

from __future__ import annotations

from typing import Any

from clear_attn.models.adapter import Call, ModelAdapter
from clear_attn.models.chroma import Chroma
from clear_attn.models.class_names import is_instance
from clear_attn.models.controlnet import FluxControlNet, SD3ControlNet
from clear_attn.models.dit import DiT
from clear_attn.models.flux import Flux
from clear_attn.models.flux2 import Flux2
from clear_attn.models.flux3 import Flux3
from clear_attn.models.image_to_image import HighresPipelines
from clear_attn.models.krea2 import Krea2
from clear_attn.models.qwen_image import QwenControlNet, QwenImage
from clear_attn.models.qwen_image21 import QwenImage21
from clear_attn.models.sd3 import SD3
from clear_attn.models.training import TrainingAdapter
from clear_attn.models.z_image import ZImage

ADAPTERS: list[ModelAdapter] = [
    Flux(),
    Flux2(),
    Chroma(),
    QwenImage(),
    SD3(),
    DiT(),
    Krea2(),
    Flux3(),
    ZImage(),
    QwenImage21(),
    FluxControlNet(),
    QwenControlNet(),
    SD3ControlNet(),
]


def adapter_for(transformer: Any) -> ModelAdapter | None:
    """Return the adapter of a transformer's class, or None."""
    matching = (each for each in ADAPTERS if is_instance(transformer, (each.transformer_class,), each.packages))
    return next(matching, None)


def training_adapter_for(transformer: Any) -> TrainingAdapter:
    """Return the training adapter of a transformer's class.

    Raises:
        TypeError: the transformer cannot be distilled.
    """
    adapter = adapter_for(transformer)
    if adapter is None or adapter.training is None:
        known = ", ".join(each.transformer_class for each in ADAPTERS if each.training is not None)
        raise TypeError(f"a {type(transformer).__name__} cannot be distilled; give a pipeline with one of: {known}")
    adapter.training.validate_model(transformer)
    return adapter.training


__all__ = [
    "ADAPTERS",
    "Call",
    "HighresPipelines",
    "ModelAdapter",
    "TrainingAdapter",
    "adapter_for",
    "training_adapter_for",
]
