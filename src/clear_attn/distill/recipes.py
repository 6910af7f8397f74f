"""What training has to know of each family: how it is called, and how its prompts are encoded."""

from __future__ import annotations

import abc
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor


class Recipe(abc.ABC):
    """Of one family. Latents are `[batch, channels, height, width]`, scaled as the transformer takes them."""

    transformer_class: type

    @abc.abstractmethod
    def encode_prompts(self, pipe: Any, prompts: list[str], text_tokens: int) -> tuple[Tensor, Tensor]:
        """The text `[prompts, tokens, dim]` and the pooled text `[prompts, dim]`.

        `text_tokens` is the pipeline's `max_sequence_length`; SD3 joins CLIP's tokens to them.
        """

    @abc.abstractmethod
    def embeddings(self, pipe: Any, prompts: list[str], text_tokens: int) -> dict[str, Tensor]:
        """The keywords by which the pipeline takes encoded prompts, those of its guidance included."""

    @abc.abstractmethod
    def pack(self, latents: Tensor) -> Tensor:
        """Latents as the transformer predicts them."""

    @abc.abstractmethod
    def call(
        self, noisy: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor, guidance: float | None
    ) -> dict[str, Any]:
        """The keywords of a call; sigma is `[batch]` in 0..1, guidance what a guided model is told."""

    def matched_layers(self, layers: list[str]) -> list[str]:
        """Those whose attention is compared: every fourth of all that no other stream runs beside (the reference)."""
        return [layer for number, layer in enumerate(layers) if number % 4 == 0 and self.stands_alone(layer)]

    def stands_alone(self, layer: str) -> bool:
        """Whether text and image run through a layer as one stream."""
        return True


class FluxRecipe(Recipe):
    transformer_class = FluxTransformer2DModel

    def encode_prompts(self, pipe: Any, prompts: list[str], text_tokens: int) -> tuple[Tensor, Tensor]:
        text, pooled, _ = pipe.encode_prompt(prompts, None, max_sequence_length=text_tokens)
        return text, pooled

    def embeddings(self, pipe: Any, prompts: list[str], text_tokens: int) -> dict[str, Tensor]:
        text, pooled = self.encode_prompts(pipe, prompts, text_tokens)
        return {"prompt_embeds": text, "pooled_prompt_embeds": pooled}

    def pack(self, latents: Tensor) -> Tensor:
        patches = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def call(
        self, noisy: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor, guidance: float | None
    ) -> dict[str, Any]:
        height, width = noisy.shape[-2] // 2, noisy.shape[-1] // 2
        # In float32: bfloat16 cannot tell positions past 256 apart.
        axes = [torch.arange(length, dtype=torch.float32, device=noisy.device) for length in (1, height, width)]
        return {
            "hidden_states": self.pack(noisy),
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "timestep": sigma.to(noisy.dtype),
            "guidance": None if guidance is None else torch.full_like(sigma, guidance, dtype=noisy.dtype),
            "img_ids": torch.cartesian_prod(*axes),
            "txt_ids": torch.zeros(text.shape[1], 3, device=noisy.device),
        }

    def stands_alone(self, layer: str) -> bool:
        return layer.startswith("single_")


class SD3Recipe(Recipe):
    """SD3 has no layer that text and image share as one stream, so every fourth of all is compared."""

    transformer_class = SD3Transformer2DModel

    def encode_prompts(self, pipe: Any, prompts: list[str], text_tokens: int) -> tuple[Tensor, Tensor]:
        text, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=text_tokens
        )
        return text, pooled

    def embeddings(self, pipe: Any, prompts: list[str], text_tokens: int) -> dict[str, Tensor]:
        text, pooled = self.encode_prompts(pipe, prompts, text_tokens)
        negative, negative_pooled = self.encode_prompts(pipe, [""] * len(prompts), text_tokens)
        return {
            "prompt_embeds": text,
            "pooled_prompt_embeds": pooled,
            "negative_prompt_embeds": negative,
            "negative_pooled_prompt_embeds": negative_pooled,
        }

    def pack(self, latents: Tensor) -> Tensor:
        return latents

    def call(
        self, noisy: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor, guidance: float | None
    ) -> dict[str, Any]:
        return {
            "hidden_states": noisy,
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "timestep": (1000 * sigma).to(noisy.dtype),
        }


RECIPES: tuple[Recipe, ...] = (FluxRecipe(), SD3Recipe())


def recipe_of(transformer: Any) -> Recipe:
    """The recipe for a supported transformer.

    Raises:
        TypeError: there is none.
    """
    for recipe in RECIPES:
        if isinstance(transformer, recipe.transformer_class):
            return recipe
    known = ", ".join(recipe.transformer_class.__name__ for recipe in RECIPES)
    raise TypeError(f"a {type(transformer).__name__} cannot be distilled; give a pipeline with one of: {known}")
