"""FLUX.1 in diffusers: text first, positions in `img_ids`, a reference image as a second segment (Kontext)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clear_attn.core.layout import TokenLayout
from clear_attn.methods import Layer, Method
from clear_attn.models.adapter import Architecture, Call, ModelAdapter
from clear_attn.models.class_names import is_instance
from clear_attn.models.image_to_image import HighresPipelines
from clear_attn.models.parsing.position_ids import read_ids
from clear_attn.models.processors.processor import ClearAttnProcessor
from clear_attn.models.training import TrainingAdapter


class FluxHighres(HighresPipelines):
    """The pipelines of FLUX.1, which take the guidance scale as an input and guide by `true_cfg_scale`."""

    def predictions(self, pipe: Any, guidance: float | None, options: Mapping[str, Any]) -> int:
        guided = options.get("true_cfg_scale", 1) > 1 and options.get("negative_prompt") is not None
        return 2 if guided else 1


class FluxTraining(TrainingAdapter):
    pipelines: tuple[str, ...] = ("FluxPipeline", "FluxKontextPipeline")

    def encode_prompts(self, pipe: Any, prompts: list[str], text_tokens: int) -> dict[str, Tensor]:
        text, pooled, _ = pipe.encode_prompt(prompts, None, pipe.vae.device, max_sequence_length=text_tokens)
        return {"text": text, "pooled": pooled}

    def training_call(
        self,
        noisy: Tensor,
        sigma: Tensor,
        text: Mapping[str, Tensor],
        guidance: float | None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        return {
            "hidden_states": self.pack(noisy),
            "encoder_hidden_states": text["text"],
            "pooled_projections": text["pooled"],
            "timestep": sigma.to(noisy.dtype),
            "guidance": None if guidance is None else torch.full_like(sigma, guidance, dtype=noisy.dtype),
            "img_ids": image_ids(noisy),
            "txt_ids": torch.zeros(text["text"].shape[1], 3, device=noisy.device),
            "joint_attention_kwargs": attention_kwargs,
        }

    def single_stream(self, layer: str) -> bool:
        return layer.startswith("single_")


def image_ids(latents: Tensor) -> Tensor:
    """Return the number, row and column of each 2 x 2 patch of latents, `[image tokens, 3]`.

    In float32: bfloat16 cannot tell positions past 256 apart.
    """
    sides = 1, latents.shape[-2] // 2, latents.shape[-1] // 2
    return torch.cartesian_prod(*(torch.arange(side, dtype=torch.float32, device=latents.device) for side in sides))


class Flux(ModelAdapter):
    transformer_class = "FluxTransformer2DModel"
    accepts: tuple[str, ...] = ("FluxAttnProcessor",)
    ip_adapter_processors: tuple[str, ...] = ("FluxIPAdapterAttnProcessor",)
    text_first = True
    default_text_tokens = 512
    takes_scale = True
    residuals: tuple[str, ...] = ("controlnet_block_samples", "controlnet_single_block_samples")

    def make_processor(self, original: Any, method: Method, layer: Layer, group: int) -> ClearAttnProcessor:
        if not is_instance(original, self.ip_adapter_processors):
            return super().make_processor(original, method, layer, group)
        from clear_attn.models.processors.flux_ip_adapter import IPAdapterProcessor

        processor = IPAdapterProcessor(self, method, layer, group)
        processor.scale = original.scale
        processor.to_k_ip, processor.to_v_ip = original.to_k_ip, original.to_v_ip
        return processor

    def latents_per_token(self, transformer: Any) -> int:
        return 2  # as the pipelines pack latents

    def parse_call(self, transformer: Any, kwargs: Mapping[str, Any]) -> Call:
        hidden_states, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
        if kwargs.get("img_ids") is None:
            raise ValueError("img_ids must give each image token's position, got None; pass them as the pipeline does")
        grids = read_ids(kwargs["img_ids"]).grids
        tokens = sum(height * width for height, width in grids)
        if hidden_states.shape[1] != tokens:
            raise ValueError(
                f"img_ids has {tokens} image tokens, hidden_states has {hidden_states.shape[1]}; give each image token "
                "a row in img_ids"
            )
        self.check_residuals(kwargs, tokens)
        return Call(grids, text.shape[1], hidden_states.device)

    def permute_inputs(self, kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        ids = kwargs["img_ids"]
        exact = read_ids(ids).exact
        ids = (ids[0] if ids.ndim == 3 else ids) if exact is None else exact
        return {
            **self.permute_residuals(kwargs, layout),
            "hidden_states": kwargs["hidden_states"][:, layout.permutation],
            "img_ids": ids[layout.permutation],
        }

    training: TrainingAdapter | None = FluxTraining()
    highres_pipelines: tuple[HighresPipelines, ...] = (
        FluxHighres("FluxPipeline", "FluxImg2ImgPipeline", modular=("FluxModularPipeline",)),
    )
    architectures: tuple[Architecture, ...] = (Architecture("flux", {"guidance_embeds": True}),)

    def rotary_embedding(self, transformer: Any) -> Any | None:
        return transformer.pos_embed
