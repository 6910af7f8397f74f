"""Stable Diffusion 3 and 3.5 in diffusers: image first, unpatched latents as input, dual attention without text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clear_attn.core.layout import TokenLayout, grid_permutation
from clear_attn.models.adapter import Architecture, Call, ModelAdapter
from clear_attn.models.hooked import InnerHook, OutputHook
from clear_attn.models.image_to_image import HighresPipelines
from clear_attn.models.pipeline_defaults import linear_shift
from clear_attn.models.training import TrainingAdapter


class SD3Training(TrainingAdapter):
    """Train SD3: its text includes CLIP's tokens, and no layer is single-stream, so every fourth layer is compared."""

    pipelines = ("StableDiffusion3Pipeline",)
    negative_prompt = ""

    def encode_prompts(self, pipe: Any, prompts: list[str], text_tokens: int) -> dict[str, Tensor]:
        text, _, pooled, _ = pipe.encode_prompt(
            prompts,
            None,
            None,
            device=pipe.vae.device,
            do_classifier_free_guidance=False,
            max_sequence_length=text_tokens,
        )
        return {"text": text, "pooled": pooled}

    def pack(self, latents: Tensor) -> Tensor:
        return latents

    def training_call(
        self,
        noisy: Tensor,
        sigma: Tensor,
        text: Mapping[str, Tensor],
        guidance: float | None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        return {
            "hidden_states": noisy,
            "encoder_hidden_states": text["text"],
            "pooled_projections": text["pooled"],
            "timestep": (1000 * sigma).to(noisy.dtype),
            "joint_attention_kwargs": attention_kwargs,
        }


SD3_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
SD35_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}


class SD3(ModelAdapter):
    transformer_class = "SD3Transformer2DModel"
    accepts = ("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0")
    text_first = False
    default_text_tokens = 77 + 256  # CLIP's and T5's
    residuals: tuple[str, ...] = ("block_controlnet_hidden_states",)
    takes_scale = True
    # After `unfuse_qkv_projections`, SD3's layers still say they are fused. The separate weights are always there.
    fused_qkv_reliable = False

    def has_text(self, transformer: Any, layer: str) -> bool:
        return not layer.endswith(".attn2")

    def latents_per_token(self, transformer: Any) -> int:
        return int(transformer.config.patch_size)

    def inner_hooks(self, transformer: Any) -> list[InnerHook]:
        return [OutputHook(transformer.pos_embed, into_tile_order)]

    def parse_call(self, transformer: Any, kwargs: Mapping[str, Any]) -> Call:
        hidden_states, text = kwargs["hidden_states"], kwargs.get("encoder_hidden_states")
        side = self.latents_per_token(transformer)
        height, width = hidden_states.shape[-2:]
        if height % side or width % side or hidden_states.ndim != 4:
            raise ValueError(
                f"hidden_states must be [batch, channels, height, width] with sides in multiples of {side}, got "
                f"{list(hidden_states.shape)}; give the image a height and width in multiples of 16 pixels"
            )
        grid = height // side, width // side
        self.check_residuals(kwargs, grid[0] * grid[1])
        return Call((grid,), 0 if text is None else text.shape[1], hidden_states.device)

    def sigma(self, kwargs: Mapping[str, Any]) -> Tensor:
        return super().sigma(kwargs) / 1000  # the number of training timesteps

    def timestep_settings(self, pipe: Any, tokens: int, steps: int) -> dict[str, Any]:
        return {"num_inference_steps": steps, "mu": linear_shift(pipe.scheduler.config, tokens, highest=1.16)}

    def permute_inputs(self, kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        return self.permute_residuals(kwargs, layout)

    def unpermute_output(self, sample: Tensor, layout: TokenLayout) -> Tensor:
        return unpermute_patches(sample, layout)

    training: TrainingAdapter | None = SD3Training()
    highres_pipelines: tuple[HighresPipelines, ...] = (
        HighresPipelines(
            "StableDiffusion3Pipeline",
            "StableDiffusion3Img2ImgPipeline",
            batched_guidance=True,
            modular=("StableDiffusion3ModularPipeline",),
        ),
    )
    architectures: tuple[Architecture, ...] = (
        Architecture("sd3-medium", SD3_MEDIUM),
        Architecture("sd3.5-medium", {**SD3_MEDIUM, "dual_attention_layers": tuple(range(13))}),
        Architecture("sd3.5-large", SD35_LARGE),
    )

    def max_grid_side(self, transformer: Any) -> int | None:
        return getattr(transformer.pos_embed, "pos_embed_max_size", None)


def unpermute_patches(sample: Tensor, layout: TokenLayout) -> Tensor:
    """Return an image `[batch, channels, height, width]` with its patches in raster order."""
    (rows, columns), (height, width) = layout.grids[0], sample.shape[-2:]
    patches = sample.unflatten(3, (columns, width // columns)).unflatten(2, (rows, height // rows))
    tokens = patches.transpose(3, 4).flatten(2, 3)[:, :, layout.inverse_permutation]
    return tokens.unflatten(2, (rows, columns)).transpose(3, 4).reshape(sample.shape)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def into_tile_order(patch_embedding: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Put image tokens into tile order. A forward hook on the patch embedding, which adds positions in raster order."""
    height, width = (length // patch_embedding.patch_size for length in args[0].shape[-2:])
    return output[:, grid_permutation((height, width), output.device)]
