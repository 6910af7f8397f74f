"""FLUX.2 in diffusers: FLUX.1's doors with ids of four axes, and single blocks that project all in one."""

from __future__ import annotations

from typing import Any

from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, cat

from clear_attn.core.layout import TokenLayout
from clear_attn.models.adapter import Architecture, Call
from clear_attn.models.flux import Flux
from clear_attn.models.processors import ClearAttnProcessor, split_heads


class ParallelProcessor(ClearAttnProcessor):
    """For a layer whose one projection makes query, key, value and the feed-forward network's input.

    And whose other one takes the output of both.
    """

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        clear_layout: TokenLayout | None = None,
        clear_backend: str = "auto",
        clear_sharpness: float = 1.0,
    ) -> Tensor:
        layout = self.layout_for(attention_mask, clear_layout, hidden_states, None)
        *parts, feed_forward = attn.to_qkv_mlp_proj(hidden_states).split(
            [*3 * [attn.inner_dim], attn.mlp_hidden_dim * attn.mlp_mult_factor], dim=-1
        )
        query, key, value = split_heads(attn, parts, ("norm_q", "norm_k"))
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        joint = self.attend(query, key, value, layout, clear_backend, clear_sharpness)
        output: Tensor = attn.to_out(cat([joint, attn.mlp_act_fn(feed_forward)], dim=-1))
        return output


class Flux2(Flux):
    transformer_class = "Flux2Transformer2DModel"
    accepts = ("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor")
    residuals = ()
    only_attends = False
    activation_factor = 24  # its feed-forward networks are gated

    def new_processor(self, down_factor: int, layer: str) -> ClearAttnProcessor:
        kind = ParallelProcessor if layer.startswith("single_") else ClearAttnProcessor
        return kind(down_factor, layer)

    def parse_call(self, transformer: Any, kwargs: dict[str, Any]) -> Call:
        if kwargs.get("kv_cache_mode") is not None:
            raise ValueError(
                f"kv_cache_mode={kwargs['kv_cache_mode']!r} keeps the keys of reference pictures from step to step, "
                "which a linearized model does not; use Flux2KleinPipeline in place of Flux2KleinKVPipeline, or "
                "clear_attn.restore() the model"
            )
        return super().parse_call(transformer, kwargs)

    training = None
    highres_pipelines = None
    architectures = (Architecture("flux2"),)
