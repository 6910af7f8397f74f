"""What distillation needs to know about a transformer class."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

from torch import Tensor


class TrainingAdapter(abc.ABC):
    """Encode prompts and build the calls of a training step, for one transformer class.

    A model file defines its own and assigns it to the adapter's `training`. Latents are
    `[batch, channels, height, width]`, scaled as the transformer takes them.
    """

    @abc.abstractmethod
    def encode_prompts(self, pipe: Any, prompts: list[str], text_tokens: int) -> tuple[Tensor, Tensor]:
        """Return the text `[prompts, tokens, dim]` and the pooled text `[prompts, dim]`.

        `text_tokens` is the pipeline's `max_sequence_length`.
        """

    @abc.abstractmethod
    def embeddings(self, pipe: Any, prompts: list[str], text_tokens: int) -> dict[str, Tensor]:
        """Return the encoded prompts as keywords of the pipeline, including those of its guidance."""

    @abc.abstractmethod
    def pack(self, latents: Tensor) -> Tensor:
        """Return latents in the shape of the transformer's prediction."""

    @abc.abstractmethod
    def training_call(
        self,
        noisy: Tensor,
        sigma: Tensor,
        text: Tensor,
        pooled: Tensor,
        guidance: float | None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the keywords of a forward call.

        Args:
            noisy: latents.
            sigma: `[batch]` in 0..1.
            text, pooled: as `encode_prompts` returns them.
            guidance: embedded guidance scale; None for a model without it.
            attention_kwargs: keywords for the attention processors.
        """

    def single_stream(self, layer: str) -> bool:
        """Return whether text and image are one sequence in the layer of this name.

        Keep the default for a model without such layers: then all are alike.
        """
        return True

    def matched_layers(self, layers: Sequence[str]) -> list[str]:
        """Return the layers whose attention outputs are compared, as CLEAR's reference implementation chooses them.

        These are the single-stream layers among every fourth of all.
        """
        return [layer for layer in layers[::4] if self.single_stream(layer)]
