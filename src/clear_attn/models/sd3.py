"""Stable Diffusion 3 and 3.5 in diffusers: image first, the picture itself as input, dual attention without text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0
from torch import Tensor

from clear_attn.core.layout import TokenLayout, grid_permutation
from clear_attn.models.adapter import Call, InnerHook, ModelAdapter


class SD3(ModelAdapter):
    transformer_class = SD3Transformer2DModel
    accepts = (JointAttnProcessor2_0, FusedJointAttnProcessor2_0)
    text_first = False
    default_text_tokens = 77 + 256  # CLIP's and T5's
    residuals: tuple[str, ...] = ("block_controlnet_hidden_states",)
    takes_scale = True
    # SD3's layers call themselves fused also after that has been given up. The parts stay, and hold the same values.
    fused_qkv_reliable = False

    def has_text(self, transformer: Any, layer: str) -> bool:
        return not layer.endswith(".attn2")

    def latents_per_token(self, transformer: Any) -> int:
        return int(transformer.config.patch_size)

    def inner_hooks(self, transformer: Any) -> list[InnerHook]:
        return [InnerHook(transformer.pos_embed, into_tile_order)]

    def parse_call(self, transformer: Any, kwargs: Mapping[str, Any]) -> Call:
        hidden_states, text = kwargs["hidden_states"], kwargs.get("encoder_hidden_states")
        side = self.latents_per_token(transformer)
        height, width = hidden_states.shape[-2:]
        if height % side or width % side or hidden_states.ndim != 4:
            raise ValueError(
                f"hidden_states must be [batch, channels, height, width] with sides in multiples of {side}, got "
                f"{list(hidden_states.shape)}; give the picture a height and width in multiples of 16 pixels"
            )
        grid = height // side, width // side
        self.check_residuals(kwargs, grid[0] * grid[1])
        return Call((grid,), 0 if text is None else text.shape[1], hidden_states.device)

    def sigma(self, kwargs: Mapping[str, Any]) -> Tensor:
        return super().sigma(kwargs) / 1000  # of the timesteps it was trained with

    def permute_inputs(self, kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        return self.permute_residuals(kwargs, layout)

    def unpermute_output(self, sample: Tensor, layout: TokenLayout) -> Tensor:
        (rows, columns), (height, width) = layout.grids[0], sample.shape[-2:]
        patches = sample.unflatten(3, (columns, width // columns)).unflatten(2, (rows, height // rows))
        tokens = patches.transpose(3, 4).flatten(2, 3)[:, :, layout.inverse_permutation]
        return tokens.unflatten(2, (rows, columns)).transpose(3, 4).reshape(sample.shape)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def into_tile_order(patch_embedding: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """A forward hook. Only behind the positions' embedding, which counts rows and columns, may the order change."""
    height, width = (length // patch_embedding.patch_size for length in args[0].shape[-2:])
    return output[:, grid_permutation((height, width), output.device)]
