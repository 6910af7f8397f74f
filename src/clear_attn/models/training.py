"""The contract of a training adapter, which describes how a transformer class is trained."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from clear_attn.models.pipeline_defaults import call_defaults


class TrainingAdapter(abc.ABC):
    """Encode images and prompts, and build the calls of a training step, for one transformer class.

    A model file defines a subclass and assigns an instance to the adapter's `training`. Latents are
    `[batch, channels, height, width]`, scaled for the transformer. Text is a dict of tensors with a row per prompt.
    Shorter texts of a batch, and their masks, are padded with zeros at the end.

    Attributes:
        pipelines: names of the text-to-image pipelines in diffusers.
        pixel_step: what the sides of images must be multiples of, in pixels.
        text_tokens: the default length that prompts are padded to; None for that of the pipeline.
        text_keywords: the pipeline's keyword for each tensor of `encode_prompts`.
        negative_prompt: the negative prompt that the pipeline's guidance needs, or None.
    """

    pipelines: tuple[str, ...]
    pixel_step: int = 16
    text_tokens: int | None = None
    text_keywords: Mapping[str, str] = MappingProxyType({"text": "prompt_embeds", "pooled": "pooled_prompt_embeds"})
    negative_prompt: str | None = None

    def validate_model(self, transformer: Any) -> None:
        """Raise TypeError if this variant of the model cannot be distilled."""
        return

    def embeds_guidance(self, transformer: Any) -> bool:
        """Return whether the model takes an embedded guidance scale."""
        return bool(transformer.config.get("guidance_embeds"))

    def encode_image(self, pipe: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation of the latents of pixels `[batch, 3, height, width]` in -1..1."""
        moments = pipe.vae.encode(pixels).latent_dist
        scale, shift = pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor or 0.0
        return (moments.mean - shift) * scale, moments.std * scale

    @abc.abstractmethod
    def encode_prompts(self, pipe: Any, prompts: list[str], text_tokens: int) -> dict[str, Tensor]:
        """Return the text `[prompts, tokens, dim]`, and a mask or pooled text if the model needs them.

        `text_tokens` is the pipeline's `max_sequence_length`.
        """

    def pipeline_arguments(self, pipe: Any, prompts: list[str], text_tokens: int) -> dict[str, Tensor]:
        """Return the encoded prompts, and negative prompts for guidance, as keywords of the pipeline."""
        encoded = self.encode_prompts(pipe, prompts, text_tokens)
        arguments = {self.text_keywords[name]: tensor for name, tensor in encoded.items()}
        takes_negative = "negative_prompt_embeds" in call_defaults(self.drawing(pipe))
        if self.negative_prompt is None or not takes_negative:
            return arguments
        negative = self.encode_prompts(pipe, [self.negative_prompt] * len(prompts), text_tokens)
        return arguments | {f"negative_{self.text_keywords[name]}": tensor for name, tensor in negative.items()}

    def drawing(self, pipe: Any) -> Any:
        """Return the pipeline that draws from encoded prompts."""
        return pipe

    def draw(self, pipe: Any, **arguments: Any) -> Any:
        """Draw from encoded prompts; the result has `images`. Arguments are those of an ordinary pipeline."""
        return self.drawing(pipe)(**arguments)

    def pack(self, latents: Tensor) -> Tensor:
        """Return latents in the shape of the transformer's prediction.

        By default a token is a patch of 2 x 2 latents, `[batch, tokens, channels x 4]`.
        """
        patches = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def prediction(self, output: Any, call: Mapping[str, Any]) -> Tensor:
        """Return the predicted velocity, noise minus image, in the shape of `pack`, from what the transformer returns.

        `output` is the first value that it returns with `return_dict=False`, for a call of `training_call`.
        """
        velocity: Tensor = output
        return velocity

    @abc.abstractmethod
    def training_call(
        self,
        noisy: Tensor,
        sigma: Tensor,
        text: Mapping[str, Tensor],
        guidance: float | None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the keywords of a forward call.

        Args:
            noisy: the noisy latents.
            sigma: the share of noise, `[batch]` in 0..1.
            text: the result of `encode_prompts`.
            guidance: the embedded guidance scale; None for a model without it.
            attention_kwargs: keywords for the attention processors.
        """

    def single_stream(self, layer: str) -> bool:
        """Return whether text and image are one sequence in the layer of this name.

        Keep the default for a model without such layers, so that `matched_layers` chooses among all.
        """
        return True

    def matched_layers(self, layers: Sequence[str]) -> list[str]:
        """Return the layers to compare attention outputs of: the single-stream layers among every fourth layer.

        CLEAR's reference implementation chooses the same layers.
        """
        return [layer for layer in layers[::4] if self.single_stream(layer)]
