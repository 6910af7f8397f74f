"""FLUX.2 in diffusers: as FLUX.1, with ids of four axes, and single blocks with one projection for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, cat

from clear_attn.models.adapter import Architecture, Call
from clear_attn.models.context.context import ClearContext
from clear_attn.models.flux import Flux
from clear_attn.models.processors.processor import ClearAttnProcessor, Inputs, normalize, rotate, split_heads


class ParallelProcessor(ClearAttnProcessor):
    """For a layer whose one projection makes query, key, value and the feed-forward network's input."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        clear_context: ClearContext | None = None,
    ) -> Any:
        return self.run(attn, Inputs(hidden_states, None, attention_mask, image_rotary_emb), clear_context)


class Flux2(Flux):
    transformer_class = "Flux2Transformer2DModel"
    accepts = ("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor")
    residuals = ()
    ip_adapter_processors = ()
    takes_scale = False
    activation_factor = 24  # its feed-forward networks are gated

    def processor_class(self, layer: str) -> type[ClearAttnProcessor]:
        return ParallelProcessor if layer.startswith("single_") else ClearAttnProcessor

    def project(self, attn: Any, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Any]:
        if not hasattr(attn, "to_qkv_mlp_proj"):
            return super().project(attn, inputs)
        *parts, feed_forward = attn.to_qkv_mlp_proj(inputs.hidden_states).split(
            [*3 * [attn.inner_dim], attn.mlp_hidden_dim * attn.mlp_mult_factor], dim=-1
        )
        query, key, value = (split_heads(part, attn.inner_dim // attn.heads) for part in parts)
        query, key = rotate(*normalize(attn, query, key, ("norm_q", "norm_k")), inputs.image_rotary_emb)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), feed_forward

    def project_out(self, attn: Any, joint: Tensor, inputs: Inputs, rest: Any) -> Any:
        if rest is None:
            return super().project_out(attn, joint, inputs, rest)
        return attn.to_out(cat([joint, attn.mlp_act_fn(rest)], dim=-1))

    def parse_call(self, transformer: Any, kwargs: Mapping[str, Any]) -> Call:
        if kwargs.get("kv_cache_mode") is not None:
            raise ValueError(
                f"kv_cache_mode={kwargs['kv_cache_mode']!r} keeps the keys of reference pictures from step to step, "
                "which a linearized model does not; use Flux2KleinPipeline in place of Flux2KleinKVPipeline, or "
                "clear_attn.restore() the model"
            )
        return super().parse_call(transformer, kwargs)

    architectures = (Architecture("flux2"),)
