"""The processor of FLUX.1's layers with an IP-Adapter. Imported on use, because its base class is in diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor

from clear_attn.models.context.context import ClearContext
from clear_attn.models.context.dense_attention import dense_attention
from clear_attn.models.processors.processor import ClearAttnProcessor, Inputs


class IPAdapterProcessor(FluxIPAdapterAttnProcessor, ClearAttnProcessor):
    """Add each image token's attention to the few tokens of an IP-Adapter.

    The processor shares the original's projections. It inherits diffusers' class, by which `set_ip_adapter_scale` and
    `unload_ip_adapter` find it.
    """

    layer_settings = (*ClearAttnProcessor.layer_settings, "scale")
    scale: Any
    to_k_ip: Any
    to_v_ip: Any

    def __init__(self, *args: Any) -> None:
        ClearAttnProcessor.__init__(self, *args)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        clear_context: ClearContext | None = None,
        ip_hidden_states: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = Inputs(hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        image, text = self.run(attn, inputs, clear_context)
        # Project again, because this query has no rotary embedding.
        fused = self.adapter.takes_fused(attn)
        query = attn.to_qkv(hidden_states).chunk(3, dim=-1)[0] if fused else attn.to_q(hidden_states)
        query = attn.norm_q(query.unflatten(-1, (attn.heads, -1))).transpose(1, 2)
        dense, adapted = dense_attention(self.attention_backend), torch.zeros_like(image)
        for tokens, scale, to_key, to_value in zip(
            ip_hidden_states or (), self.scale, self.to_k_ip, self.to_v_ip, strict=True
        ):
            # Several reference images may have their own dimension.
            parts = (to(tokens).reshape(len(image), -1, *query.shape[1::2]) for to in (to_key, to_value))
            key, value = (part.transpose(1, 2) for part in parts)
            attended = dense(query, key, value, query.shape[-1] ** -0.5, None)
            adapted = adapted + scale * attended.transpose(1, 2).flatten(2, 3)
        return image, text, adapted
