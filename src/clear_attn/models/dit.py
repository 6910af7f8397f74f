"""DiT in diffusers: like SD3, with a class label instead of text, square images, and a predicted variance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from clear_attn.models.adapter import Call
from clear_attn.models.class_names import is_instance
from clear_attn.models.sd3 import SD3


class DiT(SD3):
    transformer_class = "DiTTransformer2DModel"
    accepts = ("AttnProcessor2_0", "AttnProcessor")
    default_text_tokens = 0
    residuals = ()
    keywords = "cross_attention_kwargs"
    timestep_is_sigma = False

    def attention_layers(self, transformer: Any) -> dict[str, Any]:
        return {name: module for name, module in transformer.named_modules() if is_instance(module, ("Attention",))}

    def parse_call(self, transformer: Any, kwargs: Mapping[str, Any]) -> Call:
        call = super().parse_call(transformer, kwargs)
        height, width = call.grids[0]
        if height != width:
            raise ValueError(
                f"hidden_states must be square, got {list(kwargs['hidden_states'].shape)}; give a square image, "
                "because diffusers' DiT always returns one"
            )
        return call

    def sigma(self, kwargs: Mapping[str, Any]) -> Tensor:
        raise ValueError(
            "a DiT's timestep is an index into its scheduler's betas and does not give sigma; give a schedule without "
            "dense_above_sigma and windows_by_sigma"
        )
