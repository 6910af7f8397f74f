"""Chroma in diffusers: FLUX.1's doors and layers, and a mask for the padding of the text.

Under gradient checkpointing, Chroma keeps a call's keywords from its layers. What reaches them always is the rotary
embedding, so the layout goes with that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clear_attn.core.layout import TokenLayout
from clear_attn.models.adapter import Architecture, Call, InnerHook
from clear_attn.models.context_variable import Untold, announced
from clear_attn.models.flux import Flux
from clear_attn.models.padding import UNSEEN, Padding, check_mask, padding_of
from clear_attn.models.processors import ClearAttnProcessor
from clear_attn.models.tensor_cache import ReadOnce


class ChromaProcessor(ClearAttnProcessor):
    """Is told of the call by the rotary embedding: (cos, sin, keywords)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Any, ...] | None = None,
        clear_layout: TokenLayout | None = None,
        clear_backend: str = "auto",
        clear_sharpness: float = 1.0,
        clear_padding: Padding | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        cos, sin, own = image_rotary_emb or (None, None, {})
        rotary = None if cos is None or sin is None else (cos, sin)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary, **own)


class Chroma(Untold, Flux):
    only_attends = False
    transformer_class = "ChromaTransformer2DModel"
    ip_adapter_processors = ()

    def new_processor(self, down_factor: int, layer: str) -> ClearAttnProcessor:
        return ChromaProcessor(down_factor, layer)

    def inner_hooks(self, transformer: Any) -> list[InnerHook]:
        return [InnerHook(transformer.pos_embed, tell_with_positions)]

    def parse_call(self, transformer: Any, kwargs: dict[str, Any]) -> Call:
        call = super().parse_call(transformer, kwargs)
        mask, image_tokens = kwargs.get("attention_mask"), kwargs["hidden_states"].shape[1]
        if mask is not None:
            check_mask("attention_mask", mask, (len(kwargs["hidden_states"]), call.text_tokens + image_tokens))
            if _ones_at_the_end(mask) < image_tokens:
                raise ValueError(
                    f"attention_mask must be 1 for all {image_tokens} image tokens, which stand at its end, for a "
                    "linearized model honours it for text alone; pass it as ChromaPipeline does"
                )
        return call

    def padding(self, kwargs: dict[str, Any], layout: TokenLayout) -> Padding | None:
        """Chroma's layers multiply a query's and a key's mask, and torch's attention adds numbers to the scores.

        So the pipelines' mask of 1 and 0 adds 1 where both are 1: beside what a query sees of the image, the text has
        query x (key - 1).
        """
        mask = kwargs.get("attention_mask")
        if mask is None:
            return None
        text = mask[:, layout.text]
        if mask.dtype == torch.bool:
            unseen = torch.where(text, 0.0, UNSEEN)
            return padding_of(layout, torch.ones_like(unseen), unseen)
        return padding_of(layout, text, text - 1)

    def permute_inputs(self, kwargs: dict[str, Any], layout: TokenLayout) -> dict[str, Any]:
        return {**super().permute_inputs(kwargs, layout), "attention_mask": None}

    training = None
    highres_pipelines = None
    architectures = (Architecture("chroma"),)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def tell_with_positions(embedding: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
    """A forward hook."""
    return *output, announced() or {}


def _count_ones_at_the_end(mask: Tensor) -> int:
    return int((mask == 1).all(dim=0).flip(0).cumprod(0).sum())


_ones_at_the_end = ReadOnce(_count_ones_at_the_end)
