"""Chroma in diffusers: like FLUX.1, with a mask for padded text.

The model passes no attention keywords to its single blocks, nor to any block under gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from clear_attn.core.layout import TokenLayout
from clear_attn.models.adapter import Architecture, Call
from clear_attn.models.flux import Flux, FluxTraining, image_ids
from clear_attn.models.image_to_image import HighresPipelines
from clear_attn.models.parsing.padding import HIDDEN, check_mask
from clear_attn.models.parsing.tensor_cache import ReadOnce
from clear_attn.models.processors.publishing import Publishing


class ChromaTraining(FluxTraining):
    pipelines = ("ChromaPipeline",)
    text_keywords = MappingProxyType({"text": "prompt_embeds", "mask": "prompt_attention_mask"})
    negative_prompt = ""

    def encode_prompts(self, pipe: Any, prompts: list[str], text_tokens: int) -> dict[str, Tensor]:
        text, _, mask, *_ = pipe.encode_prompt(
            prompts, device=pipe.vae.device, do_classifier_free_guidance=False, max_sequence_length=text_tokens
        )
        return {"text": text, "mask": mask}

    def training_call(
        self,
        noisy: Tensor,
        sigma: Tensor,
        text: Mapping[str, Tensor],
        guidance: float | None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        image, mask = self.pack(noisy), text["mask"]
        return {
            "hidden_states": image,
            "encoder_hidden_states": text["text"],
            "timestep": sigma.to(noisy.dtype),
            "img_ids": image_ids(noisy),
            "txt_ids": torch.zeros(text["text"].shape[1], 3, device=noisy.device),
            "attention_mask": torch.cat([mask, mask.new_ones(image.shape[:2])], dim=1),
            "joint_attention_kwargs": attention_kwargs,
        }


class Chroma(Publishing, Flux):
    takes_scale = False
    transformer_class = "ChromaTransformer2DModel"
    ip_adapter_processors = ()

    def parse_call(self, transformer: Any, kwargs: Mapping[str, Any]) -> Call:
        call = super().parse_call(transformer, kwargs)
        mask, image_tokens = kwargs.get("attention_mask"), kwargs["hidden_states"].shape[1]
        if mask is not None:
            check_mask("attention_mask", mask, (len(kwargs["hidden_states"]), call.text_tokens + image_tokens))
            if _ones_at_the_end(mask) < image_tokens:
                raise ValueError(
                    f"attention_mask must be 1 for all {image_tokens} image tokens, which are at its end, because a "
                    "linearized model applies it to text only; pass it as ChromaPipeline does"
                )
        return call

    def text_bias(self, kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Return the bias of padded text keys and the weight of text queries.

        Chroma's layers multiply the masks of query and key, and torch adds a mask of numbers to the scores. A mask of
        1 and 0 therefore adds 1 where both are 1. Relative to image keys, the bias of text is query x (key - 1).
        """
        mask = kwargs.get("attention_mask")
        if mask is None:
            return None, None
        text = mask[:, : kwargs["encoder_hidden_states"].shape[1]]
        if mask.dtype == torch.bool:
            return torch.where(text, 0.0, HIDDEN), None
        return text - 1, text

    def permute_inputs(self, kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        return {**super().permute_inputs(kwargs, layout), "attention_mask": None}

    training = ChromaTraining()
    highres_pipelines = (HighresPipelines("ChromaPipeline", "ChromaImg2ImgPipeline"),)
    architectures = (Architecture("chroma"),)


def _count_ones_at_the_end(mask: Tensor) -> int:
    return int((mask == 1).all(dim=0).flip(0).cumprod(0).sum())


_ones_at_the_end = ReadOnce(_count_ones_at_the_end)
