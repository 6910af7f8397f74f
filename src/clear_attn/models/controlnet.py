"""ControlNets of FLUX.1 and SD3 in diffusers: like their models, but their layers get no attention keywords.

Here a ControlNet itself is linearized. Its residuals are permuted where a transformer gets them, in `adapter.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clear_attn.core.layout import TokenLayout
from clear_attn.models.adapter import Call
from clear_attn.models.context.context_variable import current
from clear_attn.models.flux import Flux
from clear_attn.models.hooked import InnerHook, OutputHook
from clear_attn.models.processors.publishing import Publishing
from clear_attn.models.sd3 import SD3, into_tile_order


class _ControlNet(Publishing):
    """The shared part of these ControlNets. It goes before the model's adapter in the list of bases."""

    takes_scale = False

    def unpermute_output(self, sample: Tensor, layout: TokenLayout) -> Tensor:
        return sample[:, layout.inverse_permutation]


class FluxControlNet(_ControlNet, Flux):
    transformer_class = "FluxControlNetModel"

    def inner_hooks(self, transformer: Any) -> list[InnerHook]:
        # Permute the condition after its embedder: before, it may still be an image.
        return [OutputHook(transformer.controlnet_x_embedder, permute_condition)]

    def parse_call(self, transformer: Any, kwargs: Mapping[str, Any]) -> Call:
        call = super().parse_call(transformer, kwargs)
        # A union ControlNet adds a token for its mode before the text.
        return call._replace(text_tokens=call.text_tokens + bool(transformer.union))


class SD3ControlNet(_ControlNet, SD3):
    transformer_class = "SD3ControlNetModel"

    def has_text(self, transformer: Any, layer: str) -> bool:
        return transformer.context_embedder is not None and super().has_text(transformer, layer)

    def inner_hooks(self, transformer: Any) -> list[InnerHook]:
        embedders = [transformer.pos_embed, transformer.pos_embed_input]
        return [OutputHook(embedder, into_tile_order) for embedder in embedders if embedder is not None]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def permute_condition(embedder: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Put the embedded condition into tile order. A forward hook."""
    context = current()
    return output if context is None else output[:, context.layout.permutation]
