"""Krea 2 in diffusers: text first, positions of text and image in `position_ids`, grouped-query attention with a gate.

The transformer first fuses the layers of the text encoder. These blocks attend to text alone, and keep their own
processors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clear_attn.core.layout import TokenLayout
from clear_attn.models.adapter import Architecture, Call, ModelAdapter
from clear_attn.models.flux import image_ids
from clear_attn.models.image_to_image import FromNoisedLatents
from clear_attn.models.parsing.padding import HIDDEN, check_mask
from clear_attn.models.parsing.position_ids import IdFormat, Positions, read_ids
from clear_attn.models.pipeline_defaults import linear_shift
from clear_attn.models.processors.processor import Inputs, normalize, rotate, split_heads
from clear_attn.models.processors.publishing import PublishedProcessor, Publishing
from clear_attn.models.qwen_image import QwenTraining


class Krea2Training(QwenTraining):
    """Train Krea 2: Qwen-Image's autoencoder, and texts of one length with a mask."""

    pipelines = ("Krea2Pipeline",)
    negative_prompt = ""

    def encode_prompts(self, pipe: Any, prompts: list[str], text_tokens: int) -> dict[str, Tensor]:
        text, mask = pipe.encode_prompt(prompts, device=pipe.vae.device, max_sequence_length=text_tokens)
        return {"text": text, "mask": mask}

    def training_call(
        self,
        noisy: Tensor,
        sigma: Tensor,
        text: Mapping[str, Tensor],
        guidance: float | None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        positions = torch.zeros(text["text"].shape[1], 3, device=noisy.device)
        return {
            "hidden_states": self.pack(noisy),
            "encoder_hidden_states": text["text"],
            "timestep": sigma.to(noisy.dtype),
            "position_ids": torch.cat([positions, image_ids(noisy)]),
            "encoder_attention_mask": text["mask"].bool(),
            "attention_kwargs": attention_kwargs,
        }


def dynamic_shift(pipe: Any, tokens: int) -> float:
    """Return the `mu` that the pipeline computes for its scheduler."""
    return 1.15 if pipe.config.get("is_distilled") else linear_shift(pipe.scheduler.config, tokens, longest=6400)


class Krea2Highres(FromNoisedLatents):
    """The pipeline of Krea 2, which has no image-to-image pipeline."""

    def dynamic_shift(self, pipe: Any, tokens: int, steps: int) -> float:
        return dynamic_shift(pipe, tokens)


class Krea2Processor(PublishedProcessor):
    """The processor with Krea 2's arguments. It ignores the mask, which the entry hook turns into a score bias."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        return super().__call__(attn, hidden_states, image_rotary_emb=image_rotary_emb)


class Krea2(Publishing, ModelAdapter):
    transformer_class = "Krea2Transformer2DModel"
    first_version = (0, 39)
    accepts = ("Krea2AttnProcessor",)
    text_first = True
    default_text_tokens = 512
    keywords = "attention_kwargs"
    fused_qkv_reliable = False  # its own processor does not use them
    activation_factor = 14  # measured 12.6

    def timestep_settings(self, pipe: Any, tokens: int, steps: int) -> dict[str, Any]:
        return {**super().timestep_settings(pipe, tokens, steps), "mu": dynamic_shift(pipe, tokens)}

    def attention_layers(self, transformer: Any) -> dict[str, Any]:
        layers = super().attention_layers(transformer)
        return {name: attn for name, attn in layers.items() if name.startswith("transformer_blocks.")}

    def heads_of(self, attn: Any) -> tuple[int, int]:
        return attn.num_heads, attn.head_dim

    def processor_class(self, layer: str) -> type[PublishedProcessor]:
        return Krea2Processor

    def project(self, attn: Any, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Any]:
        x = inputs.hidden_states
        query, key, value = (split_heads(to(x), attn.head_dim) for to in (attn.to_q, attn.to_k, attn.to_v))
        query, key = rotate(*normalize(attn, query, key, ("norm_q", "norm_k")), inputs.image_rotary_emb)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn.to_gate(x)

    def project_out(self, attn: Any, joint: Tensor, inputs: Inputs, rest: Any) -> Any:
        return attn.to_out[0](joint * torch.sigmoid(rest))

    def latents_per_token(self, transformer: Any) -> int:
        return 2  # as the pipelines pack latents

    def parse_call(self, transformer: Any, kwargs: Mapping[str, Any]) -> Call:
        hidden_states, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
        grids = _positions(kwargs).grids
        tokens = sum(height * width for height, width in grids)
        if hidden_states.shape[1] != tokens:
            raise ValueError(
                f"position_ids has {tokens} image tokens after {text.shape[1]} text tokens, hidden_states has "
                f"{hidden_states.shape[1]}; give each text token, then each image token, a row in position_ids"
            )
        if (mask := kwargs.get("encoder_attention_mask")) is not None:
            check_mask("encoder_attention_mask", mask, tuple(text.shape[:2]))
        return Call(grids, text.shape[1], hidden_states.device)

    def text_bias(self, kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Return the bias of padded text keys. A mask of numbers is added to the scores, as torch does."""
        mask = kwargs.get("encoder_attention_mask")
        if mask is None:
            return None, None
        # The model extends the mask with 1 for image keys.
        return torch.where(mask, 0.0, HIDDEN) if mask.dtype == torch.bool else mask - 1, None

    def permute_inputs(self, kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        exact, positions = _positions(kwargs).exact, kwargs["position_ids"]
        positions = positions if exact is None else exact
        text = layout.text_tokens
        return {
            **kwargs,
            "hidden_states": kwargs["hidden_states"][:, layout.permutation],
            "position_ids": torch.cat([positions[:text], positions[text:][layout.permutation]]),
        }

    training = Krea2Training()
    highres_pipelines = (Krea2Highres("Krea2Pipeline", training, unguided=0, modular=("Krea2ModularPipeline",)),)
    architectures: tuple[Architecture, ...] = (Architecture("krea2"),)

    def output_layer(self, transformer: Any) -> nn.Module:
        last: nn.Module = transformer.final_layer
        return last

    def rotary_embedding(self, transformer: Any) -> Any:
        return transformer.rotary_emb


def _positions(kwargs: Mapping[str, Any]) -> Positions:
    text_tokens = kwargs["encoder_hidden_states"].shape[1]
    return read_ids(kwargs["position_ids"], IdFormat("position_ids", text_tokens=text_tokens))
