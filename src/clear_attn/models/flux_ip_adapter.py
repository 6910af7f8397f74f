"""FLUX.1's layers with an IP-Adapter. Imported when a layer has one, since its base class needs diffusers' models."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor

from clear_attn.core.layout import TokenLayout
from clear_attn.models.processors import ClearAttnProcessor


class IPAdapterProcessor(FluxIPAdapterAttnProcessor, ClearAttnProcessor):
    """CLEAR's attention, and beside it each image token's attention to an IP-Adapter's few tokens.

    It has the stock processor's own projections, and is one of its kind to diffusers: `set_ip_adapter_scale` and
    `unload_ip_adapter` find it.
    """

    of_the_layer = (*ClearAttnProcessor.of_the_layer, "scale")

    def __init__(self, stock: FluxIPAdapterAttnProcessor, down_factor: int, layer: str) -> None:
        ClearAttnProcessor.__init__(self, down_factor, layer)
        self.scale = stock.scale
        self.to_k_ip, self.to_v_ip = stock.to_k_ip, stock.to_v_ip

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        clear_layout: TokenLayout | None = None,
        clear_backend: str = "auto",
        clear_sharpness: float = 1.0,
        ip_hidden_states: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        image, text = ClearAttnProcessor.__call__(
            self,
            attn,
            hidden_states,
            encoder_hidden_states,
            attention_mask,
            image_rotary_emb,
            clear_layout,
            clear_backend,
            clear_sharpness,
        )
        # Once more, for here it is taken without its position.
        query = attn.to_qkv(hidden_states).chunk(3, dim=-1)[0] if self.takes_fused(attn) else attn.to_q(hidden_states)
        query = attn.norm_q(query.unflatten(-1, (attn.heads, -1))).transpose(1, 2)
        adapted = torch.zeros_like(image)
        for tokens, scale, to_key, to_value in zip(
            ip_hidden_states or (), self.scale, self.to_k_ip, self.to_v_ip, strict=True
        ):
            # Several pictures may stand apart in a dimension of their own.
            parts = (to(tokens).reshape(len(image), -1, *query.shape[1::2]) for to in (to_key, to_value))
            key, value = (part.transpose(1, 2) for part in parts)
            seen = self._text_attention(query, key, value, query.shape[-1] ** -0.5)
            adapted = adapted + scale * seen.transpose(1, 2).flatten(2, 3)
        return image, text, adapted
